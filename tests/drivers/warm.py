"""Runs the tiny trainer of trainer.py: one or several ranks in forked processes, which start at once; or torchrun."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from running import ROOT, environment, python, train_command
from torch.distributed import TCPStore

DRIVER = Path(__file__).parent / "trainer.py"
TINY = {
    "model": "gpt2-tiny",
    "device": "cpu",
    "dtype": "float32",
    "compile": "off",
    "sequence-length": "8",
    "micro-batch-size": "2",
    "total-batch-size": "64",
    "max-steps": "12",
    "warmup-steps": "3",
    "max-lr": "1e-2",
    "val-every": "0",
    "checkpoint-every": "4",
    "keep-checkpoints": "0",
}
"""Four micro-batches a step, so that 1, 2 and 4 ranks make 4, 2 and 1 micro-steps; checkpoints at 4, 8 and 12."""

Faults = Mapping[str, Mapping[str, Any]]


def flags(out_dir: Path, data_dir: Path, *more: str) -> list[str]:
    tiny = [part for name, value in TINY.items() for part in (f"--{name}", value)]
    return [*tiny, "--out-dir", str(out_dir), "--data-dir", str(data_dir), *more]


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that forks trainers; it ends with this one."""
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    atexit.register(process.kill)
    return process


def ask(**request: Any) -> int:
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a trainer ended; a negative status is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer that runs in a forked process."""

    pid: int
    output: Path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def insist(self, number: int) -> None:
        """Send a signal until the process has ended: two that come at once may count as one."""
        while psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
            self.send(number)
            time.sleep(0.05)

    def wait(self) -> Ended:
        returncode = ask(wait=self.pid)
        files = [Path(f"{self.output}.{name}") for name in ("stdout", "stderr")]
        said = [file.read_text() if file.exists() else "" for file in files]
        shutil.rmtree(self.output.parent)
        return Ended(returncode=returncode, stdout=said[0], stderr=said[1])


def start(out_dir: Path, data_dir: Path, *more: str, faults: Faults | None = None, console: str = "") -> Trainer:
    """Start to train on one rank and return at once; with `console` stdout and stderr go to that file or terminal."""
    return start_forked(flags(out_dir, data_dir, *more), faults=faults, console=console)


def start_forked(
    argv: Sequence[str] = (),
    *,
    program: Sequence[str] = (),
    faults: Faults | None = None,
    console: str = "",
    env: Mapping[str, str] | None = None,
) -> Trainer:
    """As `start`, by a trainer's own flags; or another `program`, by what follows `python` on its command line."""
    output = Path(tempfile.mkdtemp()) / "output"
    words = {"argv": list(argv), "program": list(program)}
    pid = ask(**words, faults=faults or {}, env=dict(env or {}), output=str(output), console=console)
    return Trainer(pid=pid, output=output)


def train(out_dir: Path, data_dir: Path, *more: str, faults: Faults | None = None, status: int = 0) -> Ended:
    """Train on one rank until the process ends, which must be with `status`."""
    done = start(out_dir, data_dir, *more, faults=faults).wait()
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start_ranks(
    nproc: int,
    out_dir: Path,
    data_dir: Path,
    *more: str,
    faults: Faults | None = None,
    torchrun: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start torchrun with `nproc` ranks, in a session of its own, and return at once."""
    return subprocess.Popen(
        [*python(nproc, torchrun), str(DRIVER), *flags(out_dir, data_dir, *more)],
        env=environment({"FAULTS": json.dumps(faults or {})} | dict(env or {})),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    """The workers of a running torchrun, in the order of their ranks."""
    return sorted(psutil.Process(agent.pid).children(), key=lambda worker: int(worker.environ()["RANK"]))


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def finish(process: subprocess.Popen[str], *, timeout: float = 240) -> Ended:
    """Wait for what `start_ranks` started; nothing of it is left running."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            workers = ranks(process)  # each leads a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            for worker in workers:
                worker.kill()
    return Ended(returncode=process.returncode, stdout=stdout, stderr=stderr)


def train_ranks(nproc: int, out_dir: Path, data_dir: Path, *more: str, status: int = 0, **options: Any) -> Ended:
    """Train under torchrun until it ends, which must be with `status`."""
    done = finish(start_ranks(nproc, out_dir, data_dir, *more, **options))
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def fork_ranks(
    nproc: int, out_dir: Path, data_dir: Path, *more: str, faults: Faults | None = None, status: int = 0, **options: Any
) -> Ended:
    """Train on forked ranks, which find torchrun's variables and store, until each has ended with `status`.

    For what ranks compute together. What torchrun does, to start, restart and end them, takes torchrun: `train_ranks`.
    """
    return fork_trainers(nproc, flags(out_dir, data_dir, *more), faults=faults, status=status, **options)


def fork_small(out_dir: Path, data_dir: Path, *more: str, nproc: int = 0, status: int = 0) -> Ended:
    """The run of `running.train`, in one forked process or in forked ranks; each must end with `status`."""
    return fork_trainers(nproc, train_command(out_dir, data_dir, *more)[3:], status=status)


def fork_program(*words: str, nproc: int = 0, env: Mapping[str, str] | None = None, status: int = 0) -> Ended:
    """What `python WORDS` would do, in one forked process or in forked ranks; each must end with `status`."""
    return fork_trainers(nproc, program=words, env=env, status=status)


def kill(pid: int) -> None:
    """End a process, if it has not been waited for already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def fork_trainers(
    nproc: int,
    argv: Sequence[str] = (),
    *,
    program: Sequence[str] = (),
    faults: Faults | None = None,
    status: int = 0,
    meanwhile: Callable[[list[int]], object] = lambda _: None,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """As `fork_ranks`, by a trainer's own flags or of another `program`; what all ranks said, rank by rank.

    For `nproc` 0 it is one process that knows of no ranks.

    `meanwhile` is done while they run, and given their process ids.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        **(env or {}),
    }
    places = [torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)] or [env or {}]
    trainers = [start_forked(argv, program=program, faults=faults, env=place) for place in places]
    bound = threading.Timer(240, lambda: [kill(trainer.pid) for trainer in trainers])  # ranks wait for each other
    bound.start()
    try:
        meanwhile([trainer.pid for trainer in trainers])
    except BaseException:
        for trainer in trainers:
            kill(trainer.pid)
        raise
    ended = [trainer.wait() for trainer in trainers]
    bound.cancel()
    for rank, done in enumerate(ended):
        assert done.returncode == status, f"rank {rank}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    said, told = ("".join(getattr(done, name) for done in ended) for name in ("stdout", "stderr"))
    return Ended(returncode=status, stdout=said, stderr=told)


def clean_run(shared_folder: Path, data_dir: Path, *more: str, nproc: int = 0, faults: Faults | None = None) -> Path:
    """A finished run that nothing disturbed, made once a session. Copy it to change it."""
    key = f"tiny{nproc}-{functools.reduce(lambda text, part: text + part, more, '')}{json.dumps(faults or {})}"
    folder = shared_folder / "".join(letter if letter.isalnum() else "-" for letter in key)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if nproc:
                fork_ranks(nproc, folder, data_dir, *more, faults=faults)
            else:
                train(folder, data_dir, *more, faults=faults)
            (folder / "done").touch()
    return folder
