"""The speed ladder: what each means adds to a float32 baseline, on the hardware at hand.

python -m gpt2_ddp.bench --json ladder.json --plot ladder.png

Every rung is measured in a process of its own (its peak memory is its own), in turn, and the rounds are repeated; a
rung's time is the median of all its steps. All rungs see the same tokens and start from the same weights.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gpt2_ddp import cli
from gpt2_ddp.distributed import DistContext, choose_device, grad_sync, open_context
from gpt2_ddp.model import GPT, CausalSelfAttention, GPTConfig, model_config
from gpt2_ddp.optim import apply_update, parameter_groups
from gpt2_ddp.precision import Precision, allow_tf32, choose_dtype, found_hardware, peak_flops
from gpt2_ddp.tokenizer import VOCAB_SIZE

LEARNING_RATE = 6e-4


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the ladder; under torchrun, how the fastest rung scales from one rank to all."""

    model: str = "gpt2"
    """The model's size."""
    sequence_length: int = 1024
    """Tokens in a sequence."""
    micro_batch_size: int = 4
    """Sequences computed at once."""
    total_batch_size: int = 32768
    """Tokens in a step on each rank."""
    steps: int = 2
    """Timed steps a round, after one that is not timed."""
    repeats: int = 3
    """Rounds over all rungs."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    json: Path | None = None
    """Also write the rungs to this file."""
    plot: Path | None = None
    """Also draw a bar chart, as PNG."""
    rung: str | None = None
    """Measure this rung alone, in this process, and print it as JSON."""

    def __post_init__(self) -> None:
        tokens = self.micro_batch_size * self.sequence_length
        if min(tokens, self.steps, self.repeats) < 1 or self.total_batch_size % max(tokens, 1):
            raise ValueError(
                f"--total-batch-size {self.total_batch_size} must be a multiple of the {tokens} tokens of a "
                "micro-batch, and --steps and --repeats at least 1"
            )
        if self.sequence_length > model_config(self.model).block_size:
            raise ValueError(f"--sequence-length {self.sequence_length} is past the model's block size")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """How a step is computed; each rung of the ladder changes one thing of the one before."""

    name: str
    tf32: bool = False
    mixed: bool = False
    fused_attention: bool = False
    padded_vocabulary: bool = False
    compiled: bool = False
    fused_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rung's numbers. `speedup` is the first rung's time over this one's; `loss` that of the first step."""

    name: str
    ms_per_step: float
    tokens_per_sec: float
    speedup: float
    peak_memory_mb: float
    mfu: float | None
    loss: float


def ladder(device: torch.device) -> list[Rung]:
    """The rungs that this kind of device has."""
    changes: list[tuple[str, str]] = [
        ("autocast", "mixed"),
        ("fused attention", "fused_attention"),
        ("padded vocabulary", "padded_vocabulary"),
        ("torch.compile", "compiled"),
        ("fused AdamW", "fused_optimizer"),
    ]
    if device.type == "cuda":
        changes.insert(0, ("TF32", "tf32"))
    rungs = [Rung(name="float32")]
    for name, field in changes:
        rungs.append(replace(rungs[-1], name=f"+ {name}", **{field: True}))
    return rungs


class ExplicitAttention(CausalSelfAttention):
    """Attention with its matrix of weights written out, (B, n_head, T, T)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.n_head)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


def measure(bench: Bench, rung: Rung, context: DistContext) -> tuple[list[float], Measured]:
    """The seconds of each timed step, and the rung's numbers without a `speedup`."""
    device = context.device
    if rung.tf32:
        allow_tf32()
    dtype = choose_dtype("auto" if rung.mixed else "float32", found_hardware(device))[0]
    precision = Precision.of(dtype, device)
    config = bench_config(bench, rung)
    weights = GPT(model_config(bench.model)).init_weights(0).state_dict()
    model = GPT(config)  # the same weights for both vocabulary sizes, so that their losses can be compared
    model.load_state_dict(weights | {"wte.weight": weights["wte.weight"][: config.vocab_size]})
    if not rung.fused_attention:
        for block in model.h:
            block.attn.__class__ = ExplicitAttention
    model.to(device)
    train_model: nn.Module = torch.compile(model) if rung.compiled else model  # type: ignore[assignment]
    train_model = context.wrap(train_model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=LEARNING_RATE, fused=rung.fused_optimizer)
    shape = (-1, bench.micro_batch_size, bench.sequence_length)
    generator = torch.Generator().manual_seed(context.rank)
    tokens = torch.randint(VOCAB_SIZE, (bench.total_batch_size,), generator=generator).view(shape).to(device)
    seconds, losses = list[float](), list[float]()
    for _ in range(1 + bench.steps):
        start = time.perf_counter()
        losses.append(float(step(train_model, optimizer, precision, tokens)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return seconds[1:], summed_up(bench, rung, median, peak_memory=peak, loss=losses[0], dtype=dtype, device=device)


def bench_config(bench: Bench, rung: Rung) -> GPTConfig:
    return replace(model_config(bench.model), **({} if rung.padded_vocabulary else {"vocab_size": VOCAB_SIZE}))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, tokens: Tensor) -> Tensor:
    """One update on `tokens` (micro-steps, B, T), each predicting itself shifted by one; the mean loss."""
    total = torch.zeros((), device=tokens.device)
    for number, ids in enumerate(tokens, start=1):
        with grad_sync(model, sync=number == len(tokens)):
            with precision.autocast():
                loss = model(ids, ids.roll(-1, dims=1)) / len(tokens)
            precision.scaler.scale(loss).backward()
        total += loss.detach()
    if optimizer.defaults["fused"]:
        apply_update(optimizer, precision.scaler, loss=total, grad_clip=1.0)
    else:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return total


def peak_resident() -> int:
    """The most main memory that this process has held, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summed_up(
    bench: Bench, rung: Rung, seconds: float, *, peak_memory: int, loss: float, dtype: torch.dtype, device: torch.device
) -> Measured:
    rate = bench.total_batch_size / seconds
    peak = peak_flops(found_hardware(device), dtype)
    flops = bench_config(bench, rung).flops_per_token(bench.sequence_length)
    return Measured(
        name=rung.name,
        ms_per_step=round(seconds * 1000, 2),
        tokens_per_sec=round(rate, 2),
        speedup=1.0,
        peak_memory_mb=round(peak_memory / 2**20, 1),
        mfu=round(rate * flops / peak, 4) if peak else None,
        loss=loss,
    )


def climb(bench: Bench, device: torch.device) -> list[Measured]:
    """Measure every rung in a process of its own, `repeats` times over, and print the table as it is known."""
    rungs = ladder(device)
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    last: dict[str, Measured] = {}
    own = [part for name, value in asdict(bench).items() if name not in ("json", "plot", "rung")
           for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    for repeat in range(bench.repeats):
        for rung in rungs:
            print(f"round {repeat + 1} of {bench.repeats}: {rung.name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "gpt2_ddp.bench", *own, "--rung", rung.name]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            seconds[rung.name] += told["seconds"]
            last[rung.name] = Measured(**told["measured"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        replace(
            last[name],
            ms_per_step=round(median * 1000, 2),
            tokens_per_sec=round(bench.total_batch_size / median, 2),
            speedup=round(medians[rungs[0].name] / median, 3),
        )
        for name, median in medians.items()
    ]


def table(rungs: list[Measured]) -> str:
    """The rungs as a table of text."""
    lines = [f"{'':22}{'ms/step':>12}{'tokens/s':>12}{'speedup':>9}{'peak MiB':>10}{'mfu':>8}{'loss':>10}"]
    for rung in rungs:
        mfu = "-" if rung.mfu is None else f"{rung.mfu:.1%}"
        lines.append(
            f"{rung.name:22}{rung.ms_per_step:12.1f}{rung.tokens_per_sec:12.1f}{rung.speedup:8.2f}x"
            f"{rung.peak_memory_mb:10.0f}{mfu:>8}{rung.loss:10.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    bench = cli.parse(Bench, __doc__.splitlines()[0])
    device = choose_device(bench.device, local_rank=0, local_world_size=1)
    if bench.rung is not None:
        chosen = [rung for rung in ladder(device) if rung.name == bench.rung]
        if not chosen:
            raise ValueError(f"--rung {bench.rung!r}: choose one of {[rung.name for rung in ladder(device)]}")
        seconds, measured = measure(bench, chosen[0], DistContext(device=device))
        print(json.dumps({"seconds": seconds, "measured": asdict(measured)}))
        return
    with open_context(bench.device) as context:
        if context.world_size > 1:
            show_scaling(bench, context)
            return
    rungs = climb(bench, device)
    print(table(rungs))
    if bench.json:
        hardware = asdict(found_hardware(device)) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        text = json.dumps({"hardware": hardware, "rungs": [asdict(rung) for rung in rungs]}, indent=2)
        bench.json.write_text(text + "\n")
    if bench.plot:
        draw(rungs, bench)


def show_scaling(bench: Bench, context: DistContext) -> None:
    """Tokens/s of one rank alone and of all together."""
    fastest = ladder(context.device)[-1]
    alone = replace(context, world_size=1)
    times = context.together(lambda: measure(bench, fastest, alone)[0] if context.is_main else [1.0])
    one = statistics.median(context.broadcast(times))
    together = statistics.median(measure(bench, fastest, context)[0])
    rate = context.world_size * bench.total_batch_size / together
    if context.is_main:
        print(f"1 rank: {bench.total_batch_size / one:.1f} tokens/s; {context.world_size} ranks: {rate:.1f} tokens/s")
        print(f"scaling efficiency {one / together:.1%}")


def draw(rungs: list[Measured], bench: Bench) -> None:
    """A bar chart of tokens/s, each bar with its speed-up."""
    try:
        from matplotlib.figure import Figure  # an extra
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "gpt2_ddp[plot]"') from None
    figure = Figure(figsize=(8, 0.6 * len(rungs) + 1.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([rung.name for rung in rungs], [rung.tokens_per_sec for rung in rungs], color="tab:blue")
    axes.bar_label(bars, [f" {rung.speedup:.1f}x" for rung in rungs])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("tokens per second")
    axes.set_title(f"{bench.model}, {bench.sequence_length} tokens a sequence, {bench.total_batch_size:,} a step")
    figure.savefig(str(bench.plot), dpi=120)


if __name__ == "__main__":
    cli.run(main)
