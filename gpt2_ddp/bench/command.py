"""The speed ladder: what each means adds to a float32 baseline, on the hardware at hand; or what `auto` takes there.

python -m gpt2_ddp.bench --json ladder.json --plot ladder.png
python -m gpt2_ddp.bench --auto --json auto.json

Every rung is measured in a process of its own (its peak memory is its own), in turn, and the rounds are repeated; a
rung's time is the median of all its steps. All rungs see the same tokens and start from the same weights. So are the
choices of `auto` and their alternatives (choices.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gpt2_ddp.bench.choices import Outcome, compared, report, try_all
from gpt2_ddp.bench.ladder import Measured, Rung, Shapes, attention_rungs, first_rung_sequences, ladder, measure
from gpt2_ddp.distributed.context import DistContext, open_context
from gpt2_ddp.model.gpt import model_config
from gpt2_ddp.system import cli
from gpt2_ddp.system.allocator import PRELOAD, find_tcmalloc, preloaded
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import require_writable
from gpt2_ddp.system.hardware import choose_device, found_hardware


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the ladder, or what `auto` takes beside its alternatives; under torchrun, how the fastest rung scales."""

    auto: bool = False
    """Measure what `auto` takes on this machine, and what else could be chosen, by training."""
    model: str | None = None
    """The model's size; gpt2, with --auto gpt2-mini."""
    sequence_length: int | None = None
    """Tokens in a sequence; 1024, with --auto 256."""
    micro_batch_size: int | None = None
    """Sequences computed at once on the ladder; 4, on CUDA 16 or as many as the first rung has memory for."""
    total_batch_size: int | None = None
    """Tokens in a step on each rank; 32768. With --auto on all ranks together, and 4096 on a CPU."""
    steps: int | None = None
    """Timed steps a round, after one that is not timed; 2, on CUDA 20."""
    repeats: int | None = None
    """Rounds over all rungs or choices; 3, with --auto 1."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    json: Path | None = None
    """Also write the rungs or choices to this file."""
    plot: Path | None = None
    """Also draw a bar chart of the rungs, as PNG."""
    rung: str | None = None
    """Measure this rung alone, in this process, and print it as JSON."""

    def shapes(self, device: torch.device) -> Shapes:
        """What is computed on `device`: these flags, and for those that are not given, what lets it be judged.

        Raises:
            UserError: for shapes that cannot be.
        """
        if self.repeats is not None and self.repeats < 1:
            raise UserError("--repeats must be at least 1")
        usual: dict[str, Any] = {
            "model": "gpt2-mini",
            "sequence_length": 256,
            "micro_batch_size": 1,
            "total_batch_size": 4096,
        }
        if not self.auto:
            usual = {"model": "gpt2", "sequence_length": 1024, "micro_batch_size": 4, "total_batch_size": 32768}
        given = {field.name: getattr(self, field.name) for field in fields(Shapes)}
        values = usual | {"steps": 2} | {name: value for name, value in given.items() if value is not None}
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            values = for_cuda(values, memory) | {name: value for name, value in given.items() if value is not None}
        return Shapes(**values)


def for_cuda(values: dict[str, Any], memory: int) -> dict[str, Any]:
    """`values` of `Shapes` with which a GPU of `memory` bytes is bound by its work, not by launches of kernels."""
    size = first_rung_sequences(model_config(values["model"]), values["sequence_length"], memory)
    return values | {"micro_batch_size": size, "total_batch_size": 32768, "steps": 20}


def climb(shapes: Shapes, device: torch.device, rungs: list[Rung], repeats: int) -> list[Measured]:
    """Measure every rung in a process of its own, `repeats` times over; a `speedup` is over the first one."""
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    last: dict[str, Measured] = {}
    flags = asdict(shapes) | {"device": device.type}
    own = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for repeat in range(repeats):
        for rung in rungs:
            print(f"round {repeat + 1} of {repeats}: {rung.name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "gpt2_ddp.bench", *own, "--rung", rung.name]
            environment = os.environ | ({PRELOAD: find_tcmalloc()} if rung.tcmalloc else {})
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
            seconds[rung.name] += told["seconds"]
            last[rung.name] = Measured(**told["measured"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        replace(
            last[name],
            ms_per_step=round(median * 1000, 2),
            tokens_per_sec=round(shapes.total_batch_size / median, 2),
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
    shapes = bench.shapes(device)
    if bench.rung is not None:
        rungs = [*ladder(device), *attention_rungs()]
        chosen = [rung for rung in rungs if rung.name == bench.rung]
        if not chosen:
            raise UserError(f"--rung {bench.rung!r}: choose one of {[rung.name for rung in rungs]}")
        if chosen[0].tcmalloc and not preloaded(find_tcmalloc()):
            raise UserError(f"--rung {bench.rung!r}: start it with {PRELOAD}={find_tcmalloc()}")
        seconds, measured = measure(shapes, chosen[0], DistContext(device=device))
        print(json.dumps({"seconds": seconds, "measured": asdict(measured)}))
        return
    with open_context(bench.device) as context:
        if context.world_size > 1:
            if bench.auto or bench.json or bench.plot:
                raise UserError("--auto, --json and --plot are for one process: leave them out under torchrun")
            show_scaling(shapes, context)
            return
    require_places(bench)
    hardware = asdict(found_hardware(device)) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if bench.auto:
        outcomes = compare_choices(shapes, device, bench.repeats or 1)
        print(report(outcomes))
        results = {"choices": [asdict(outcome) for outcome in outcomes]}
    else:
        measured_rungs = climb(shapes, device, ladder(device), bench.repeats or 3)
        print(table(measured_rungs))
        results = {"rungs": [asdict(rung) for rung in measured_rungs]}
        if bench.plot:
            draw(measured_rungs, shapes, bench.plot)
    if bench.json:
        bench.json.write_text(json.dumps({"hardware": hardware, **results}, indent=2) + "\n")


def require_places(bench: Bench) -> None:
    """What the numbers of many minutes will need in the end.

    Raises:
        OSError: where a file that is asked for cannot be written.
        UserError: where the picture cannot be drawn.
    """
    for path in filter(None, (bench.json, bench.plot)):
        require_writable(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
    if bench.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError('--plot needs matplotlib: pip install -e ".[plot]" in the checkout')


def compare_choices(shapes: Shapes, device: torch.device, repeats: int) -> list[Outcome]:
    """What `auto` takes and its alternatives, measured; on a CPU also the two kinds of attention."""
    with tempfile.TemporaryDirectory(prefix="gpt2_ddp_bench_") as folder:
        outcomes = try_all(shapes, device.type, repeats, Path(folder))
    if device.type != "cpu":
        return outcomes
    taken = next(outcome.name for outcome in outcomes if outcome.behind is not None and outcome.choice == "dtype")
    own = "in blocks" if taken == "bfloat16" else "PyTorch's"
    rungs = sorted(attention_rungs(), key=lambda rung: rung.name != own)
    steps = climb(short_step(shapes), device, rungs, repeats)
    rates = {rung.name: rung.tokens_per_sec for rung in steps}
    return outcomes + compared("attention", rates, own)


def short_step(shapes: Shapes) -> Shapes:
    """`shapes` with a step of single sequences, about 1,024 tokens together."""
    sequences = max(1, 1024 // shapes.sequence_length)
    return replace(shapes, micro_batch_size=1, total_batch_size=sequences * shapes.sequence_length)


def show_scaling(shapes: Shapes, context: DistContext) -> None:
    """Tokens/s of one rank alone and of all together."""
    fastest = ladder(context.device)[-1]
    alone = replace(context, world_size=1)
    times = context.run_on_all(lambda: measure(shapes, fastest, alone)[0] if context.is_main else [1.0])
    one = statistics.median(context.broadcast(times))
    together = statistics.median(measure(shapes, fastest, context)[0])
    rate = context.world_size * shapes.total_batch_size / together
    if context.is_main:
        print(f"1 rank: {shapes.total_batch_size / one:.1f} tokens/s; {context.world_size} ranks: {rate:.1f} tokens/s")
        print(f"scaling efficiency {one / together:.1%}")


def draw(rungs: list[Measured], shapes: Shapes, path: Path) -> None:
    """A bar chart of tokens/s, each bar with its speed-up."""
    from matplotlib.figure import Figure  # an extra, which `require_places` has looked for

    figure = Figure(figsize=(8, 0.6 * len(rungs) + 1.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([rung.name for rung in rungs], [rung.tokens_per_sec for rung in rungs], color="tab:blue")
    axes.bar_label(bars, [f" {rung.speedup:.1f}x" for rung in rungs])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("tokens per second")
    axes.set_title(f"{shapes.model}, {shapes.sequence_length} tokens a sequence, {shapes.total_batch_size:,} a step")
    figure.savefig(str(path), dpi=120)
