"""What `auto` takes on this machine beside what could be chosen by hand, each measured by training a few steps.

A trial is a run of the trainer in processes of its own, which differs from the one that leaves all to `auto` in one
choice. Attention has no flag: its alternatives are `ladder.attention_rungs`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpt2_ddp.bench.ladder import Shapes
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.model.gpt import model_config
from gpt2_ddp.model.vocabulary import VOCAB_SIZE
from gpt2_ddp.system.allocator import PRELOAD, find_tcmalloc
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json
from gpt2_ddp.system.precision import COMPILE_FLOPS

PATIENCE = 2.5
"""A trial may take so many times as long as that of `auto`; then it is ended, and known to be slower."""
COMPILE_PATIENCE = 240.0
"""Seconds for the trial that compiles."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A way to train: `name` is taken for `choice`, by `flags` of the trainer and by ranks and their threads."""

    choice: str
    name: str
    ranks: int
    threads: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a trial showed: the seconds of its steps without the first, and of all that came before the first.

    `dtype` and `micro_batch_size` are what it took. No seconds: it was ended before it had done two steps, or `failed`
    says why it ended itself.
    """

    seconds: tuple[float, ...]
    start_seconds: float
    dtype: str
    micro_batch_size: int
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the report; no rate is of a trial that failed.

    `behind` is for what `auto` takes, from 0 to 1: how much longer it takes than the best, as a share of its own time.
    `slow`: the trial was ended, and its rate is less than `tokens_per_sec`.
    """

    choice: str
    name: str
    tokens_per_sec: float
    behind: float | None = None
    slow: bool = False
    note: str = ""


def planned_trial(device: str) -> Trial:
    """What leaves every choice to `auto`; ranks and threads are those of `python -m launch`, where that is there."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "launch", "--dry-run", *(["--cpu"] if device == "cpu" else [])]
    told = subprocess.run(command, env=inherited, capture_output=True, text=True, check=False).stdout
    threads, ranks = (re.search(rf"{name}=(\d+)", told) for name in ("OMP_NUM_THREADS", "nproc-per-node"))
    return Trial(
        choice="all",
        name="auto",
        ranks=int(ranks[1]) if ranks else 1,
        threads=int(threads[1]) if threads else len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1,
    )


def alternatives(auto: Trial, taken: Trained, shapes: Shapes, device: str) -> list[Trial]:
    """The trials that differ from `auto`, which took `taken`, in one choice."""
    formats = ("float32", "bfloat16") if device == "cpu" else ("float32", "bfloat16", "float16")
    trials = [
        replace(auto, choice="dtype", name=name, flags=(f"--dtype={name}",)) for name in formats if name != taken.dtype
    ]
    sequences = shapes.total_batch_size // shapes.sequence_length
    if device == "cpu":
        cores = auto.ranks * auto.threads
        for ranks in sorted({1, auto.ranks // 2, auto.ranks * 2, cores} - {0, auto.ranks}):
            if ranks <= cores and sequences % ranks == 0:
                name = ranks_name(replace(auto, ranks=ranks, threads=cores // ranks))
                trials.append(replace(auto, choice="ranks and threads", name=name, ranks=ranks, threads=cores // ranks))
    share = sequences // auto.ranks
    for size in (1 << power for power in range(share.bit_length())):
        if size != taken.micro_batch_size and share % size == 0:
            trials.append(replace(auto, choice="micro-batch", name=str(size), flags=(f"--micro-batch-size={size}",)))
    other = "on" if device == "cpu" else "off"
    return [*trials, replace(auto, choice="compile", name=other, flags=(f"--compile={other}",))]


def ranks_name(trial: Trial) -> str:
    return f"{trial.ranks} x {trial.threads}"


def train(trial: Trial, shapes: Shapes, device: str, folder: Path, patience: float) -> Trained:
    """Train on the tokens in `folder`/data, for at most `patience` seconds.

    Raises:
        UserError: with the last thing that the trainer said, where it failed.
    """
    out_dir = Path(tempfile.mkdtemp(dir=folder))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={trial.ranks}"),
        *("-m", "gpt2_ddp.train", f"--model={shapes.model}", f"--sequence-length={shapes.sequence_length}"),
        *(f"--total-batch-size={shapes.total_batch_size}", f"--max-steps={shapes.steps + 1}"),
        *(f"--data-dir={folder / 'data'}", f"--out-dir={out_dir / 'run'}", f"--device={device}"),
        *("--micro-batch-size=auto", "--val-every=0", "--check-ranks-every=0", *trial.flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(trial.threads)}
    if device == "cpu" and find_tcmalloc():
        environment[PRELOAD] = find_tcmalloc()  # as `python -m launch` does
    start = time.time()
    with (out_dir / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            status = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            status = 0
        finally:
            process.kill()  # its ranks leave when torchrun has gone
            process.wait()
    if status:
        said = [line for line in (out_dir / "output").read_text().splitlines() if line.startswith("error: ")]
        raise UserError(f"{trial.choice} {trial.name} failed{''.join(f': {line}' for line in said[:1])}")
    return trained(out_dir / "run", start, patience)


def attempt(trial: Trial, shapes: Shapes, device: str, folder: Path, patience: float) -> Trained:
    """As `train`, also where that fails: an alternative to what `auto` takes need not fit the memory."""
    try:
        return train(trial, shapes, device, folder, patience)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return Trained(seconds=(), start_seconds=0.0, dtype="", micro_batch_size=0, failed=str(error))


def trained(run: Path, start: float, patience: float) -> Trained:
    """What the run directory of a trial holds that began at `start` and had `patience` seconds."""
    files = run / "config.json", run / "metrics.jsonl"
    if not all(file.exists() for file in files):
        return Trained(seconds=(), start_seconds=patience, dtype="", micro_batch_size=0)
    noted = read_json(files[0])
    events = [json.loads(line) for line in files[1].read_text().split("\n")[:-1]]
    return Trained(
        seconds=tuple(event["step_ms"] / 1000 for event in events if event["event"] == "train")[1:],
        start_seconds=files[0].stat().st_mtime - start,  # written when everything is built
        dtype=noted["starts"][-1]["dtype"].removeprefix("torch."),
        micro_batch_size=noted["config"]["micro_batch_size"],
    )


def try_all(shapes: Shapes, device: str, repeats: int, folder: Path) -> list[Outcome]:
    """Each choice of `auto` and its alternatives, measured in turn, `repeats` times over."""
    (folder / "data").mkdir()
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=2 * shapes.total_batch_size + 1)
    write_shard(folder / "data" / "train_000000.bin", tokens.astype(np.uint16))
    auto = planned_trial(device)
    told(auto)
    began = time.time()
    taken = train(auto, shapes, device, folder, COMPILE_PATIENCE)
    if not taken.seconds:
        raise UserError(f"not two steps in {COMPILE_PATIENCE:.0f} s: give a smaller --total-batch-size or --model")
    patience = PATIENCE * (time.time() - began)
    trials = alternatives(auto, taken, shapes, device)
    seen: dict[Trial, list[Trained]] = {auto: [taken]}
    for repeat in range(repeats):
        for trial in [auto] * (repeat > 0) + trials:
            before = seen.setdefault(trial, [])
            if before and not before[-1].seconds:
                continue  # it was too slow, or failed
            told(trial)
            limit = COMPILE_PATIENCE if trial.choice == "compile" else patience
            before.append(attempt(trial, shapes, device, folder, limit))
    return rows(shapes, auto, seen, device, patience)


def told(trial: Trial) -> None:
    print(f"{trial.choice}: {trial.name}", file=sys.stderr, flush=True)


def rows(shapes: Shapes, auto: Trial, seen: dict[Trial, list[Trained]], device: str, patience: float) -> list[Outcome]:
    """The outcomes by choice, what `auto` takes first."""
    taken = seen[auto][0]
    own = {"dtype": taken.dtype, "ranks and threads": ranks_name(auto), "micro-batch": str(taken.micro_batch_size)}
    outcomes: list[Outcome] = []
    for choice, name in own.items():
        trials = {trial: runs for trial, runs in seen.items() if trial.choice == choice}
        rates = {name: rate(shapes, seen[auto])} | {
            trial.name: rate(shapes, runs) for trial, runs in trials.items() if runs[0].seconds
        }
        outcomes += compared(choice, rates, name)
        outcomes += [
            unfinished(trial, runs[0], shapes, patience) for trial, runs in trials.items() if not runs[0].seconds
        ]
    for trial, runs in seen.items():
        if trial.choice == "compile" and runs[0].seconds:
            later = runs[0].start_seconds - taken.start_seconds
            outcomes += compile_outcomes(shapes, rate(shapes, seen[auto]), rate(shapes, runs), later, device)
        elif trial.choice == "compile":
            outcomes.append(unfinished(trial, runs[0], shapes, COMPILE_PATIENCE))
    return outcomes


def unfinished(trial: Trial, run: Trained, shapes: Shapes, patience: float) -> Outcome:
    """The row of a trial that failed or was ended."""
    if run.failed:
        return Outcome(choice=trial.choice, name=trial.name, tokens_per_sec=0.0, note=run.failed)
    most = shapes.total_batch_size / patience
    return Outcome(choice=trial.choice, name=trial.name, tokens_per_sec=most, slow=True)


def compared(choice: str, rates: Mapping[str, float], own: str) -> list[Outcome]:
    """Rows of `rates` by name, of which `auto` takes `own`."""
    lag = 1 - rates[own] / max(rates.values())
    return [
        Outcome(choice=choice, name=name, tokens_per_sec=rates[name], behind=round(lag, 4) if name == own else None)
        for name in sorted(rates, key=lambda name: name != own)
    ]


def compile_outcomes(shapes: Shapes, auto: float, other: float, later: float, device: str) -> list[Outcome]:
    """Rows about compilation; tokens/s of `auto` in a run of a few steps and of `other`, which starts `later`."""
    if device != "cpu":  # `auto` compiles from the first step on
        return compared("compile", {"on": auto, "off": other}, "on")
    switch = COMPILE_FLOPS / model_config(shapes.model).flops_per_token(shapes.sequence_length)
    note = f"{later:+.0f} s before the first step" + (
        f"; earned back after {later / (1 / auto - 1 / other):,.0f} tokens" if other > auto else ""
    )
    lag = compile_lag(eager=auto, compiled=other, later=later, switch=switch)
    return [
        Outcome(choice="compile", name=f"from {switch:,.0f} tokens on", tokens_per_sec=auto, behind=round(lag, 4)),
        Outcome(choice="compile", name="on", tokens_per_sec=other, note=note),
    ]


def compile_lag(*, eager: float, compiled: float, later: float, switch: float) -> float:
    """How far behind the better of the two a run of the worst length is, where those from `switch` tokens on compile.

    Rates in tokens/s; a compiled run begins `later` seconds later. The worst are the longest run that is not compiled,
    the shortest that is, and, where compiling makes slower, one without an end.
    """
    eager_seconds, compiled_seconds = switch / eager, later + switch / compiled
    ratio = eager_seconds / compiled_seconds
    return 1 - min(ratio, 1 / ratio, compiled / eager, 1.0)


def rate(shapes: Shapes, runs: Iterable[Trained]) -> float:
    """Tokens/s by the median of all steps."""
    return round(shapes.total_batch_size / statistics.median(second for run in runs for second in run.seconds), 1)


def report(outcomes: list[Outcome]) -> str:
    """The outcomes as a table of text."""
    lines = [f"{'':20}{'':30}{'tokens/s':>10}  auto is behind the best by"]
    for outcome in outcomes:
        auto = outcome.behind is not None
        head, name = (outcome.choice, f"auto: {outcome.name}") if auto else ("", outcome.name)
        speed = f"{'<' if outcome.slow else ''}{outcome.tokens_per_sec:.0f}" if outcome.tokens_per_sec else "-"
        lines.append(f"{head:20}{name:30}{speed:>10}  {f'{outcome.behind:.1%}' if auto else outcome.note}".rstrip())
    return "\n".join(lines)
