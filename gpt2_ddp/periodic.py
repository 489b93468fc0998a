"""What a run does beside its steps: note its start, log, validate, score HellaSwag, sample, save."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gpt2_ddp.checkpoint.state import checkpoint_files
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.evaluation import hellaswag
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.evaluation.validation import validation_loss
from gpt2_ddp.metrics.log import StepMetrics, memory_mb
from gpt2_ddp.run import Run
from gpt2_ddp.system.files import read_json, replace_file
from gpt2_ddp.system.hardware import peak_flops

SAMPLE_PROMPT = "Language is"
SAMPLE_TOKENS = 48
SAMPLE_TOP_K = 50


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step computed, 0-dim on the device: reading it waits for the device."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


class StepTimer:
    """Seconds spent in training steps alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()

    def restart(self) -> float:
        """Seconds since the last restart, once the device has done what it was given."""
        now = self._settled()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self, *, due: bool) -> Iterator[None]:
        """Within it the clock stands still, if something that is no step is `due`; otherwise nobody waits for anything.

        The device first does what the steps gave it: their time is theirs, even if it is the pause that waits for it.
        """
        if not due:
            yield
            return
        before = self._settled()
        yield
        self._start += self._settled() - before

    def _settled(self) -> float:
        """The time at which the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def note_start(run: Run) -> None:
    """Write config.json on rank 0: the configuration, the data, and the versions and hardware of each start."""
    if not run.context.is_main:
        return
    file = run.config.out_dir / "config.json"
    starts = read_json(file).get("starts", []) if file.exists() else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": run.state.step,
        "argv": sys.argv,
        "host": socket.gethostname(),
        "world_size": run.context.world_size,
        "device": str(run.context.device),
        "device_name": run.hardware.name,
        "dtype": str(run.precision.dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    values = {"config": run.config.to_json(), "data_fingerprint": run.sources.fingerprint, "starts": [*starts, start]}
    replace_file(file, json.dumps(values, indent=2) + "\n")


def is_due(run: Run, *every: int) -> bool:
    """Whether any of what is done every so many steps, 0 for never, is due after this one. The last is always."""
    last = run.state.step == run.config.max_steps
    return any(count > 0 and (run.state.step % count == 0 or last) for count in every)


def log_step(run: Run, result: StepResult, timer: StepTimer) -> None:
    """Log the step just done. The only place where a training step waits for the device."""
    config, state, cuda = run.config, run.state, run.context.device.type == "cuda"
    steps = state.step % config.log_every or config.log_every
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
            data_wait_ms=round(run.data.waited() / steps * 1000, 3),
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


def validate(run: Run) -> None:
    data, context = run.sources.validation, run.context
    assert data is not None  # `open_sources` made it, since --val-every is not 0
    batches = data.batches(rank=context.rank, world_size=context.world_size)
    loss = validation_loss(run.model, batches, context, run.precision.autocast())
    run.log.say(f"step {run.state.step} | val loss: {loss:.6f} over {data.tokens} tokens")
    run.log.event("val", step=run.state.step, val_loss=loss, tokens=data.tokens)


def score_hellaswag(run: Run) -> None:
    result = hellaswag.evaluate(
        run.model,
        run.sources.hellaswag,
        protocol=run.config.hellaswag_protocol,
        context=run.context,
        sequence_length=run.config.sequence_length,
        autocast=run.precision.autocast(),
    )
    cut = f", {result.cut} of {result.examples} examples cut on the left" if result.cut else ""
    run.log.say(f"step {run.state.step} | HellaSwag acc: {result.acc:.4f} acc_norm: {result.acc_norm:.4f}{cut}")
    run.log.event(
        "hellaswag",
        step=run.state.step,
        protocol=result.protocol,
        acc=result.acc,
        acc_norm=result.acc_norm,
        examples=result.examples,
    )


def sample(run: Run) -> None:
    """Rank 0 writes on from a prompt; the others go ahead and wait in their next collective."""
    if run.context.is_main:
        encoding = load_tokenizer()
        tokens = generate(
            run.model,
            encoding.encode_ordinary(SAMPLE_PROMPT),
            max_new_tokens=SAMPLE_TOKENS,
            top_k=SAMPLE_TOP_K,
            seed=run.config.seed + run.state.step,
            sequence_length=run.config.sequence_length,
            autocast=run.precision.autocast(),
        )
        text = encoding.decode(tokens[0].tolist())
        run.log.say(f"step {run.state.step} | sample: {text}")
        run.log.event("sample", step=run.state.step, text=text)


def save(run: Run, *, final: bool = False) -> None:
    """Start to save; the files are made on the one rank that writes them. From the `final` save on no rank waits."""
    if final:
        run.watchdog.dismiss()
    facts = {
        "numerics": run.numerics,
        "batch": asdict(run.plan),
        "data_fingerprint": run.sources.fingerprint,
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
