"""What a run says: a line on the console, a line of metrics.jsonl, boards; and silence on the other ranks."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.files import TIME_FORMAT, json_object, read_json, replace_file


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One training step, over all ranks.

    `loss` in nats per token; `grad_norm` before clipping; `step_ms` and `tokens_per_sec` without evaluation, sampling
    and saving; `data_wait_ms` what rank 0 waited for data in that time; `mfu` a fraction of the devices' peak, None
    where that is unknown; `memory_mb` the peak in MiB (on CPU what the process holds); `skipped` the updates left out
    so far because a gradient was not finite.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    step_ms: float
    data_wait_ms: float
    tokens_per_sec: float
    mfu: float | None
    tokens_seen: int
    data_hash: str
    memory_mb: float
    skipped: int

    def console_line(self) -> str:
        return (
            f"step {self.step} | loss: {self.loss:.6f} | lr {self.lr:.4e} | norm: {self.grad_norm:.4f} | "
            f"dt: {self.step_ms:.2f}ms | tok/sec: {self.tokens_per_sec:.2f}"
        )


class RunLog(Protocol):
    """Where a run's events go."""

    def say(self, text: str) -> None:
        """Tell the person who watches."""

    def event(self, name: str, *, step: int, **values: Any) -> None:
        """Write one event to metrics.jsonl."""

    def train(self, metrics: StepMetrics) -> None:
        """A training step: console and metrics.jsonl."""

    def status(self, state: str, *, step: int, **values: Any) -> None:
        """Replace status.json, which also names the process: so others see whether a run that goes on has died.

        One that tells of the end of this very step is left as it is.
        """

    def cut(self, last_step: int) -> None:
        """Forget the events after `last_step`."""

    def flush(self) -> None:
        """Have the events on the disk, where a loss of power leaves them."""

    def close(self) -> None:
        """Give up the files."""


class NullLog:
    """The log of every rank but the first."""

    def say(self, text: str) -> None: ...
    def event(self, name: str, *, step: int, **values: Any) -> None: ...
    def train(self, metrics: StepMetrics) -> None: ...
    def status(self, state: str, *, step: int, **values: Any) -> None: ...
    def cut(self, last_step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Board(Protocol):
    """Another place that shows a run, and does not raise."""

    def add(self, name: str, step: int, values: Mapping[str, Any]) -> None: ...
    def stand(self, state: str, step: int, values: Mapping[str, Any]) -> None: ...
    def cut(self, last_step: int) -> None: ...
    def close(self) -> None: ...


class FileLog:
    """The log of the first rank, in the run directory. A disk that refuses a line gets it later; training goes on."""

    def __init__(self, out_dir: Path, *, resumed_step: int, boards: Sequence[Board] = ()) -> None:
        """Lines of metrics.jsonl past `resumed_step` are cut: their steps are about to be made again."""
        self.out_dir = out_dir
        self._path = out_dir / "metrics.jsonl"
        self._boards = boards
        self._unwritten = b""
        cut_metrics(self._path, resumed_step)
        self._file = self._path.open("ab", buffering=0)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def event(self, name: str, *, step: int, **values: Any) -> None:
        told = json.dumps({"event": name, "step": step} | values)
        self._unwritten += json.dumps(json.loads(told, parse_constant=lambda _: None)).encode() + b"\n"
        self._write()
        for board in self._boards:
            board.add(name, step, values)

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            warn(f"{self._path}: {error.strerror}; its lines wait in memory")

    def train(self, metrics: StepMetrics) -> None:
        self.say(metrics.console_line())
        values = asdict(metrics)
        self.event("train", step=values.pop("step"), **values)

    def status(self, state: str, *, step: int, **values: Any) -> None:
        file = self.out_dir / "status.json"
        if state == "finished" and _tells(file, state, step):
            return
        for board in self._boards:
            board.stand(state, step, values)
        now = time.strftime(TIME_FORMAT)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "time": now}
        try:
            replace_file(file, json.dumps({"state": state, "step": step} | values | who) + "\n")
        except OSError as error:
            warn(f"{file}: {error.strerror}; it should say {state} at step {step}")

    def cut(self, last_step: int) -> None:
        self._write()
        self._file.close()
        self._unwritten = lines_until(last_step, self._unwritten)
        cut_metrics(self._path, last_step)
        self._file = self._path.open("ab", buffering=0)
        for board in self._boards:
            board.cut(last_step)

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # of which the next line tells, or which the file system does not know
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of events after `last_step`, and a torn last line, so that no step appears twice.

    Where they stand at the end, as they do in a log of ours, that needs no room on the disk.
    """
    there = path.read_bytes() if path.exists() else b""
    kept = lines_until(last_step, there)
    if there == kept:
        return
    if there.startswith(kept):
        with contextlib.suppress(OSError):  # of a file system that cannot
            os.truncate(path, len(kept))
            return
    replace_file(path, kept)


def lines_until(last_step: int, lines: bytes) -> bytes:
    """Of lines of JSON, those of events up to `last_step`."""
    kept = []
    for line in lines.splitlines():
        try:
            entry = json_object(line)
        except ValueError:
            continue
        if isinstance(entry.get("step"), int) and entry["step"] <= last_step:
            kept.append(line + b"\n")
    return b"".join(kept)


def memory_mb(peak_bytes: int | None) -> float:
    """Mebibytes: of the device where it counts them, else what this process holds in main memory."""
    import psutil  # only the processes that log need it

    return round((peak_bytes or psutil.Process().memory_info().rss) / 2**20, 1)


def warn(text: str) -> None:
    """A warning to the person who watches, on stderr."""
    tell(f"warning: {text}")


def _tells(file: Path, state: str, step: int) -> bool:
    """Whether a status.json tells this state at this step."""
    try:
        told = read_json(file)
    except (OSError, ValueError):
        return False
    return (told.get("state"), told.get("step")) == (state, step)
