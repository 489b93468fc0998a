"""Runs the trainer as its users do, as processes, and reads what it left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_ddp.data.manifest import Manifest, ShardRecord, write_manifest
from gpt2_ddp.data.shards import read_shard, write_shard
from gpt2_ddp.model.vocabulary import GPT2, Vocabulary

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "model": "gpt2-nano",
    "device": "cpu",
    "dtype": "float32",
    "compile": "off",
    "sequence-length": "16",
    "micro-batch-size": "2",
    "total-batch-size": "128",
    "max-steps": "20",
    "warmup-steps": "5",
    "max-lr": "2e-3",
    "val-every": "0",
    "checkpoint-every": "10",
    "keep-checkpoints": "0",
}
"""A run of seconds: 8 sequences a step, so that 1, 2 and 4 ranks make 4, 2 and 1 micro-steps of two sequences."""


def write_shards(
    folder: Path, seed: int = 0, *, train_tokens: Sequence[int] = (3000, 2000), val_tokens: Sequence[int] = (700,)
) -> Path:
    """Token shards that a model can learn from: a few common tokens, more of them the lower their number."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for split, sizes in (("train", train_tokens), ("val", val_tokens)):
        for number, size in enumerate(sizes):
            tokens = (generator.random(size) ** 3 * 500).astype(np.uint16)
            write_shard(folder / f"{split}_{number:06d}.bin", tokens)
    return folder


def describe(folder: Path, *, source: str = "tests", tokenizer: str = "gpt2", vocabulary: Vocabulary = GPT2) -> Path:
    """Put a manifest beside the shards in `folder`, as data_prep does."""
    records = [
        ShardRecord(name=path.name, tokens=read_shard(path).tokens, sha256=sha256(path))
        for path in sorted(folder.glob("*.bin"))
    ]
    manifest = Manifest(
        source=source,
        revision="1",
        settings={},
        documents={"train": 1, "val": 1},
        shards=tuple(records),
        complete=True,
        next_chunk=0,
        unfinished={"train": 0, "val": 0},
        tokenizer=tokenizer,
        vocabulary=vocabulary,
    )
    write_manifest(folder, manifest)
    return folder


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what a surrounding torchrun or SLURM left in it; one thread a process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    path = os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | dict(extra or {})


def python(nproc: int = 0, torchrun: Sequence[str] = ()) -> list[str]:
    """The start of a command line: plain Python for `nproc` 0, else torchrun with that many ranks on a free port."""
    if nproc == 0:
        return [sys.executable]
    ranks = ["--standalone", f"--nproc_per_node={nproc}", *torchrun]
    return [sys.executable, "-m", "torch.distributed.run", *ranks]


def train_command(
    out_dir: Path, data_dir: Path, *flags: str, nproc: int = 0, torchrun: Sequence[str] = ()
) -> list[str]:
    """The command line of a small run; `flags` come last and win over `SMALL`."""
    small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    places = ["--out-dir", str(out_dir), "--data-dir", str(data_dir)]
    return [*python(nproc, torchrun), "-m", "gpt2_ddp.train", *small, *places, *flags]


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is."""
    return subprocess.run(
        command, env=environment(env), cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
    )


def train(
    out_dir: Path,
    data_dir: Path,
    *flags: str,
    nproc: int = 0,
    torchrun: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Train to the end; with `check`, an exit status other than 0 fails the test with what was said."""
    done = run(train_command(out_dir, data_dir, *flags, nproc=nproc, torchrun=torchrun), env=env)
    if check:
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(
    out_dir: Path,
    data_dir: Path,
    *flags: str,
    nproc: int = 0,
    torchrun: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start to train and return at once. The process leads a group of its own, which `end` kills."""
    return subprocess.Popen(
        train_command(out_dir, data_dir, *flags, nproc=nproc, torchrun=torchrun),
        env=environment(env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill what `start` started, and all that belongs to it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(condition: Callable[[], object], *, timeout: float = 120) -> None:
    """Return when `condition` holds."""
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


def metrics(out_dir: Path, event: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with that event, a line still being written left out."""
    path = out_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def steps(out_dir: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 before the first."""
    return max((entry["step"] for entry in metrics(out_dir)), default=0)


def status(out_dir: Path) -> dict[str, Any]:
    """status.json."""
    return dict(json.loads((out_dir / "status.json").read_text()))


def checkpoint(out_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, or the newest."""
    if step is None:
        return max((out_dir / "checkpoints").glob("step_????????"))
    return out_dir / "checkpoints" / f"step_{step:08d}"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def final_hashes(out_dir: Path, step: int | None = None) -> dict[str, Any]:
    """What the checkpoint of `step`, or the newest, holds: SHA-256 of weights and moments, and all that a run counts.

    Of trainer_state.json only what tells how it was computed is left out: flags, ranks and numerics.
    """
    names = ("model.safetensors", "optimizer.safetensors")
    state = json.loads((checkpoint(out_dir, step) / "trainer_state.json").read_text())
    counted = {name: value for name, value in state.items() if name not in ("config", "batch", "numerics")}
    return {name: sha256(checkpoint(out_dir, step) / name) for name in names} | counted


def weights_and_moments(out_dir: Path, step: int | None = None) -> list[str]:
    """Their SHA-256 alone: of runs that came to them in different ways."""
    return [value for name, value in final_hashes(out_dir, step).items() if name.endswith(".safetensors")]


def tree(folder: Path) -> dict[str, str]:
    """Every file under `folder` and its SHA-256: equal where nothing was added, lost or changed."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def copy_until(source: Path, out_dir: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after its checkpoint of `step`."""
    shutil.copytree(source, out_dir)
    for newer in out_dir.glob("checkpoints/step_*"):
        if newer.name > checkpoint(out_dir, step).name:
            shutil.rmtree(newer)
    return out_dir
