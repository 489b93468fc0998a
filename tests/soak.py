"""Train while everything goes wrong, at random, and compare with a run that nothing disturbed.

    python tests/soak.py --minutes 10 --seed 1

A tiny model is trained --reproducible, again and again, until the time is up; the last run is then left alone and
finishes. Each run is a chain of starts on 1, 2 or 4 ranks (under torchrun), and to most of them something happens.
Exit status 0 and a table of what the runs survived, or 1 and what differed; the folder is then kept.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import psutil  # noqa: E402  the folders of the tests and of the project come first
from drivers import warm  # noqa: E402
from running import checkpoint, final_hashes, metrics, status, steps, write_shards  # noqa: E402

from gpt2_ddp.checkpoint.choice import checkpoints  # noqa: E402
from gpt2_ddp.checkpoint.files import faults  # noqa: E402
from gpt2_ddp.system import cli  # noqa: E402

FLAGS = ("--reproducible", "--dropout", "0.1", "--max-steps", "160", "--checkpoint-every", "8", "--keep-checkpoints",
         "3", "--timeout", "12", "--val-every", "20", "--val-tokens", "64")  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONGEST_WAIT = 240.0
"""Seconds that a start may take to end after it was asked or hurt; more is a hang."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long, and which of all the things that can happen."""

    minutes: float = 5.0
    """How long to go on making trouble."""
    seed: int = 0
    """Decides what happens when, as far as the machine lets it."""


class DifferenceError(Exception):
    """A promise that was not kept."""


@dataclass(kw_only=True)
class Start:
    """One start of the trainer that is running: a forked process, or torchrun with its ranks."""

    out_dir: Path
    trainer: warm.Trainer | None = None
    torchrun: Any = None
    began_at: int = field(init=False)
    """How many steps were logged before."""

    def __post_init__(self) -> None:
        self.began_at = steps(self.out_dir)

    @property
    def pid(self) -> int:
        return int(self.trainer.pid if self.trainer else self.torchrun.pid)

    def ranks(self) -> list[int]:
        if self.trainer:
            return [self.trainer.pid]
        try:
            return [child.pid for child in psutil.Process(self.torchrun.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def ended(self) -> bool:
        return warm.gone(psutil.Process(self.trainer.pid)) if self.trainer else self.torchrun.poll() is not None

    def wait_for_step(self, step: int) -> None:
        """Until that step is logged, or the process has ended."""
        limit = time.monotonic() + LONGEST_WAIT
        while steps(self.out_dir) < step and not self.ended():
            if time.monotonic() > limit:
                raise DifferenceError(f"no progress towards step {step} in {self.out_dir}")
            time.sleep(0.02)

    def wait(self) -> warm.Ended:
        limit = time.monotonic() + LONGEST_WAIT
        while not self.ended():
            if time.monotonic() > limit:
                raise DifferenceError(f"a start in {self.out_dir} does not end")
            time.sleep(0.02)
        return self.trainer.wait() if self.trainer else warm.finish(self.torchrun)


@dataclass(kw_only=True)
class Soak:
    """The dice, the folder, and what has happened so far."""

    rng: random.Random
    folder: Path
    data_dir: Path
    counts: Counter[str] = field(default_factory=Counter)

    def start(self, out_dir: Path, nproc: int, *, disturbed: bool = True) -> Start:
        trouble: dict[str, Any] = {"slow_steps": {"seconds": 0.02}} if disturbed else {}
        if disturbed and self.rng.random() < 0.15:
            self.counts["full disk at a save"] += 1
            first = (steps(out_dir) // 8 + 1) * 8
            trouble["no_space"] = {"steps": list(range(first, first + self.rng.choice((8, 24)), 8))}
        self.counts[f"starts on {nproc} rank{'s' if nproc > 1 else ''}"] += 1
        if nproc == 1:
            return Start(out_dir=out_dir, trainer=warm.start(out_dir, self.data_dir, *FLAGS, faults=trouble))
        restarts = [f"--max-restarts={self.rng.randrange(3)}"]
        running = warm.start_ranks(nproc, out_dir, self.data_dir, *FLAGS, faults=trouble, torchrun=restarts)
        return Start(out_dir=out_dir, torchrun=running)

    def strike(self, running: Start) -> None:
        """Do one thing to a start."""
        blows: list[tuple[str, Callable[[Start], None]]] = [
            ("SIGKILL of a rank", self.kill_rank),
            ("SIGKILL of torchrun and ranks", self.kill_all),
            ("SIGKILL of torchrun alone", self.kill_torchrun),
            ("signal to one rank", self.signal_rank),
            ("signal to torchrun or the process", self.signal_all),
            ("SIGINT until it ends", self.insist),
            ("stop file", lambda start: (start.out_dir / "stop").touch()),
            ("SIGSTOP of a rank", self.freeze_rank),
        ]
        name, blow = self.rng.choices(blows, weights=(4, 3, 2, 3, 3, 1, 3, 1))[0]
        if running.trainer and blow in (self.kill_torchrun, self.freeze_rank):
            name, blow = blows[0]
        self.counts[name] += 1
        try:
            blow(running)
        except (ProcessLookupError, FileNotFoundError, psutil.NoSuchProcess):
            self.counts["(struck at nothing: just ended)"] += 1

    def one_rank(self, running: Start) -> int:
        ranks = running.ranks()
        if not ranks:
            raise ProcessLookupError
        return self.rng.choice(ranks)

    def kill_rank(self, running: Start) -> None:
        os.kill(self.one_rank(running), signal.SIGKILL)

    def kill_all(self, running: Start) -> None:
        for pid in (running.pid, *running.ranks()):
            if running.trainer is None or pid == running.pid:
                os.kill(pid, signal.SIGKILL)

    def kill_torchrun(self, running: Start) -> None:
        os.kill(running.pid, signal.SIGKILL)

    def signal_rank(self, running: Start) -> None:
        os.kill(self.one_rank(running), self.rng.choice(SIGNALS))

    def signal_all(self, running: Start) -> None:
        os.kill(running.pid, self.rng.choice(SIGNALS if running.trainer else SIGNALS[:2]))

    def insist(self, running: Start) -> None:
        while not running.ended():
            os.kill(running.pid, signal.SIGINT)
            time.sleep(0.1)

    def freeze_rank(self, running: Start) -> None:
        if steps(running.out_dir) <= running.began_at:
            raise ProcessLookupError  # before its first step a rank may take half an hour
        os.kill(self.one_rank(running), signal.SIGSTOP)

    def damage(self, out_dir: Path) -> None:
        """Spoil the newest checkpoint where there is a good one beside it, or lose all of them."""
        good = [path for path in checkpoints(out_dir / "checkpoints") if not faults(path)]
        if good and self.rng.random() < 0.05:
            self.counts["all checkpoints lost"] += 1
            shutil.rmtree(out_dir / "checkpoints")
        elif len(good) > 1 and self.rng.random() < 0.4:
            file = self.rng.choice(sorted(good[0].iterdir()))
            how = self.rng.choice(("byte flipped", "file truncated", "file deleted"))
            self.counts[how] += 1
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 0xFF
            if how == "byte flipped":
                file.write_bytes(content)
            elif how == "file truncated":
                os.truncate(file, self.rng.randrange(len(content)))
            else:
                file.unlink()

    def episode(self, out_dir: Path) -> None:
        """One start, and what happens to it."""
        nproc = self.rng.choices((1, 2, 4), weights=(6, 3, 1))[0]
        self.damage(out_dir)
        running = self.start(out_dir, nproc)
        if self.rng.random() < 0.2:
            time.sleep(self.rng.uniform(0, 1 if running.trainer else 8))  # into the start itself
        else:
            running.wait_for_step(steps(out_dir) + self.rng.randrange(1, 60))
        self.strike(running)
        if not running.trainer and self.rng.random() < 0.5:
            running.wait_for_step(steps(out_dir) + self.rng.randrange(1, 30))
        self.counts["torchrun restarts"] += self.stop(running)

    def stop(self, running: Start) -> int:
        """Wait until a start ends, asked by the stop file if it was restarted; how often it was."""
        before = len(metrics(running.out_dir, "start"))
        limit = time.monotonic() + 5
        while not running.ended() and time.monotonic() < limit:
            time.sleep(0.02)
        while not running.ended() and time.monotonic() < limit + LONGEST_WAIT:
            with suppress(FileNotFoundError):  # it has not got so far as to make its directory
                (running.out_dir / "stop").touch()
            time.sleep(0.5)
        ended = running.wait()
        if ended.returncode == 2 or "\nerror: /" in f"\n{ended.stderr}":
            raise DifferenceError(f"a start in {running.out_dir} was refused: {ended.stderr[-2000:]}")
        return max(0, len(metrics(running.out_dir, "start")) - before)


def finished(out_dir: Path) -> bool:
    return (out_dir / "status.json").exists() and status(out_dir)["state"] == "finished"


def compare(out_dir: Path, clean: Path) -> None:
    """
    Raises:
        DifferenceError: where a run is not what the undisturbed one is.
    """
    if final_hashes(out_dir, 160) != final_hashes(clean, 160):
        raise DifferenceError(f"{out_dir} ended with other weights")
    chains = [[(entry["step"], entry["data_hash"]) for entry in metrics(run)] for run in (out_dir, clean)]
    if chains[0] != chains[1]:
        raise DifferenceError(f"{out_dir}/metrics.jsonl has not each step once, or saw other data")
    if bad := [path.name for path in checkpoints(out_dir / "checkpoints") if faults(path)]:
        raise DifferenceError(f"{out_dir} kept broken checkpoints: {bad}")
    assert checkpoint(out_dir).name == checkpoint(clean).name


def soak(options: Options, folder: Path) -> Counter[str]:
    """Make trouble until the time is up; what happened, by name."""
    made = Soak(rng=random.Random(options.seed), folder=folder, data_dir=write_shards(folder / "data"))
    clean = folder / "clean"
    warm.train(clean, made.data_dir, *FLAGS)
    deadline = time.monotonic() + 60 * options.minutes
    while time.monotonic() < deadline:
        out_dir = folder / f"run{made.counts['runs compared']}"
        while not finished(out_dir) and time.monotonic() < deadline:
            made.episode(out_dir)
        if not finished(out_dir):
            made.start(out_dir, 1, disturbed=False).wait()
        compare(out_dir, clean)
        made.counts["runs compared"] += 1
        print(f"{made.counts['runs compared']} runs, all as the undisturbed one", flush=True)
        shutil.rmtree(out_dir)
    return made.counts


def main() -> int:
    options = cli.parse(Options, __doc__.splitlines()[0])
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    try:
        counts = soak(options, folder)
    except DifferenceError as difference:
        print(f"DIFFERENT (seed {options.seed}, kept in {folder}): {difference}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:6d}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
