"""What training needs of memory.

`python -m gpt2_ddp.memory` prints what the arithmetic says of the usual GPUs; launch/GPUS.md is its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gpt2_ddp import cli
from gpt2_ddp.kernels import LARGE_HEAD_ROWS, LARGE_MEMORY, head_rows_for
from gpt2_ddp.model import SIZES, GPTConfig
from gpt2_ddp.precision import Hardware, choose_dtype, peak_flops

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


def parameter_count(config: GPTConfig) -> int:
    """Parameters, the tied head counted once (GPT-2's shapes; 124,475,904 for `gpt2` with its padding)."""
    c = config.n_embd
    per_block = 12 * c * c + 13 * c  # four matrices with biases, two norms
    return (config.vocab_size + config.block_size) * c + config.n_layer * per_block + 2 * c


def training_memory(
    config: GPTConfig,
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    device_type: str,
    device_memory: int = 0,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> TrainingMemory:
    """Memory of training with AdamW, float32 weights and autocast to `dtype`, on one rank or under DDP.

    DDP's buckets hold the gradients, and nothing else does. Counted are the tensors that autograd keeps: for each token
    and block, in units of n_embd, the inputs of the two norms in float32, q, k, v, what attention gives, and GELU's
    input; the lowered copies of the matrices; and what `kernels.HeadLoss` holds: each token's features and their
    gradient (where matmuls have another dtype, also two copies in float32), a chunk's logits, their gradient in float32
    (not where the loss is compiled) and, where that is another dtype, in theirs; the head's own gradient and, in such a
    dtype, a chunk's part of it (on a CPU only a slice of that exists). In the backward pass of a block that is the
    head's gradient, those of GELU's output and input, and that of the residual stream; compiled, also the gradients of
    the block's weights, which it hands over all at once. With activation checkpointing each block keeps its input
    alone, and the one whose backward pass it is all the others. The rows of the head's chunks follow from
    `device_memory`, the bytes that the device has.
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
    backward = 4 * matrix + tokens * config.n_embd * (width * 2 * 4 + 4 + (block if activation_checkpointing else 0))
    if compiled:
        backward += 4 * 12 * config.n_embd**2
    return TrainingMemory(
        weights=4 * count,
        gradients=4 * count,
        moments=8 * count,
        lowered=width * (12 * config.n_layer * config.n_embd**2 + matrix) if mixed else 0,
        activations=tokens * config.n_layer * config.n_embd * (4 if activation_checkpointing else block),
        passing=max(head, backward),
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def fits_into(
    memory: int,
    config: GPTConfig,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    device_type: str,
    device_memory: int = 0,
    compiled: bool = False,
    activation_checkpointing: bool = False,
) -> Callable[[int], bool]:
    """Whether a micro-batch fits into the usable part of `memory` bytes, by `training_memory`."""

    def fits(size: int) -> bool:
        needed = training_memory(
            config,
            micro_batch_size=size,
            sequence_length=sequence_length,
            dtype=dtype,
            device_type=device_type,
            device_memory=device_memory,
            compiled=compiled,
            activation_checkpointing=activation_checkpointing,
        )
        return needed.total < USABLE.get(device_type, USABLE["cpu"]) * memory

    return fits


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its data sheet has it; `memory` in bytes."""

    hardware: Hardware
    memory: int

    @property
    def dtype(self) -> torch.dtype:
        """What `--dtype auto` takes there."""
        return choose_dtype("auto", self.hardware)[0]


CARDS = tuple(
    Card(hardware=Hardware(device_type="cuda", name=f"{name} {size}GB", capability=capability), memory=size * 10**9)
    for name, size, capability in (("T4", 16, (7, 5)), ("A100", 40, (8, 0)), ("A100", 80, (8, 0)), ("H100", 80, (9, 0)))
)
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PAGE = """\
# GPUs, on paper

Printed by `python -m gpt2_ddp.memory`. Nothing here was measured on a GPU: it is the arithmetic by which the trainer
reckons its `mfu` and what fits, which the tests compare with counted operations and measured memory on a CPU.

For {length} tokens a sequence, float32 weights, AdamW, and matmuls in the two-byte format that `--dtype auto` takes.
GB are 10^9 bytes, GiB 2^30.

## Operations and traffic

GFLOP a token: forward and backward, matmuls only, attention in full. All-reduce: the gradients that DDP sums once a
step, whatever the micro-batch; in a ring of n GPUs each one sends and receives 2 (n - 1) / n times as much. AdamW: what
it reads (weights, gradients, two moments) and writes (weights, two moments) once a step.

{work}

## Memory of one GPU by micro-batch, GiB

Fixed: weights, gradients, moments, and the weights in the dtype of the matmuls. The rest grows with the micro-batch.
Counted is what PyTorch keeps when the blocks are compiled, on one GPU or under DDP, with {rows} rows of the head at a
time, as on a card of 40 GB or more; the CUDA context and the allocator's unused parts come on top.

{memory}

## The largest power of two that fits

Up to {most}, into {usable} of the memory on the card's data sheet; in brackets with `--activation-checkpointing`. A
dash: not one sequence fits. Peak: what `mfu` is a share of, dense matmuls in that format by the data sheet.

{fitting}
"""


def gpu_page(sequence_length: int = 1024) -> str:
    """What GPT-2 needs of the usual GPUs, on paper, for sequences of that many tokens: the page launch/GPUS.md."""
    length = sequence_length
    return PAGE.format(
        length=length,
        usable=f"{USABLE['cuda']:.0%}",
        most=MICRO_BATCHES[-1],
        rows=LARGE_HEAD_ROWS,
        work=table(
            ["", "parameters", "GFLOP a token", "all-reduce, GB", "AdamW, GB"],
            ([name, *work(SIZES[name], length)] for name in PUBLISHED),
        ),
        memory=table(
            ["", "fixed", *map(str, MICRO_BATCHES)],
            ([name, *by_micro_batch(SIZES[name], length)] for name in PUBLISHED),
        ),
        fitting=table(
            ["", "dtype", "peak, TFLOP/s", *PUBLISHED],
            (card_row(card, length) for card in CARDS),
        ),
    )


def work(config: GPTConfig, length: int) -> list[str]:
    """Parameters, GFLOP for a token, and GB that gradients and optimizer move in a step."""
    needed = on_gpu(config, 1, length)
    updated = needed.weights + needed.moments
    moved = [needed.gradients, updated + needed.gradients + updated]
    flops = config.flops_per_token(length)
    return [f"{parameter_count(config):,}", f"{flops / 1e9:.2f}", *(f"{size / 1e9:.1f}" for size in moved)]


def by_micro_batch(config: GPTConfig, length: int) -> list[str]:
    """GiB without activations, and in all with each of `MICRO_BATCHES`."""
    needed = [on_gpu(config, size, length) for size in MICRO_BATCHES]
    return [f"{size / 2**30:.1f}" for size in (needed[0].fixed, *(each.total for each in needed))]


def on_gpu(config: GPTConfig, size: int, length: int) -> TrainingMemory:
    """What a micro-batch of `size` sequences needs with matmuls in two bytes."""
    return training_memory(
        config,
        micro_batch_size=size,
        sequence_length=length,
        dtype=torch.float16,
        device_type="cuda",
        device_memory=LARGE_MEMORY,
        compiled=True,
    )


def card_row(card: Card, length: int) -> list[str]:
    """Name, dtype, peak, and the largest of `MICRO_BATCHES` that fits for each size, without and with checkpointing."""
    peak = peak_flops(card.hardware, card.dtype)
    row = [card.hardware.name, str(card.dtype).removeprefix("torch."), f"{peak / 1e12:g}" if peak else "-"]
    for name in PUBLISHED:
        plain, checkpointing = (
            max(
                filter(
                    fits_into(
                        card.memory,
                        SIZES[name],
                        sequence_length=length,
                        dtype=card.dtype,
                        device_type="cuda",
                        device_memory=card.memory,
                        compiled=True,
                        activation_checkpointing=again,
                    ),
                    MICRO_BATCHES,
                ),
                default="-",
            )
            for again in (False, True)
        )
        row.append(f"{plain} ({checkpointing})")
    return row


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    cli.run(
        lambda: print(cli.parse(gpu_page, "What GPT-2 needs of the usual GPUs, on paper"), end=""), prints_result=True
    )
