"""What a run does beside its steps: note its start, log, validate, score HellaSwag, sample, save."""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2_ddp.checkpoint import resume
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.evaluation import hellaswag
from gpt2_ddp.evaluation.sampling import generate
from gpt2_ddp.evaluation.validation import validation_loss
from gpt2_ddp.metrics.log import StepMetrics, memory_mb
from gpt2_ddp.metrics.timer import StepTimer
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
            skipped=run.skips.total(),
        )
    )
    if run.skips.longest() > config.skip_limit:
        raise RuntimeError(
            f"step {state.step}: {run.skips.longest()} steps in a row had a loss or gradient that is not finite "
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
    run.writer.save(
        run.state.step,
        lambda: resume.checkpoint_files(
            config=run.config,
            plan=run.plan,
            data_fingerprint=run.sources.fingerprint,
            state=run.state,
            skips=run.skips,
            guard=run.guard,
            numerics=run.numerics,
            model=run.model,
            optimizer=run.optimizer,
            scaler=run.precision.scaler,
            tokenizer=run.tokenizer,
        ),
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
