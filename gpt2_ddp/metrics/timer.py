"""How long the steps of training take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds spent in training steps alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()

    def restart(self) -> float:
        """Seconds since the last restart, once the device has done what it was given."""
        now = self._settled()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self, *, due: bool) -> Iterator[None]:
        """Within it the clock stands still, if something that is no step is `due`; otherwise nobody waits for anything.

        The device first does what the steps gave it: their time is theirs, even if it is the pause that waits for it.
        """
        if not due:
            yield
            return
        before = self._settled()
        yield
        self._start += self._settled() - before

    def _settled(self) -> float:
        """The time at which the device has done what it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
