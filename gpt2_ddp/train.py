"""Train a GPT-2: build the parts, then the loop.

python -m gpt2_ddp.train --help
torchrun --nproc_per_node=8 -m gpt2_ddp.train --model gpt2
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from gpt2_ddp import cli, hellaswag, optim, resume
from gpt2_ddp.build import Run, build_run, note_start
from gpt2_ddp.checkpoint import step_name
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data import StepBatch, chained_hash
from gpt2_ddp.distributed import grad_sync, open_context
from gpt2_ddp.metrics import StepMetrics, memory_mb
from gpt2_ddp.precision import peak_flops
from gpt2_ddp.sampling import generate
from gpt2_ddp.stopping import StopRequest
from gpt2_ddp.tokenizer import load_tokenizer
from gpt2_ddp.validation import validation_loss

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
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, the clock stands still."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def train(run: Run) -> str:
    """Train until the last step or until somebody asks to stop; 'finished' or 'stopped'."""
    config, state = run.config, run.state
    timer = StepTimer(run.context.device)
    stopping = False
    while state.step < config.max_steps and not stopping:
        batch = run.data.next()
        result = train_step(run, batch)
        state.step = batch.step
        state.tokens_seen += config.total_batch_size
        state.data_hash = chained_hash(state.data_hash, batch.windows)
        if is_time(run, config.log_every):
            log_step(run, result, timer)
        with timer.paused():
            if is_time(run, config.val_every):
                validate(run)
            if is_time(run, config.hellaswag_every):
                score_hellaswag(run)
            if is_time(run, config.sample_every):
                sample(run)
            stopping = run.stop.agreed(run.context)
            if is_time(run, config.checkpoint_every) or stopping or state.step == config.max_steps:
                save(run)
            report_saves(run)
            run.context.shorten_timeouts(config.timeout)
    return "finished" if state.step >= config.max_steps else "stopped"


def train_step(run: Run, batch: StepBatch) -> StepResult:
    """One update from the tokens of all ranks; the gradients are reduced once, in the last micro-step."""
    config, scaler = run.config, run.precision.scaler
    accumulated = torch.zeros((), device=run.context.device)
    for micro_step, (ids, targets) in enumerate(batch.micro_batches(run.context.device), start=1):
        with grad_sync(run.train_model, sync=micro_step == run.plan.grad_accum_steps):
            with run.precision.autocast():
                loss = run.train_model(ids, targets) / run.plan.grad_accum_steps
            scaler.scale(loss).backward()
        accumulated += loss.detach()
    mean_loss = run.context.sum(accumulated) / run.context.world_size
    lr = optim.learning_rate(
        batch.step,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        max_lr=config.max_lr,
        min_lr=config.final_lr,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    norm, skipped = optim.apply_update(run.optimizer, scaler, loss=mean_loss, grad_clip=config.grad_clip)
    run.skips.add(skipped)
    return StepResult(loss=mean_loss, grad_norm=norm, lr=lr)


def is_time(run: Run, every: int) -> bool:
    """Whether something that is done every `every` steps, 0 for never, is due after this one. The last is always."""
    return every > 0 and (run.state.step % every == 0 or run.state.step == run.config.max_steps)


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
            tokens_per_sec=round(tokens_per_sec, 2),
            mfu=round(flops / (peak * run.context.world_size), 4) if peak else None,
            tokens_seen=state.tokens_seen,
            data_hash=state.data_hash,
            memory_mb=memory_mb(torch.cuda.max_memory_allocated() if cuda else None),
            skipped=run.skips.total(),
        )
    )
    if run.skips.in_a_row() > config.skip_limit:
        raise RuntimeError(
            f"step {state.step}: {run.skips.in_a_row()} steps in a row had a loss or gradient that is not finite "
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
        autocast=run.precision.autocast(),
    )
    run.log.say(f"step {run.state.step} | HellaSwag acc: {result.acc:.4f} acc_norm: {result.acc_norm:.4f}")
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
            autocast=run.precision.autocast(),
        )
        text = encoding.decode(tokens[0].tolist())
        run.log.say(f"step {run.state.step} | sample: {text}")
        run.log.event("sample", step=run.state.step, text=text)


def save(run: Run) -> None:
    """Start to save; the files are made on the one rank that writes them."""
    run.writer.save(
        run.state.step,
        lambda: resume.checkpoint_files(
            config=run.config,
            plan=run.plan,
            data_fingerprint=run.sources.fingerprint,
            state=run.state,
            skipped=run.skips.total(),
            model=run.model,
            optimizer=run.optimizer,
            scaler=run.precision.scaler,
            tokenizer=run.tokenizer,
        ),
    )


def report_saves(run: Run, *, wait: bool = False) -> bool:
    """Tell how the saves that ended went; whether the last of them is on the disk."""
    good = True
    for report in run.writer.reports(wait=wait):
        good = report.error is None
        if good:
            run.log.event(
                "checkpoint",
                step=report.step,
                seconds=round(report.seconds, 4),
                blocked_seconds=round(report.blocked_seconds, 4),
                bytes=report.bytes,
            )
        else:
            run.log.say(f"step {report.step} | could not save: {report.error}; the older checkpoints are untouched")
    return good


def finish(run: Run, outcome: str) -> None:
    """Wait for the last save and say how the run ended."""
    saved = run.context.broadcast(report_saves(run, wait=True))
    if not saved:
        raise RuntimeError(f"the checkpoint of step {run.state.step}, the last one, could not be saved")
    run.stop.clear(run.context)
    run.log.event("finish" if outcome == "finished" else "stop", step=run.state.step, reason=run.stop.reason)
    run.log.status(outcome, step=run.state.step)
    where = run.writer.directory / step_name(run.state.step)
    run.log.say(f"{outcome} at step {run.state.step} of {run.config.max_steps}; checkpoint in {where}")


def run_training(config: TrainConfig) -> int:
    """Everything between the command line and the exit status."""
    stop = StopRequest(config.out_dir)
    with open_context(config.device) as context:
        run = build_run(config, context, stop)
        try:
            if run.state.step >= config.max_steps:
                run.log.say(
                    f"{config.out_dir} is already at step {run.state.step} of {config.max_steps}: nothing to do"
                )
                return 0
            note_start(run)
            run.stop.clear(context)
            run.log.event("start", step=run.state.step, world_size=context.world_size, dtype=str(run.precision.dtype))
            run.log.status("running", step=run.state.step)
            outcome = train(run)
            finish(run, outcome)
        except BaseException as error:
            with suppress(OSError):
                run.log.status("failed", step=run.state.step, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            run.close()
    return 75 if outcome == "stopped" and not torch.distributed.is_torchelastic_launched() else 0


@record
def main(argv: Sequence[str] | None = None) -> int:
    return run_training(cli.parse(TrainConfig, __doc__.splitlines()[0], argv))


if __name__ == "__main__":
    cli.run(main)
