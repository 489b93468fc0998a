"""The speed ladder: what each means adds to a float32 baseline, on the hardware at hand.

python -m gpt2_ddp.bench --json ladder.json --plot ladder.png

Every rung is measured in a process of its own (its peak memory is its own), in turn, and the rounds are repeated; a
rung's time is the median of all its steps. All rungs see the same tokens and start from the same weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gpt2_ddp import cli
from gpt2_ddp.allocator import PRELOAD, find_tcmalloc, preloaded
from gpt2_ddp.distributed import DistContext, choose_device, open_context
from gpt2_ddp.ladder import Measured, Shapes, ladder, measure
from gpt2_ddp.precision import found_hardware


@dataclass(frozen=True, kw_only=True)
class Bench(Shapes):
    """Measure the ladder; under torchrun, how the fastest rung scales from one rank to all."""

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
        super().__post_init__()
        if self.repeats < 1:
            raise ValueError("--repeats must be at least 1")


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
            environment = os.environ | ({PRELOAD: find_tcmalloc()} if rung.tcmalloc else {})
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
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
        if chosen[0].tcmalloc and not preloaded(find_tcmalloc()):
            raise ValueError(f"--rung {bench.rung!r}: start it with {PRELOAD}={find_tcmalloc()}")
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
    cli.run(main, prints_result=True)
