"""A run as the page shows it. Its files may say anything: what is no number or has no place is left out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.history import History, read_history, read_if_whole
from gpt2_ddp.checkpoint.choice import checkpoints

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
"""Of runs, one after the other; those that `plot` gives them."""
MOST_MARKS = 300
"""Of one kind in a figure: those that lie closer together are one."""


class Mark(NamedTuple):
    """Something that happened at a step."""

    kind: str
    step: float
    text: str


class Checkpoint(NamedTuple):
    """A checkpoint that was saved, and whether it still lies there."""

    step: float
    size: float
    """Bytes."""
    seconds: float | None
    """That saving took beside the training; None where the run has not told."""
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of the page."""

    number: int
    """Its place among the runs."""
    name: str
    folder: Path
    history: History
    status: Mapping[str, Any]
    """status.json, nothing where there is none."""
    is_current: bool
    """Whether the files beside it are about this log; not those beside the log of a run that was prolonged since."""

    @property
    def color(self) -> str:
        return COLORS[self.number % len(COLORS)]

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """What config.json says of each start, or else metrics.jsonl of those since which nothing was done again."""
        told = self.history.told.get("starts")
        starts = told if isinstance(told, list) and self.is_current else []
        whole: list[Mapping[str, Any]] = [start for start in starts if isinstance(start, dict)]
        return whole or list(self.history.events.get("start", ()))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All that were saved, in the order of their steps; the sizes of those not told are taken from the disk."""
        on_disk = checkpoints(self.folder / "checkpoints") if self.is_current else []
        there = {int(path.name[5:]): path for path in on_disk}
        found = {}
        for event in self.history.events.get("checkpoint", ()):
            step = event["step"]
            size, seconds = number(event, "bytes"), number(event, "seconds")
            found[step] = Checkpoint(step, size or 0.0, seconds, step in there)
        for step, path in there.items():
            if step not in found:
                found[step] = Checkpoint(step, _size(path), None, True)
        return [found[step] for step in sorted(found)]

    @property
    def marks(self) -> dict[str, list[Mark]]:
        """Restarts, skipped updates, spikes and checkpoints, each by its kind."""
        kinds = {
            "restart": self._restarts(),
            "skip": self._skips(),
            "spike": self._spikes(),
            "checkpoint": [
                Mark("checkpoint", each.step, f"{self.name}: checkpoint of step {each.step:,}, {bytes_text(each.size)}")
                for each in self.checkpoints
            ],
        }
        return {kind: merged(marks) for kind, marks in kinds.items() if marks}

    def _restarts(self) -> list[Mark]:
        reasons = {event["step"]: event.get("reason") for event in self.history.events.get("stop", ())}
        marks = []
        for place, start in enumerate(self.starts[1:], start=2):
            if (step := number(start, "step")) is not None:
                after = f"; it had stopped: {reasons[step]}" if reasons.get(step) else ""
                text = f"{self.name}: start {place}, from step {step:,} on {hardware(start)}{after}"
                marks.append(Mark("restart", step, text))
        return marks

    def _skips(self) -> list[Mark]:
        marks, before = [], 0.0
        for event in self.history.events.get("train", ()):
            skipped = number(event, "skipped") or 0.0
            if skipped > before:
                text = f"{self.name}: {skipped - before:.0f} skipped by step {event['step']:,}, not finite"
                marks.append(Mark("skip", event["step"], text))
            before = skipped
        return marks

    def _spikes(self) -> list[Mark]:
        marks = []
        for event in self.history.events.get("spike", ()):
            step, loss = number(event, "spike_step"), number(event, "loss")
            if step is not None and loss is not None:
                text = f"{self.name}: loss {loss:.5g} at step {step:,} was a spike; back to step {event['step']:,}"
                marks.append(Mark("spike", step, text))
        return marks


def read_record(place: int, name: str, run: Path) -> Record:
    """
    Raises:
        UserError: where `run` is no run directory and no metrics.jsonl.
    """
    history = read_history(run)
    folder = history.path.parent
    is_current = history.path.name == "metrics.jsonl"
    status = read_if_whole(folder / "status.json") if is_current else {}
    return Record(number=place, name=name, folder=folder, history=history, status=status, is_current=is_current)


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number, None where there is something else or nothing."""
    value = values.get(key)
    return value if isinstance(value, int | float) and abs(value) < math.inf else None


def hardware(start: Mapping[str, Any]) -> str:
    """What a start ran on."""
    ranks = start.get("world_size", "?")
    return f"{ranks} x {start.get('device_name') or start.get('device') or 'an unnamed device'}"


def merged(marks: Sequence[Mark]) -> list[Mark]:
    """At most `MOST_MARKS`, by their steps: of those too close together the first, which tells of the others."""
    marks = sorted(marks, key=lambda mark: mark.step)
    width = marks[-1].step / MOST_MARKS
    groups: dict[int, list[Mark]] = {}
    for mark in marks:
        place = int(mark.step / width) if len(marks) > MOST_MARKS and width else len(groups)
        groups.setdefault(min(place, MOST_MARKS - 1), []).append(mark)
    found = []
    for group in groups.values():
        more = f", and {len(group) - 1} more until step {group[-1].step:,.0f}" if len(group) > 1 else ""
        found.append(group[0]._replace(text=group[0].text + more))
    return found


def bytes_text(size: float) -> str:
    """A size as a person reads it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _size(folder: Path) -> float:
    """Bytes of the files in a folder; of a checkpoint that goes meanwhile, what was still there."""
    with contextlib.suppress(OSError):
        return float(sum(file.lstat().st_size for file in folder.iterdir()))
    return 0.0
