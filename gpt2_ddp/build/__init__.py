"""The parts of a run, put together: from a `TrainConfig` to a `Run` at the step where training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from gpt2_ddp.build.compute import choose_numerics, make_reduction, start_model, trainable
from gpt2_ddp.build.micro_batch import settle_micro_batch
from gpt2_ddp.checkpoint import resume
from gpt2_ddp.checkpoint.writer import CheckpointWriter
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import (
    BatchPlan,
    TrainData,
    ValidationData,
    Windows,
    fingerprint,
    require_one_step,
)
from gpt2_ddp.data.shards import find_shards, read_manifest
from gpt2_ddp.data.tokenizer import tokenizer_files
from gpt2_ddp.distributed.context import DistContext, release
from gpt2_ddp.distributed.drift import require_same_data
from gpt2_ddp.distributed.reduction import use_deterministic_kernels
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.distributed.watchdog import Watchdog
from gpt2_ddp.evaluation.hellaswag import read_examples
from gpt2_ddp.metrics.boards import Aside, TensorBoard, WeightsAndBiases
from gpt2_ddp.metrics.log import FileLog, NullLog, RunLog
from gpt2_ddp.model.gpt import model_config
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.optim import optimizer as optim
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.run import Run, Sources
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import sole_use
from gpt2_ddp.system.hardware import Hardware, found_hardware
from gpt2_ddp.system.precision import Precision, allow_tf32, choose_dtype, measure_speed

CHECKPOINT_BYTES = 12
"""Of each parameter: itself and AdamW's two moments in float32."""
ENDING_SECONDS = 10.0
"""A trainer that is just ending, or notices that its torchrun is gone, needs a moment to leave the run directory."""


def build_run(config: TrainConfig, context: DistContext, stop: StopRequest, held: ExitStack) -> Run:
    """Check what a user can have got wrong, then build the run, whose directory and DDP `held` lets go; collective.

    Raises:
        UserError: for the user's mistakes, with the same outcome on every rank.
    """
    hardware = found_hardware(context.device)
    dtype, said_of_dtype = settle_dtype(config, context, hardware)
    precision = Precision.of(dtype, context.device)
    if config.reproducible:
        use_deterministic_kernels(context.device)  # before a micro-batch is tried out: cuBLAS looks once
    config = settle_micro_batch(config, context, precision, hardware)
    config, told = settle_validation(config, context)
    plan = context.run_on_all(lambda: plan_batches(config, context.world_size))
    sources = share_sources(config, context, plan)
    found = context.run_on_main(lambda: find_start(config, sources.fingerprint, held))
    boards = context.run_on_all(lambda: open_boards(config, context, found.state.get("step", 0)))
    allow_tf32()
    numerics = choose_numerics(config, context, plan, hardware, dtype, found) if config.reproducible else None
    model, optimizer = start_model(config, context, found)
    skips = optim.SkipCount(found.state.get("skipped", 0), context.device, found.state.get("skipped_in_a_row", 0))
    state = resume.restore(found, context, model, optimizer, precision.scaler)
    train_model = trainable(config, context, plan, hardware, precision, model)
    held.callback(release, train_model)
    guard = SpikeGuard(config.spike_guard, config.spike_limit, found.state.get("spike_guard"))
    log = context.run_on_all(
        lambda: open_log(config, context, state.step, boards, [*found.said, *told, *said_of_dtype])
    )
    return Run(
        config=config,
        context=context,
        hardware=hardware,
        precision=precision,
        numerics=numerics,
        plan=plan,
        model=model,
        train_model=train_model,
        reduction=make_reduction(train_model, context, plan, reproducible=config.reproducible),
        optimizer=optimizer,
        skips=skips,
        guard=guard,
        data=open_data(config, context, plan, sources.train, first_step=state.step + guard.passed_over + 1),
        sources=sources,
        log=log,
        writer=open_writer(config, context),
        stop=stop,
        watchdog=Watchdog(context, config.timeout, asked=stop.asked, note_end=stop.end),
        state=state,
        tokenizer=tokenizer_files() if context.is_main else {},
    )


def settle_dtype(config: TrainConfig, context: DistContext, hardware: Hardware) -> tuple[torch.dtype, list[str]]:
    """The dtype of the matmuls, and lines that say why: by hand, else as the run began, else by `auto`; collective.

    A CPU is measured on rank 0 while the others wait. Every start of a run on the same kind of device computes alike.
    """
    began = context.run_on_main(lambda: resume.saved_dtype(config, hardware.device_type))
    said = []
    if config.dtype != "auto" and began not in (None, config.dtype):
        said.append(f"dtype: {config.dtype} by --dtype; the run had {began}")
    elif config.dtype == "auto" and began:
        said.append(f"dtype: {began}, as at the start before; --dtype changes it")
    requested = began if began and config.dtype == "auto" else config.dtype
    width = model_config(config.model).n_embd
    speed = context.run_on_main(lambda: measure_speed(requested, hardware, width))
    dtype, note = choose_dtype(requested, hardware, speed)
    return dtype, [*said, *([note] if note else [])]


def hold_directory(out_dir: Path, held: ExitStack) -> None:
    """Make the run directory and keep other trainers out of it.

    Raises:
        UserError: where another one is at work there.
    """
    (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    refusal = f"{out_dir} is in use by another trainer: end it, or choose another --out-dir"
    held.enter_context(sole_use(out_dir, refusal, patience=ENDING_SECONDS))


def settle_validation(config: TrainConfig, context: DistContext) -> tuple[TrainConfig, list[str]]:
    """Without validation where rank 0's data were prepared so, and `--val-every` is the default; collective."""
    manifest = context.run_on_main(lambda: read_manifest(config.data_dir))
    if manifest is None or manifest.documents["val"] or config.val_every != TrainConfig.val_every:
        return config, []
    return replace(config, val_every=0), [f"{config.data_dir} has no validation split: training without validation"]


def find_start(config: TrainConfig, data_fingerprint: str, held: ExitStack) -> resume.Resume:
    """What the run goes on from, its directory held; where it begins anew, the disk is large enough for it.

    Raises:
        UserError: as `hold_directory`, `resume.find_resume` and `require_room`.
    """
    hold_directory(config.out_dir, held)
    found = resume.find_resume(config, data_fingerprint)
    if found.path is None:
        require_room(config)
    return found


def require_room(config: TrainConfig) -> None:
    """
    Raises:
        UserError: where not even one checkpoint fits on the disk of the run directory.
    """
    needed = CHECKPOINT_BYTES * parameter_count(model_config(config.model))
    disk = shutil.disk_usage(config.out_dir)
    if disk.total and disk.free < needed:  # some file systems do not tell, and answer zeros
        raise UserError(
            f"{config.out_dir}: no space for a checkpoint of {config.model}, which takes {needed >> 20} MiB; "
            f"{disk.free >> 20} MiB are free: make room, or choose another --out-dir"
        )


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """The `BatchPlan` of `config` on `world_size` ranks."""
    assert config.micro_batch_size != "auto"  # settled before
    return BatchPlan(
        micro_batch_size=config.micro_batch_size,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=world_size,
    )


def share_sources(config: TrainConfig, context: DistContext, plan: BatchPlan) -> Sources:
    """The data of the run, the same on every rank; collective.

    Raises:
        UserError: for what is missing, broken, too little, or another one on some rank.
    """
    sources = context.run_on_all(lambda: open_sources(config, plan))
    require_same_data(context, sources.fingerprint)
    return sources


def open_sources(config: TrainConfig, plan: BatchPlan) -> Sources:
    """Find and check the training, validation and HellaSwag data that the configuration asks for.

    Raises:
        UserError: for what is missing, broken or too little.
    """
    train_shards = find_shards(config.data_dir, "train")
    train = Windows(train_shards, config.sequence_length)
    require_one_step(train, plan)
    validation = None
    if config.val_every:
        windows = Windows(find_shards(config.data_dir, "val"), config.sequence_length)
        if not len(windows):
            raise UserError(
                f"the validation shards in {config.data_dir} hold no window of {config.sequence_length} tokens: "
                "prepare more, or switch validation off with --val-every 0"
            )
        validation = ValidationData(
            windows=windows, val_tokens=config.val_tokens, micro_batch_size=plan.micro_batch_size
        )
    hellaswag = tuple(read_examples(config.hellaswag_data)) if config.hellaswag_every else ()
    return Sources(train=train, validation=validation, hellaswag=hellaswag, fingerprint=fingerprint(train_shards))


def open_data(
    config: TrainConfig, context: DistContext, plan: BatchPlan, windows: Windows, *, first_step: int
) -> TrainData:
    """This rank's batches from `first_step` on."""
    return TrainData(windows, plan, rank=context.rank, seed=config.seed, device=context.device, first_step=first_step)


def open_writer(config: TrainConfig, context: DistContext) -> CheckpointWriter:
    """The run's checkpoints, written by rank 0."""
    directory = config.out_dir / "checkpoints"
    return CheckpointWriter(
        directory, keep=config.keep_checkpoints, enabled=context.is_main, patience=config.timeout / 2
    )


def open_boards(config: TrainConfig, context: DistContext, step: int) -> list[Aside]:
    """The boards that rank 0 was asked to show the run on.

    Raises:
        UserError: where one cannot be opened.
    """
    boards: list[Aside] = []
    if config.tensorboard and context.is_main:
        mend = "its folder in --out-dir must be one that can be written"
        boards.append(Aside("--tensorboard", lambda: TensorBoard(config.out_dir, resumed_step=step), mend))
    if config.wandb and context.is_main:
        mend = "set WANDB_API_KEY, or log in by `wandb login`, or set WANDB_MODE=offline"
        boards.append(Aside("--wandb", lambda: WeightsAndBiases(config.out_dir), mend))
    return boards


def open_log(
    config: TrainConfig, context: DistContext, step: int, boards: Sequence[Aside], said: Sequence[str]
) -> RunLog:
    """The run's log on rank 0, which begins with the lines `said`; a silent one elsewhere."""
    if not context.is_main:
        return NullLog()
    log = FileLog(config.out_dir, resumed_step=step, boards=boards)
    for line in said:
        log.say(line)
    return log
