"""Train a GPT-2: build the parts, then the loop.

python -m gpt2_ddp.train --help
torchrun --nproc_per_node=8 -m gpt2_ddp.train --model gpt2
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from gpt2_ddp.build import build_run
from gpt2_ddp.build.config_file import parse_flags
from gpt2_ddp.checkpoint.files import step_name
from gpt2_ddp.checkpoint.state import newest_checkpoint, restore, weights_and_moments
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.loader import StepBatch
from gpt2_ddp.data.order import chained_hash
from gpt2_ddp.distributed.context import open_context
from gpt2_ddp.distributed.drift import require_equal_ranks
from gpt2_ddp.distributed.stopping import StopRequest
from gpt2_ddp.distributed.watchdog import leaving_with_torchrun
from gpt2_ddp.metrics.timer import StepTimer
from gpt2_ddp.optim import updates
from gpt2_ddp.periodic import (
    StepResult,
    evaluate,
    evaluations_due,
    is_due,
    log_step,
    note_start,
    report_saves,
    save,
)
from gpt2_ddp.run import Run
from gpt2_ddp.system import cli


def train(run: Run) -> str:
    """Train until the last step or until somebody asks to stop; 'finished' or 'stopped'."""
    config, state = run.config, run.state
    timer = StepTimer(run.context.device)
    stopping = False
    while state.step < config.max_steps and not stopping:
        run.profiler.before(state.step + 1, run.log.say, timer)
        with run.profiler.region("data"):
            batch = run.data.next()
        result = train_step(run, batch)
        if state.guard.sees_spike(result.loss):
            with timer.paused(due=True):
                go_back(run, result)
            continue
        state.step += 1
        state.tokens_seen += config.total_batch_size
        state.data_hash = chained_hash(state.data_hash, batch.windows)
        if is_due(run, config.log_every):
            log_step(run, result, timer)
        evaluations = evaluations_due(run)
        with timer.paused(due=bool(evaluations)):
            evaluate(run, evaluations)
            stopping = run.stop.agreed(run.context)
        last_or_branch = state.step in (config.max_steps, run.schedule.branch_step)
        saving = stopping or last_or_branch or is_due(run, config.checkpoint_every)
        comparing = config.check_ranks_every > 0 and (saving or is_due(run, config.check_ranks_every))
        with timer.paused(due=saving or comparing):
            if comparing:
                require_equal_ranks(run.context, weights_and_moments(run.model, run.optimizer))
            if saving:
                save(run, final=stopping or state.step == config.max_steps)
            report_saves(run)
        run.context.note_progress()
        run.watchdog.watch()
    return "finished" if state.step >= config.max_steps else "stopped"


def train_step(run: Run, batch: StepBatch) -> StepResult:
    """One update from the tokens of all ranks; the gradients are reduced once, in the last micro-step."""
    config, scaler = run.config, run.precision.scaler
    for micro_step, (ids, targets) in enumerate(batch.micro_batches(run.context.device), start=1):
        if config.dropout:
            torch.manual_seed(dropout_seed(run, batch.step, micro_step))
        with run.reduction.micro_step(micro_step):
            with run.profiler.region("forward"), run.precision.autocast():
                loss = run.train_model(ids, targets)
            with run.profiler.region("backward"):
                scaler.scale(loss * run.reduction.weight).backward()
        run.reduction.add(loss.detach())
        run.context.note_progress()
    with run.profiler.region("reduction"):
        mean_loss = run.reduction.finish()
    lr = run.schedule.rate(run.state.step + 1)
    updates.set_learning_rate(run.optimizer, lr)
    with run.profiler.region("update"):
        norm, skipped = updates.apply_update(
            run.optimizer,
            scaler,
            loss=mean_loss,
            grad_clip=config.grad_clip,
            zero_in_place=run.reduction.zero_in_place,
        )
    run.state.skips.add(skipped)
    return StepResult(loss=mean_loss, grad_norm=norm, lr=lr)


def dropout_seed(run: Run, step: int, micro_step: int) -> int:
    """64 bits from the run's seed and the micro-batch's place in the data: any rank, in any process, draws one mask."""
    place = run.context.rank * run.plan.grad_accum_steps + micro_step
    digest = hashlib.sha256(f"gpt2_ddp dropout {run.config.seed} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def go_back(run: Run, result: StepResult) -> None:
    """Take up the last checkpoint again and pass over the data consumed since; every rank sees the same loss."""
    state, spike_step, loss = run.state, run.state.step + 1, float(result.loss)
    while run.context.any(run.writer.is_busy(0.1)):  # it may be for longer than --timeout
        run.context.note_progress()
    report_saves(run)
    guard_at_spike = state.guard.state_dict()
    found = run.context.run_on_main(lambda: newest_checkpoint(run.writer.directory))
    restore(found, run.context, state, run.model, run.optimizer)
    state.guard.went_back(guard_at_spike, spike_step=spike_step, checkpoint_step=state.step)
    run.data.seek(state.step + state.guard.passed_over + 1)
    run.log.cut(state.step)
    run.log.say(f"step {spike_step} | loss {loss:.6f} is a spike: going back to step {state.step} and past this data")
    run.log.event("spike", step=state.step, spike_step=spike_step, loss=loss, passed_over=state.guard.passed_over)


def finish(run: Run, outcome: str) -> None:
    """Wait for the last save and say how the run ended. No rank waits for another from here on."""
    report_saves(run, wait=True)
    if run.writer.last_error:
        raise RuntimeError(f"the last checkpoint, of step {run.state.step}, is not saved: {run.writer.last_error}")
    run.stop.clear(run.context)
    run.log.event("finish" if outcome == "finished" else "stop", step=run.state.step, reason=run.stop.reason)
    run.log.status(outcome, step=run.state.step)
    where = run.writer.directory / step_name(run.state.step)
    run.log.say(f"{outcome} at step {run.state.step} of {run.config.max_steps}; checkpoint in {where}")
    branch = run.schedule.branch_step
    if outcome == "finished" and branch and (run.writer.directory / step_name(branch)).exists():
        run.log.say(f"a larger --max-steps goes on from step {branch}, before the cool-down")


def run_training(config: TrainConfig) -> int:
    """Everything between the command line and the exit status."""
    stop = StopRequest(config.out_dir)
    with leaving_with_torchrun(stop.end), open_context(config.device) as context, ExitStack() as held:
        stop.met()
        run = build_run(config, context, stop, held)
        try:
            if run.state.step >= config.max_steps:
                run.log.say(
                    f"{config.out_dir} is already at step {run.state.step} of {config.max_steps}: nothing to do"
                )
                run.log.status("finished", step=run.state.step)
                return 0
            context.run_on_all(lambda: note_start(run))
            run.log.event("start", step=run.state.step, world_size=context.world_size, dtype=str(run.precision.dtype))
            run.log.status("running", step=run.state.step)
            stop.at_end(lambda state, why: run.log.status(state, step=run.state.step, **why))
            if config.spike_guard and not (run.writer.directory / step_name(run.state.step)).exists():
                save(run)  # what a spike before the next checkpoint goes back to
            stop.started()
            outcome = train(run)
            finish(run, outcome)
            stop.at_end(None)
        except BaseException as error:
            run.log.status("failed", step=run.state.step, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            run.close()
    return 75 if outcome == "stopped" and not torch.distributed.is_torchelastic_launched() else 0


@record
def main(argv: Sequence[str] | None = None) -> int:
    return run_training(parse_flags(sys.argv[1:] if argv is None else argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    cli.run(main)
