"""What a run does beside its steps: note its start, log, evaluate, save."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2_ddp.checkpoint.state import checkpoint_files
from gpt2_ddp.data.mixture import Mixture
from gpt2_ddp.data.sources import data_source
from gpt2_ddp.evaluation.interface import Evaluation
from gpt2_ddp.metrics.log import StepMetrics, memory_mb
from gpt2_ddp.metrics.timer import StepTimer
from gpt2_ddp.run import Run
from gpt2_ddp.system.checkout import commit_and_diff
from gpt2_ddp.system.files import TIME_FORMAT, read_json, replace_file
from gpt2_ddp.system.hardware import peak_flops


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed, 0-dim on the device: reading it waits for the device."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


def note_start(run: Run) -> None:
    """Write config.json on rank 0: the configuration, the data, and the versions and hardware of each start; and beside
    it how the program differs from its commit, if it does.
    """
    if not run.context.is_main:
        return
    file = run.config.out_dir / "config.json"
    starts = read_json(file).get("starts", []) if file.exists() else []
    commit, diff = commit_and_diff(Path(__file__))
    if diff:
        replace_file(run.config.out_dir / f"uncommitted_{run.state.step}.diff", diff)
    start = {
        "time": time.strftime(TIME_FORMAT),
        "step": run.state.step,
        "argv": sys.argv,
        "host": socket.gethostname(),
        "world_size": run.context.world_size,
        "device": str(run.context.device),
        "device_name": run.hardware.name,
        "dtype": str(run.precision.dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }
    data = {"data_source": data_source(run.config.data_dir), "data_fingerprint": run.data_fingerprint}
    values = {"config": run.config.to_json(), **data, "starts": [*starts, start]}
    replace_file(file, json.dumps(values, indent=2) + "\n")


def is_due(run: Run, *every: int) -> bool:
    """Whether any of what is done every so many steps, 0 for never, is due after this one. The last is always."""
    last = run.state.step == run.config.max_steps
    return any(count > 0 and (run.state.step % count == 0 or last) for count in every)


def log_step(run: Run, result: StepResult, timer: StepTimer) -> None:
    """Log the step just done. The only place where a training step waits for the device."""
    config, state, cuda = run.config, run.state, run.context.device.type == "cuda"
    waited, steps = run.data.waited()
    seconds = timer.restart() / steps
    tokens_per_sec = config.total_batch_size / seconds
    peak = peak_flops(run.hardware, run.precision.dtype)
    flops = tokens_per_sec * run.model.config.flops_per_token(config.sequence_length)
    run.log.train(
        StepMetrics(
            step=state.step,
            loss=float(result.loss),
            lr=result.lr,
            grad_norm=float(result.grad_norm),
            step_ms=round(seconds * 1000, 3),
            data_wait_ms=round(waited / steps * 1000, 3),
            tokens_per_sec=round(tokens_per_sec, 2),
            mfu=round(flops / (peak * run.context.world_size), 4) if peak else None,
            tokens_seen=state.tokens_seen,
            data_hash=state.data_hash,
            memory_mb=memory_mb(torch.cuda.max_memory_allocated() if cuda else None),
            skipped=state.skips.total(),
        )
    )
    if state.skips.longest() > config.skip_limit:
        raise RuntimeError(
            f"step {state.step}: {state.skips.longest()} steps in a row had a loss or gradient that is not finite "
            f"(--skip-limit {config.skip_limit}); lower --max-lr, or look at the data"
        )


def evaluations_due(run: Run) -> list[Evaluation]:
    """What is to be asked of the model after this step."""
    return [evaluation for evaluation in run.evaluations if is_due(run, evaluation.every)]


def evaluate(run: Run, evaluations: Iterable[Evaluation]) -> None:
    """Ask the raw model, one evaluation after the other, and log what they find and how long it took; collective."""
    for evaluation in evaluations:
        start = time.perf_counter()
        found = evaluation.run(run.model, run.context, run.precision.autocast(), step=run.state.step)
        if found is not None:
            seconds = round(time.perf_counter() - start, 4)
            run.log.say(found.line)
            run.log.event(evaluation.name, step=run.state.step, **found.values, seconds=seconds)


def save(run: Run, *, final: bool = False) -> None:
    """Start to save; the files are made on the one rank that writes them. From the `final` save on no rank waits."""
    if final:
        run.watchdog.dismiss()
    if isinstance(windows := run.data.windows, Mixture):
        sequences = (run.state.step + run.state.guard.passed_over) * run.plan.sequences_per_step
        run.log.event("sources", step=run.state.step, sources=windows.given(sequences, seed=run.config.seed))
    run.log.flush()  # before the checkpoint is there from which a run goes on after these lines
    facts = {
        "numerics": run.numerics,
        "batch": asdict(run.plan),
        "data_fingerprint": run.data_fingerprint,
        "config": run.config.to_json(),
    }
    run.writer.save(
        run.state.step,
        lambda: checkpoint_files(run.state, run.model, run.optimizer, facts=facts, tokenizer=run.tokenizer),
        final=final,
    )


def report_saves(run: Run, *, wait: bool = False) -> None:
    """Tell how the saves that ended went."""
    for report in run.writer.reports(wait=wait):
        if report.error is None:
            run.log.event(
                "checkpoint",
                step=report.step,
                seconds=round(report.seconds, 4),
                blocked_seconds=round(report.blocked_seconds, 4),
                bytes=report.bytes,
            )
        else:
            run.log.say(f"step {report.step} | could not save: {report.error}; the older checkpoints are untouched")
