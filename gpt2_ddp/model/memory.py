"""What training needs of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpt2_ddp.model.gpt import GPTConfig
from gpt2_ddp.model.head import head_rows_for
from gpt2_ddp.model.shapes import block_matrix_size, parameter_count

USABLE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the memory found that is counted on; the rest is for the allocator, the loader and everybody else. On a CPU,
training `gpt2` without compilation held 1.44 times what is reckoned, for `allocator.keep_freed_memory`."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that one rank holds when it holds most, by the arithmetic of `training_memory`."""

    weights: int
    gradients: int
    moments: int
    lowered: int
    """The matrices in the dtype of the matmuls."""
    activations: int
    """What the backward pass is given of all blocks."""
    passing: int
    """What the head or, if that is more, the backward pass of a block holds while it computes."""

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.moments + self.lowered

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.passing


def training_memory(
    config: GPTConfig,
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    device_type: str,
    state_bytes: int,
    device_memory: int = 0,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> TrainingMemory:
    """Memory of training with float32 weights and autocast to `dtype`, on one rank or under DDP.

    `state_bytes` is what the optimizer's state takes.

    DDP's buckets hold the gradients, and nothing else does. Counted are the tensors that autograd keeps: for each token
    and block, in units of n_embd, the inputs of the two norms in float32, q, k, v, what attention gives, and GELU's
    input; the lowered copies of the matrices; and what `head.HeadLoss` holds: each token's features and their
    gradient (where matmuls have another dtype, also two copies in float32), a chunk's logits, their gradient in float32
    (not where the loss is compiled) and, where that is another dtype, in theirs; the head's own gradient and, in such a
    dtype, a chunk's part of it (on a CPU only a slice of that exists). In the backward pass of a block that is the
    head's gradient, those of GELU's output and input, and that of the residual stream; compiled, also the gradients of
    the block's weights, which it hands over all at once. With activation checkpointing each block keeps its input
    alone, and the one whose backward pass it is all the others, in eager mode also what its norms give. The rows of the
    head's chunks follow from `device_memory`, the bytes that the device has.
    """
    count, width, tokens = parameter_count(config), dtype.itemsize, micro_batch_size * sequence_length
    mixed = dtype != torch.float32
    block = 2 * 4 + width * (3 + 1 + 4)
    matrix = config.vocab_size * config.n_embd
    rows = min(tokens, head_rows_for(device_type, device_memory))
    head = 2 * width * tokens * config.n_embd + 4 * matrix
    logits = rows * config.vocab_size
    if mixed:
        head += width * matrix + 2 * 4 * tokens * config.n_embd + logits * (2 * width + (0 if compiled else 4))
    else:
        head += logits * (2 * 4 if compiled and device_type != "cpu" else 4)
    again = block + (0 if compiled else 2 * width) if activation_checkpointing else 0
    backward = 4 * matrix + tokens * config.n_embd * (width * 2 * 4 + 4 + again)
    if compiled:
        backward += 4 * block_matrix_size(config)
    return TrainingMemory(
        weights=4 * count,
        gradients=4 * count,
        moments=state_bytes,
        lowered=width * (config.n_layer * block_matrix_size(config) + matrix) if mixed else 0,
        activations=tokens * config.n_layer * config.n_embd * (4 if activation_checkpointing else block),
        passing=max(head, backward),
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def fits_into(memory: int, device_type: str, reckon: Callable[..., TrainingMemory]) -> Callable[[int], bool]:
    """Whether a micro-batch fits into the usable part of `memory` bytes, by `reckon`: `training_memory` but for it."""
    usable = USABLE.get(device_type, USABLE["cpu"]) * memory
    return lambda size: reckon(micro_batch_size=size).total < usable
