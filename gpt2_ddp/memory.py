"""What training needs of memory, and the largest micro-batch that fits into what there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from gpt2_ddp.distributed import DistContext
from gpt2_ddp.model import GPT, GPTConfig
from gpt2_ddp.precision import Precision

USABLE = 0.9
"""Share of the memory found that is counted on; the rest is for the allocator, the loader and everybody else."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that one rank holds at the end of a forward pass, by the arithmetic of `training_memory`."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.logits


def parameter_count(config: GPTConfig) -> int:
    """Parameters, the tied head counted once (GPT-2's shapes; 124,475,904 for `gpt2` with its padding)."""
    c = config.n_embd
    per_block = 12 * c * c + 13 * c  # four matrices with biases, two norms
    return (config.vocab_size + config.block_size) * c + config.n_layer * per_block + 2 * c


def training_memory(
    config: GPTConfig, *, micro_batch_size: int, sequence_length: int, dtype: torch.dtype
) -> TrainingMemory:
    """Memory of training with AdamW, float32 weights and autocast to `dtype`, without compilation.

    Counted are the tensors that autograd keeps: for each token and block, in units of n_embd, the two norms' inputs in
    float32, the inputs of the four matmuls, q, k, v and GELU's input; the lowered copies of the matrices; and for each
    token what the loss holds at its peak: three numbers in float32 for each of the vocabulary.
    """
    count, width, tokens = parameter_count(config), dtype.itemsize, micro_batch_size * sequence_length
    mixed = dtype != torch.float32
    per_block = 2 * 4 + width * (2 + 1 + 3 + 4 + 4)
    lowered = width * 12 * config.n_layer * config.n_embd**2 + width * config.vocab_size * config.n_embd
    return TrainingMemory(
        weights=4 * count + (lowered if mixed else 0),
        gradients=4 * count,
        moments=8 * count,
        activations=tokens * config.n_layer * config.n_embd * per_block,
        logits=tokens * config.vocab_size * 3 * 4,
    )


def require_fit(config: GPTConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: where the GPU cannot hold the weights, gradients and moments, whatever the micro-batch.
    """
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    needed = training_memory(config, micro_batch_size=1, sequence_length=1, dtype=torch.float32)
    if needed.fixed > there:
        raise ValueError(
            f"{gib(needed.weights)} of weights, {gib(needed.gradients)} of gradients and {gib(needed.moments)} of "
            f"moments are {gib(needed.fixed)}, and {torch.cuda.get_device_name(device)} has {gib(there)}: "
            "train a smaller --model"
        )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def choose_micro_batch(
    config: GPTConfig, precision: Precision, context: DistContext, *, sequences_per_step: int, sequence_length: int
) -> int:
    """The largest power of two of sequences that fits on every rank and divides its share of a step; collective.

    On CUDA it is tried out, with room for the optimizer's moments; elsewhere it is reckoned from the free memory.
    No random number is drawn and no data is read.

    Raises:
        ValueError: where not one sequence fits, or the ranks do not divide a step.
    """
    share, rest = divmod(sequences_per_step, context.world_size)
    if rest:
        raise ValueError(f"{sequences_per_step} sequences a step do not divide by {context.world_size} ranks")
    candidates = [1 << n for n in range(share.bit_length()) if share % (1 << n) == 0]
    if context.device.type == "cuda":
        fits = trial_on_gpu(config, precision, context.device, sequence_length)
    else:
        fits = reckoning(config, precision, context.local_world_size, sequence_length)
    return largest_fitting(candidates, fits, context)


def largest_fitting(candidates: list[int], fits: Callable[[int], bool], context: DistContext) -> int:
    """The last of the rising `candidates` before the first that does not fit on some rank; collective."""
    best = 0
    for candidate in candidates:
        if context.any(not fits(candidate)):
            break
        best = candidate
    if not best:
        raise ValueError("not one sequence fits in memory: train a smaller --model or shorten --sequence-length")
    return best


def reckoning(config: GPTConfig, precision: Precision, ranks_here: int, sequence_length: int) -> Callable[[int], bool]:
    """Whether a micro-batch fits into this rank's share of the main memory that is free now."""
    free = USABLE * psutil.virtual_memory().available / ranks_here

    def fits(micro_batch_size: int) -> bool:
        needed = training_memory(
            config, micro_batch_size=micro_batch_size, sequence_length=sequence_length, dtype=precision.dtype
        )
        return needed.total < free

    return fits


def trial_on_gpu(
    config: GPTConfig, precision: Precision, device: torch.device, sequence_length: int
) -> Callable[[int], bool]:
    """Whether a forward and backward pass of a model like this one succeeds beside the optimizer's moments."""
    model = GPT(config).to(device).eval()  # in eval mode dropout draws no random numbers
    moments = torch.empty(2 * parameter_count(config), device=device)

    def fits(micro_batch_size: int) -> bool:
        ids = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64, device=device)
        try:
            with precision.autocast():
                loss = model(ids, ids)
            loss.backward()
            reserved = torch.cuda.max_memory_reserved(device)
            return reserved < USABLE * torch.cuda.get_device_properties(device).total_memory
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    fits.moments = moments  # type: ignore[attr-defined]  # as long as the trial lives, so do they
    return fits
