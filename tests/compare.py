"""Two commits beside each other: `python tests/compare.py A B [--model gpt2]`. Losses, then speed and peak memory.

The losses are those of tests/golden.py and must be equal. Then both train in turn, a process each time, with nothing
else beside them: what counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import golden
from running import ROOT, environment, metrics, write_shards


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in `folder`."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def timed(root: Path, out_dir: Path, data_dir: Path, flags: list[str], threads: int) -> dict[str, float]:
    """Train by the code at `root`: the median step without the first, and the most memory that was held."""
    command = [sys.executable, "-m", "gpt2_ddp.train", *flags, f"--data-dir={data_dir}", f"--out-dir={out_dir}"]
    env = environment({"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)})
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    steps = metrics(out_dir)[1:]
    return {
        "tokens_per_sec": statistics.median(entry["tokens_per_sec"] for entry in steps),
        "memory_mb": max(entry["memory_mb"] for entry in steps),
        "loss": steps[-1]["loss"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs=2, metavar=("A", "B"))
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each commit; 0 compares only the losses")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trainer", default="", help="more flags for the trainer, as one word")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        roots = [checked_out(commit, folder / name) for commit, name in zip(asked.commits, "AB", strict=True)]
        wrong = False
        for case in golden.CASES:
            old, new = (golden.computed(case, folder / f"losses{root.name}", root) for root in roots)
            found = golden.differences(old, new, to_the_bit=True)
            wrong |= bool(found)
            print(f"{case}: {'; '.join(found) if found else 'equal'}", flush=True)
        data_dir = write_shards(folder / "data", train_tokens=(100_000,))
        flags = [f"--model={asked.model}", "--sequence-length=1024", "--micro-batch-size=1", "--total-batch-size=1024",
                 f"--max-steps={asked.steps}", "--warmup-steps=2", "--val-every=0", "--checkpoint-every=0",
                 "--dtype=float32", "--compile=off", "--device=cpu", *asked.trainer.split()]  # fmt: skip
        rounds: list[list[dict[str, Any]]] = []
        for number in range(asked.rounds):
            order = roots if number % 2 == 0 else roots[::-1]  # what the machine does slowly over time hits both alike
            told = {
                root.name: timed(root, folder / f"{root.name}{number}", data_dir, flags, asked.threads)
                for root in order
            }
            rounds.append([told["A"], told["B"]])
            print(json.dumps(told), flush=True)
        for name in ("tokens_per_sec", "memory_mb") if rounds else ():
            ratios = [new[name] / old[name] for old, new in rounds]
            print(f"{name}, B to A: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
