"""How long a run still takes: reckoned from what its steps and the work between them took so far."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpt2_ddp.metrics.log import Board, FileLog

LATEST = 100
"""Logged steps that are reckoned with."""
AT_MOST = 5
"""A time counts for no more than so many medians: a machine that slept through one step will not sleep in all."""
FIRST_STEPS = 3
"""Steps after the first logged one when it is told for the first time."""

QUICK = ("checkpoint", "system")
"""Work that takes next to nothing: not worth a word as long as it was not seen."""


class RemainingTime:
    """Reckons from seconds: those of a step, and of what is done every so many steps, times how often each is left.

    Of the latest of each the mean counts, with no value above `AT_MOST` medians. The first logged step of a process is
    left out: compilers and allocators begin in it.
    """

    def __init__(self, max_steps: int, every: Mapping[str, int]) -> None:
        """`every` tells how many steps lie between two of each work that holds up training; 0 is never."""
        self.max_steps, self._every = max_steps, every
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self._first_step: int | None = None

    def note_step(self, step: int, seconds: float) -> None:
        """A logged step, or the mean of those since the one before."""
        if self._first_step is None:
            self._first_step = step
        else:
            self._seconds["step"].append(seconds)

    def note(self, work: str, seconds: float) -> None:
        """Work that held up training for so long."""
        if work in self._every:
            self._seconds[work].append(seconds)

    def suffices(self, step: int) -> bool:
        """Whether enough steps up to this one were logged to tell from."""
        return self._first_step is not None and step >= self._first_step + FIRST_STEPS

    def seconds(self, step: int) -> float | None:
        """Seconds from after `step` to the end of the run, as far as they are known; None before two logged steps."""
        if not self._seconds["step"]:
            return None
        left = {work: count for work, count in self._left(step).items() if self._seconds[work]}
        return sum(count * _usual(self._seconds[work]) for work, count in left.items())

    def unknown(self, step: int) -> list[str]:
        """Work still to be done that was not seen yet, and is not quick."""
        left = self._left(step).items()
        return [work for work, count in left if count and not self._seconds[work] and work not in QUICK]

    def _left(self, step: int) -> dict[str, int]:
        """How often each work is done after `step`: every so many steps, and after the last."""
        left = {"step": self.max_steps - step}
        for work, every in self._every.items():
            if every:
                last = self.max_steps % every > 0 and step < self.max_steps
                left[work] = self.max_steps // every - step // every + last
        return left


def _usual(seconds: Sequence[float]) -> float:
    most = AT_MOST * median(seconds)
    return sum(min(value, most) for value in seconds) / len(seconds)


class ProgressLog(FileLog):
    """A `FileLog` that also tells how long the run still takes: after its first steps, and at each validation.

    Beside the line on the console that is the event `remaining`: `seconds`.
    """

    def __init__(self, out_dir: Path, *, resumed_step: int, boards: Sequence[Board], remaining: RemainingTime) -> None:
        super().__init__(out_dir, resumed_step=resumed_step, boards=boards)
        self._remaining, self._told = remaining, False

    def event(self, name: str, *, step: int, **values: Any) -> None:
        super().event(name, step=step, **values)
        remaining = self._remaining
        if name == "train":
            remaining.note_step(step, values["step_ms"] / 1000)
        else:
            remaining.note(name, values.get("blocked_seconds", values.get("seconds", 0.0)))
        if name == "val" or (name == "train" and not self._told and remaining.suffices(step)):
            self._tell_remaining(step)

    def _tell_remaining(self, step: int) -> None:
        seconds, unknown = self._remaining.seconds(step), self._remaining.unknown(step)
        if seconds is None or step >= self._remaining.max_steps:
            return
        self._told = True
        beside = f", not counting {', '.join(unknown)}" if unknown else ""
        self.say(f"step {step} | about {duration(seconds)} to go{beside}")
        super().event("remaining", step=step, seconds=round(seconds, 1))


def duration(seconds: float) -> str:
    """In the two largest units: 45 s, 3 min 20 s, 2 h 10 min, 3 d 4 h."""
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
