"""Third phase of the start: the threads and files of a run."""

from __future__ import annotations

from gpt2_ddp.build.evaluations import told_of_spikes
from gpt2_ddp.build.making import Made
from gpt2_ddp.build.prolonging import put_aside
from gpt2_ddp.build.rules import learning_rates
from gpt2_ddp.build.settling import Settled
from gpt2_ddp.build.telling import start_lines
from gpt2_ddp.checkpoint.writer import CheckpointWriter
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import TrainData
from gpt2_ddp.data.tokenizer import saved_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.distributed.watchdog import Watchdog
from gpt2_ddp.metrics.log import NullLog, RunLog
from gpt2_ddp.metrics.profiling import StepProfiler
from gpt2_ddp.metrics.progress import ProgressLog, RemainingTime
from gpt2_ddp.run import Run


def open_run(settled: Settled, made: Made, context: DistContext, stop: StopRequest) -> Run:
    """Open the log, the data and the writer, and put the run together. Collective.

    Raises:
        UserError: where the tokenizer of the data is not there, on every rank.
        OSError: where the disk refuses the log, on every rank.
    """
    config, state = settled.config, made.state
    tokenizer = context.run_on_all(lambda: saved_tokenizer(config.data_dir) if context.is_main else None)
    log = context.run_on_all(lambda: open_log(settled, made, context))  # last of what may be refused
    return Run(
        config=config,
        context=context,
        hardware=settled.hardware,
        precision=settled.precision,
        numerics=settled.numerics,
        plan=settled.plan,
        model=made.model,
        train_model=made.train_model,
        reduction=made.reduction,
        optimizer=made.optimizer,
        schedule=learning_rates(config),
        data=open_data(settled, context, first_step=state.step + state.guard.passed_over + 1),
        data_fingerprint=settled.sources.fingerprint,
        evaluations=told_of_spikes(settled.sources.evaluations, state.guard),
        log=log,
        profiler=StepProfiler(
            config.profiled_steps, config.out_dir / "profile", rank=context.rank, device=context.device
        ),
        writer=open_writer(config, context),
        stop=stop,
        watchdog=Watchdog(context, config.timeout, asked=stop.asked, note_end=stop.end),
        state=state,
        tokenizer=tokenizer,
    )


def open_data(settled: Settled, context: DistContext, *, first_step: int) -> TrainData:
    """This rank's batches from `first_step` on."""
    return TrainData(
        settled.sources.train,
        settled.plan,
        rank=context.rank,
        seed=settled.config.seed,
        device=context.device,
        first_step=first_step,
    )


def open_writer(config: TrainConfig, context: DistContext) -> CheckpointWriter:
    """The run's checkpoints, written by rank 0."""
    return CheckpointWriter(
        config.out_dir / "checkpoints",
        keep=config.keep_checkpoints,
        beside=learning_rates(config).branch_step,
        enabled=context.is_main,
        patience=config.timeout / 2,
    )


def open_log(settled: Settled, made: Made, context: DistContext) -> RunLog:
    """The run's log on rank 0, which begins with what was said so far and what runs where; a silent one elsewhere."""
    if not context.is_main:
        return NullLog()
    put_aside(settled.config.out_dir, settled.found)
    config, every = settled.config, {evaluation.name: evaluation.every for evaluation in settled.sources.evaluations}
    remaining = RemainingTime(config.max_steps, every | {"checkpoint": config.checkpoint_every})
    log = ProgressLog(config.out_dir, resumed_step=made.state.step, boards=settled.boards, remaining=remaining)
    for line in start_lines(settled, made, context):
        log.say(line)
    return log
