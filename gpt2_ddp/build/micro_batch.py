"""The largest micro-batch that fits into what memory there is, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch

from gpt2_ddp.build.compiling import warm_up
from gpt2_ddp.build.resume import saved_micro_batch
from gpt2_ddp.build.rules import optimizer_rule
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.compilation import CompiledGPT
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.memory import USABLE, TrainingMemory, fits_into, gib, training_memory
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim.rule import OptimizerRule
from gpt2_ddp.optim.updates import zero_gradients
from gpt2_ddp.system.control_groups import available_memory
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.precision import Precision


def settle_micro_batch(
    config: TrainConfig, context: DistContext, precision: Precision, *, compiled: bool
) -> TrainConfig:
    """`config` with a number for `--micro-batch-size auto`: the one that the run in --out-dir has, or one that fits."""
    rule = optimizer_rule(config)
    shape = config.shape
    context.run_on_all(lambda: require_fit(shape, rule.state_bytes(shape), context.device))
    if config.micro_batch_size != "auto":
        return config
    size = context.run_on_main(lambda: saved_micro_batch(config, context.world_size))
    return replace(
        config,
        micro_batch_size=size
        or choose_micro_batch(
            shape,
            precision,
            context,
            rule,
            sequences_per_step=config.total_batch_size // config.sequence_length,
            sequence_length=config.sequence_length,
            compiled=compiled,
            activation_checkpointing=config.activation_checkpointing,
            reproducible=config.reproducible,
        ),
    )


def require_fit(config: GPTConfig, state_bytes: int, device: torch.device) -> None:
    """
    Raises:
        UserError: where the GPU cannot hold the weights, gradients and moments, whatever the micro-batch.
    """
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    needed = training_memory(
        config,
        micro_batch_size=1,
        sequence_length=1,
        dtype=torch.float32,
        device_type="cuda",
        state_bytes=state_bytes,
    )
    if needed.fixed > there:
        raise UserError(
            f"{gib(needed.weights)} of weights, {gib(needed.gradients)} of gradients and {gib(needed.moments)} of "
            f"moments are {gib(needed.fixed)}, and {torch.cuda.get_device_name(device)} has {gib(there)}: "
            "train a smaller --model"
        )


def choose_micro_batch(
    config: GPTConfig,
    precision: Precision,
    context: DistContext,
    rule: OptimizerRule,
    *,
    sequences_per_step: int,
    sequence_length: int,
    compiled: bool = False,
    activation_checkpointing: bool = False,
    reproducible: bool = False,
) -> int:
    """The largest power of two of sequences that fits on every rank and divides its share of a step; collective.

    It is reckoned from the memory that is free and, on CUDA, tried out by what will be trained. No random number is
    drawn and no data is read.

    Raises:
        UserError: where not one sequence fits, or the ranks do not divide a step.
    """
    candidates = micro_batches(sequences_per_step, context.world_size)
    free, device_memory = find_memory(context)
    way: dict[str, Any] = {"compiled": compiled, "activation_checkpointing": activation_checkpointing}
    way["sequence_length"] = sequence_length

    def beside(size: int) -> int:
        return partial_sums(config, sequences_per_step // (size * context.world_size)) if reproducible else 0

    def reckon(*, micro_batch_size: int) -> TrainingMemory:
        return training_memory(
            config,
            micro_batch_size=micro_batch_size,
            dtype=precision.dtype,
            device_type=precision.device_type,
            state_bytes=rule.state_bytes(config) + beside(micro_batch_size),
            device_memory=device_memory,
            **way,
        )

    size = largest_fitting(candidates, fits_into(free, precision.device_type, reckon), context)
    if context.device.type == "cuda":
        make_trial = partial(Trial, config, precision, context, rule, beside=beside, **way)
        trial = context.run_on_all(make_trial)  # a GPU may be held by another process
        most = size or (candidates[-1] if reproducible else 1)  # of which the smallest holds the most sums
        smaller = [candidate for candidate in reversed(candidates) if candidate <= most]
        size = first_running(smaller, trial.runs, context)
    if not size:
        raise UserError("not one sequence fits in memory: try --activation-checkpointing, or a smaller --model")
    return size


def partial_sums(config: GPTConfig, micro_steps: int) -> int:
    """Bytes of gradients that `TreeReduction` holds in the last of the micro-steps: one sum a level of its tree."""
    return 4 * parameter_count(config) * (micro_steps.bit_length() - 1)


def micro_batches(sequences_per_step: int, world_size: int) -> list[int]:
    """The powers of two that divide a rank's share of a step, rising.

    Raises:
        UserError: where the ranks do not divide a step.
    """
    share, rest = divmod(sequences_per_step, world_size)
    if rest or not share:
        told = f"{sequences_per_step} sequences a step do not divide by {world_size} ranks"
        nearest = max(1, share) * world_size
        raise UserError(
            f"{told}: choose --total-batch-size as a multiple of --sequence-length times the ranks, such as "
            f"that of {nearest} sequences"
        )
    return [1 << n for n in range(share.bit_length()) if share % (1 << n) == 0]


def find_memory(context: DistContext) -> tuple[int, int]:
    """Bytes of memory that are free for this rank, and that its device has."""
    if context.device.type == "cuda":
        return torch.cuda.mem_get_info(context.device)
    return available_memory() // context.local_world_size, psutil.virtual_memory().total


def largest_fitting(candidates: Sequence[int], fits: Callable[[int], bool], context: DistContext) -> int:
    """The largest of the `candidates` that fits on every rank, else 0; collective.

    All are asked: a smaller one has more micro-steps, and may need more for their sums.
    """
    return max((candidate for candidate in candidates if not context.any(not fits(candidate))), default=0)


def first_running(candidates: Sequence[int], runs: Callable[[int], bool], context: DistContext) -> int:
    """The first of the falling `candidates` that runs on every rank, else 0; collective."""
    return next((candidate for candidate in candidates if not context.any(not runs(candidate))), 0)


class Trial:
    """Tries micro-batches out on a GPU: a forward and backward pass beside weights, gradients and moments.

    Of what will be trained, but for DDP, whose buckets hold the gradients and need as much.
    """

    def __init__(
        self,
        config: GPTConfig,
        precision: Precision,
        context: DistContext,
        rule: OptimizerRule,
        *,
        sequence_length: int,
        compiled: bool,
        activation_checkpointing: bool,
        beside: Callable[[int], int] = lambda _: 0,
    ) -> None:
        """`beside` is how many bytes more are held at a micro-batch."""
        self._beside = beside
        self._precision, self._device = precision, context.device
        self._length, self._compiled = sequence_length, compiled
        self._model = GPT(config).to(context.device)
        self._model.activation_checkpointing = activation_checkpointing
        self._optimizer = rule.make(self._model, context, precision.dtype)
        zero_gradients(self._model.parameters(), in_place=True)

    def runs(self, size: int) -> bool:
        """Whether `size` sequences fit. No peak of memory is left behind, and the random numbers are as they were."""
        plan = BatchPlan(
            micro_batch_size=size, sequence_length=self._length, total_batch_size=size * self._length, world_size=1
        )
        held = None
        try:
            held = torch.empty(self._beside(size), dtype=torch.uint8, device=self._device)
            with torch.random.fork_rng([self._device]):
                self._run(plan)
            there = torch.cuda.get_device_properties(self._device).total_memory
            return torch.cuda.max_memory_reserved(self._device) < USABLE["cuda"] * there
        except torch.OutOfMemoryError:
            return False
        finally:
            del held
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _run(self, plan: BatchPlan) -> None:
        if self._compiled:
            try:
                warm_up(CompiledGPT(self._model), plan, self._precision, self._device)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a compiler that fails is told when training compiles, and goes on without it
                self._compiled = False
        warm_up(self._model, plan, self._precision, self._device)
