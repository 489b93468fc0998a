"""What the size of the data set costs: 10 billion tokens against 1 million, in turn.

    python tests/data_cost.py

Both sets are sparse files, so that they take no room; what is not measured here is the disk. Each measurement is a
process of its own, whose shards are not in the page cache when it begins. It opens and checks the data as a run does,
takes the first batch of step 1, goes on at step 15,000, and reads on from there. A step is 512 windows of 1,024 tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402  the folders of the tests and of the project come first
import psutil  # noqa: E402
import torch  # noqa: E402
from running import environment  # noqa: E402

from gpt2_ddp.build.evaluations import Yardsticks  # noqa: E402
from gpt2_ddp.build.settling import open_sources, plan_batches  # noqa: E402
from gpt2_ddp.config import TrainConfig  # noqa: E402
from gpt2_ddp.data.loader import TrainData  # noqa: E402
from gpt2_ddp.data.shards import header  # noqa: E402
from gpt2_ddp.system import cli  # noqa: E402

SETS = {"1 million tokens in 1 shard": (1, 1_000_000), "10 billion in 100 shards": (100, 100_000_000)}
RESUMED_STEP = 15_000
UNITS = {"ms": 1e3, "MiB": 2**-20}
WINDOWS = "different windows in them"
PEAK = "peak above the start (RSS, mapped pages of shards counted), MiB"
USS = "the process's own memory at the end (USS, they are counted), MiB"
MAPPED = "of it mapped pages of shards, MiB"
OPEN = "shards that stay open (128 at most)"
CACHED = "what the kernel has of the shards in its page cache, MiB"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure."""

    repeats: int = 5
    """Processes for each of the two sets; the table has their medians."""
    batches: int = 100
    """Steps to read from step 15,000 on."""
    measure: Path | None = None
    """Measure this directory here and now, and print JSON."""


def make_set(folder: Path, shards: int, tokens: int) -> Path:
    """Shards of `tokens` zeros each, as files with a header and a hole."""
    folder.mkdir()
    for split, number in [("val", 0), *[("train", number) for number in range(shards)]]:
        path = folder / f"{split}_{number:06d}.bin"
        path.write_bytes(header(tokens))
        os.truncate(path, len(header(tokens)) + 2 * tokens)
    return folder


def measure(folder: Path, batches: int) -> dict[str, float]:
    """Seconds and bytes, by the name of their row in the table."""
    files = sorted(folder.glob("*.bin"))
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told: dict[str, float] = {}
    before = peak_rss()

    def timed(name: str, work: Callable[[], object]) -> Any:
        start = time.perf_counter()
        found = work()
        told[f"{name}, ms"] = time.perf_counter() - start
        return found

    def read_on() -> int:
        return len(np.unique(np.concatenate([data.next().windows for _ in range(batches)])))

    config = TrainConfig(data_dir=folder, micro_batch_size=64, total_batch_size=524_288)
    plan = plan_batches(config, 1)
    windows = timed("open and check the data", lambda: open_sources(config, plan, Yardsticks())).train
    with closing(TrainData(windows, plan, rank=0, seed=1, device=torch.device("cpu"), first_step=1)) as data:
        timed("first batch of a new run", data.next)
    later = TrainData(windows, plan, rank=0, seed=1, device=torch.device("cpu"), first_step=RESUMED_STEP)
    with closing(later) as data:
        timed(f"first batch at step {RESUMED_STEP:,}", data.next)
        told[WINDOWS] = timed(f"{batches} batches from there", read_on)
        data.seek(RESUMED_STEP + 1)
        timed("the same batches again", read_on)
    process = psutil.Process()
    told[PEAK] = peak_rss() - before
    told[USS] = process.memory_full_info().uss
    told[MAPPED] = sum(entry.rss for entry in process.memory_maps() if Path(entry.path).parent == folder)
    told[OPEN] = sum(Path(entry.path).parent == folder for entry in process.open_files())
    told[CACHED] = page_cache(files)
    return told


def peak_rss() -> int:
    """Bytes; unlike `ru_maxrss` without the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def page_cache(files: list[Path]) -> int:
    """Bytes of the files that the kernel holds in memory, as fincore of util-linux tells."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def measured_apart(folder: Path, batches: int) -> dict[str, float]:
    """What `measure` tells in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(folder), "--batches", str(batches)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    options = cli.parse(Options, __doc__.splitlines()[0])
    if options.measure:
        print(json.dumps(measure(options.measure, options.batches)))
        return
    with tempfile.TemporaryDirectory() as parent:
        folders = {
            name: make_set(Path(parent) / str(shards), shards, tokens) for name, (shards, tokens) in SETS.items()
        }
        told = {name: [] for name in SETS}
        for _ in range(options.repeats):
            for name, folder in folders.items():
                told[name].append(measured_apart(folder, options.batches))
    print(f"| median of {options.repeats} | {' | '.join(SETS)} |\n|---|---|---|")
    for row in told[name][0]:
        factor = UNITS.get(row.rpartition(", ")[2], 1)
        medians = [statistics.median(each[row] for each in told[name]) * factor for name in SETS]
        print(f"| {row} | {' | '.join(f'{value:,.1f}' for value in medians)} |")


if __name__ == "__main__":
    cli.run(main)
