"""AdamW against Muon, each under its schedules: the runs of docs/experiments.md, one after the other.

    python docs/experiments/optimizers.py DATA OUT [--only NAME ...]

DATA is what `python -m data_prep text` made; OUT gets a run directory for each run. A run that is done is left as it
is, one that was stopped goes on: so several of these may be started, each with other names.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMON = {
    "model": "gpt2-micro",
    "sequence-length": "256",
    "micro-batch-size": "8",
    "total-batch-size": "2048",
    "max-steps": "500",
    "warmup-steps": "25",
    "val-every": "50",
    "val-tokens": "32768",
    "checkpoint-every": "100",
    "keep-checkpoints": "1",
    "dtype": "float32",
    "compile": "off",
    "log-every": "5",
}
RATES = ("1e-3", "2e-3", "4e-3")
"""The grid, the same for both optimizers. Muon's matrices and the rest of the model take the same rate at first."""


def adamw(rate: str, *flags: str) -> tuple[str, ...]:
    return ("--max-lr", rate, *flags)


def muon(rate: str, *flags: str) -> tuple[str, ...]:
    return ("--optimizer", "muon", "--max-lr", rate, "--muon-lr", rate, *flags)


def runs() -> dict[str, tuple[str, ...]]:
    """Every run by its name, with its flags beside `COMMON`, in the order in which they are made."""
    found: dict[str, tuple[str, ...]] = {}
    for schedule in ("linear", "cosine"):
        for rate in ("2e-3", "4e-3", "1e-3"):
            found[f"adamw-{schedule}-{rate}"] = adamw(rate, "--schedule", schedule)
            found[f"muon-{schedule}-{rate}"] = muon(rate, "--schedule", schedule)
    return found


def train(name: str, flags: tuple[str, ...], data: Path, out: Path) -> int:
    """One run, in a process of one thread."""
    common = [part for flag, value in COMMON.items() for part in (f"--{flag}", value)]
    command = [sys.executable, "-m", "gpt2_ddp.train", *common, *flags]
    command += ["--data-dir", str(data), "--out-dir", str(out / name)]
    with (out / f"{name}.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=log, env=environment, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these runs alone")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, flags in runs().items():
        if chosen.only is None or name in chosen.only:
            print(name, flush=True)
            if status := train(name, flags, chosen.data.resolve(), chosen.out.resolve()):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
