"""First phase of the start: every choice is made and every mistake of the user's is found; no model is made."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2_ddp.build.beginning import find_start, find_weights
from gpt2_ddp.build.boards import open_boards
from gpt2_ddp.build.by_manifest import settle_validation, settle_vocabulary
from gpt2_ddp.build.compiling import compiles
from gpt2_ddp.build.evaluations import Yardsticks, find_yardsticks, make_evaluations
from gpt2_ddp.build.micro_batch import settle_micro_batch
from gpt2_ddp.build.resume import saved_dtype, settle_resume
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.mixture import open_mixture
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.sources import read_manifests, said_of_mixture
from gpt2_ddp.data.windows import Windows, require_one_step
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.drift import require_same_data
from gpt2_ddp.distributed.reduction import require_same_numerics, require_tree, use_deterministic_kernels
from gpt2_ddp.evaluation.interface import Evaluation
from gpt2_ddp.metrics.boards import Aside
from gpt2_ddp.system.hardware import Hardware, found_hardware
from gpt2_ddp.system.precision import DTYPES, Precision, allow_tf32, choose_dtype
from gpt2_ddp.system.speed import measure_speed


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The data of a run, checked. `fingerprint` tells the training tokens from any others."""

    train: Windows
    evaluations: tuple[Evaluation, ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a run will be. `config` has no `auto` left but `--compile`, which `compiled` answers; `said` are lines for
    the person who watches, see `telling`."""

    config: TrainConfig
    hardware: Hardware
    precision: Precision
    compiled: bool
    plan: BatchPlan
    sources: Sources
    found: Found
    weights: Path | None
    """Where --init-from lies on rank 0's disk, for a run that begins with it."""
    boards: list[Aside]
    numerics: dict[str, object] | None
    said: list[str]


def settle(config: TrainConfig, context: DistContext, held: ExitStack) -> Settled:
    """Decide what `config` leaves open and check the rest; `held` keeps the run directory. Collective.

    Raises:
        UserError: with the same outcome on every rank, for flags that do not fit the machine, the data, the run that is
            there, or each other; for data or weights that are missing or broken; for a directory that another trainer
            uses, a disk without room, a board that does not answer.
    """
    hardware = found_hardware(context.device)
    manifests = context.run_on_main(lambda: read_manifests(config.data_dir))
    config = settle_vocabulary(replace(config, resume=context.run_on_main(lambda: settle_resume(config))), manifests)
    config, said_of_validation = settle_validation(config, manifests)
    dtype, said_of_dtype = settle_dtype(config, context, hardware)
    precision = Precision.of(dtype, context.device)
    if config.reproducible:
        use_deterministic_kernels(context.device)  # before a micro-batch is tried out: cuBLAS looks once
    allow_tf32()  # before a micro-batch is tried out: what is compiled depends on it
    compiled = not context.any(not compiles(config, hardware))  # on GPUs of two kinds
    config = settle_micro_batch(config, context, precision, compiled=compiled)
    plan = context.run_on_all(lambda: plan_batches(config, context.world_size))
    yardsticks = context.run_on_main(lambda: find_yardsticks(config))
    sources = share_sources(config, context, plan, yardsticks)
    found = context.run_on_main(lambda: find_start(config, sources.fingerprint, held))
    weights = context.run_on_main(lambda: find_weights(config, found))
    boards = context.run_on_all(lambda: open_boards(config, context, found.state.get("step", 0)))
    numerics = bits_depend_on(config, plan, hardware, dtype, compiled=compiled) if config.reproducible else None
    if numerics is not None:
        require_numerics(numerics, context, plan, found)
    return Settled(
        config=config,
        hardware=hardware,
        precision=precision,
        compiled=compiled,
        plan=plan,
        sources=sources,
        found=found,
        weights=weights,
        boards=boards,
        numerics=numerics,
        said=[*said_of_mixture(config.data_dir), *found.said, *said_of_validation, *yardsticks.said, *said_of_dtype],
    )


def settle_dtype(config: TrainConfig, context: DistContext, hardware: Hardware) -> tuple[torch.dtype, list[str]]:
    """The dtype of the matmuls, and lines that say why: by hand, else as the run began, else by `auto`; collective.

    A CPU is measured on rank 0 while the others wait. Every start of a run on the same kind of device computes alike.
    """
    began = context.run_on_main(lambda: saved_dtype(config, hardware.device_type))
    said = []
    if config.dtype != "auto" and began not in (None, config.dtype):
        said.append(f"dtype: {config.dtype} by --dtype; the run had {began}")
    elif config.dtype == "auto" and began:
        said.append(f"dtype: {began}, as at the start before; --dtype changes it")
    requested = began if began and config.dtype == "auto" else config.dtype
    speed = context.run_on_main(lambda: measure_speed(requested, hardware, config.shape.n_embd))
    dtype, note = choose_dtype(requested, hardware, speed)
    newest_first = list(DTYPES.values())
    dtype = newest_first[context.max(newest_first.index(dtype))]  # of GPUs of two kinds what both have
    return dtype, [*said, *([note] if note else [])]


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """The `BatchPlan` of `config` on `world_size` ranks."""
    assert config.micro_batch_size != "auto"  # settled before
    return BatchPlan(
        micro_batch_size=config.micro_batch_size,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=world_size,
    )


def share_sources(config: TrainConfig, context: DistContext, plan: BatchPlan, yardsticks: Yardsticks) -> Sources:
    """The data of the run, the same on every rank; collective.

    Raises:
        UserError: for what is missing, broken, too little, or another one on some rank.
    """
    sources = context.run_on_all(lambda: open_sources(config, plan, yardsticks))
    require_same_data(context, sources.fingerprint)
    return sources


def open_sources(config: TrainConfig, plan: BatchPlan, yardsticks: Yardsticks) -> Sources:
    """Find and check the data that the configuration asks for, of training and of evaluations.

    Raises:
        UserError: for what is missing, broken or too little.
    """
    if isinstance(config.data_dir, Path):
        train = Windows(find_shards(config.data_dir, "train"), config.sequence_length)
        require_one_step(train, plan)
    else:
        train = open_mixture(config.data_dir, plan)
    evaluations = tuple(make_evaluations(config, plan, train, yardsticks))
    return Sources(train=train, evaluations=evaluations, fingerprint=train.fingerprint())


def bits_depend_on(
    config: TrainConfig, plan: BatchPlan, hardware: Hardware, dtype: torch.dtype, *, compiled: bool
) -> dict[str, object]:
    """What bits depend on beside the flags that must not change within a run, as a checkpoint tells it."""
    return {
        "device": hardware.name,
        "dtype": str(dtype),
        "compile": compiled,
        "torch": torch.__version__,
        "micro_batch_size": plan.micro_batch_size,
        "activation_checkpointing": config.activation_checkpointing,
    }


def require_numerics(numerics: dict[str, object], context: DistContext, plan: BatchPlan, found: Found) -> None:
    """Check what bits depend on against every rank and the resumed run; collective.

    Raises:
        UserError: where it differs, or the micro-batches and ranks make no full binary tree.
    """
    saved = (found.state.get("numerics") or {}) if found.path else None
    require_same_numerics(context.gather(numerics), saved)
    require_tree(plan.grad_accum_steps * context.world_size, context.world_size)
