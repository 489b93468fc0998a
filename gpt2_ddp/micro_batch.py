"""The largest micro-batch that fits into what memory there is, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from gpt2_ddp import resume
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed import DistContext
from gpt2_ddp.memory import USABLE, fits_into, gib, parameter_count, training_memory
from gpt2_ddp.model import GPT, GPTConfig, model_config
from gpt2_ddp.precision import Precision


def settle_micro_batch(config: TrainConfig, context: DistContext, precision: Precision) -> TrainConfig:
    """`config` with a number for `--micro-batch-size auto`: the one that the run in --out-dir has, or one that fits."""
    context.together(lambda: require_fit(model_config(config.model), context.device))
    if config.micro_batch_size != "auto":
        return config
    size = context.from_main(lambda: resume.saved_micro_batch(config, context.world_size))
    return replace(
        config,
        micro_batch_size=size
        or choose_micro_batch(
            model_config(config.model),
            precision,
            context,
            sequences_per_step=config.total_batch_size // config.sequence_length,
            sequence_length=config.sequence_length,
            activation_checkpointing=config.activation_checkpointing,
        ),
    )


def require_fit(config: GPTConfig, device: torch.device) -> None:
    """
    Raises:
        ValueError: where the GPU cannot hold the weights, gradients and moments, whatever the micro-batch.
    """
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    needed = training_memory(config, micro_batch_size=1, sequence_length=1, dtype=torch.float32, device_type="cuda")
    if needed.fixed > there:
        raise ValueError(
            f"{gib(needed.weights)} of weights, {gib(needed.gradients)} of gradients and {gib(needed.moments)} of "
            f"moments are {gib(needed.fixed)}, and {torch.cuda.get_device_name(device)} has {gib(there)}: "
            "train a smaller --model"
        )


def choose_micro_batch(
    config: GPTConfig,
    precision: Precision,
    context: DistContext,
    *,
    sequences_per_step: int,
    sequence_length: int,
    activation_checkpointing: bool = False,
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
        fits = trial_on_gpu(config, precision, context.device, sequence_length, activation_checkpointing)
    else:  # this rank's share of the main memory that is free now
        fits = fits_into(
            psutil.virtual_memory().available // context.local_world_size,
            config,
            sequence_length=sequence_length,
            dtype=precision.dtype,
            device_type=precision.device_type,
            activation_checkpointing=activation_checkpointing,
        )
    return largest_fitting(candidates, fits, context)


def largest_fitting(candidates: list[int], fits: Callable[[int], bool], context: DistContext) -> int:
    """The last of the rising `candidates` before the first that does not fit on some rank; collective."""
    best = 0
    for candidate in candidates:
        if context.any(not fits(candidate)):
            break
        best = candidate
    if not best:
        raise ValueError("not one sequence fits in memory: try --activation-checkpointing, or a smaller --model")
    return best


def trial_on_gpu(
    config: GPTConfig,
    precision: Precision,
    device: torch.device,
    sequence_length: int,
    activation_checkpointing: bool,
) -> Callable[[int], bool]:
    """Whether a forward and backward pass of a model like this one succeeds beside gradients and moments."""
    model = GPT(config).to(device).eval()  # in eval mode dropout draws no random numbers
    model.activation_checkpointing = activation_checkpointing
    for parameter in model.parameters():  # those of the micro-steps before are there from the start
        parameter.grad = torch.zeros_like(parameter)
    moments = torch.empty(2 * parameter_count(config), device=device)

    def fits(micro_batch_size: int) -> bool:
        ids = torch.zeros(micro_batch_size, sequence_length, dtype=torch.int64, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with precision.autocast():
                loss = model(ids, ids)
            loss.backward()
            reserved = torch.cuda.max_memory_reserved(device)
            return reserved < USABLE["cuda"] * torch.cuda.get_device_properties(device).total_memory
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    fits.moments = moments  # type: ignore[attr-defined]  # as long as the trial lives, so do they
    return fits
