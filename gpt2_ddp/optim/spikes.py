"""Losses that jump out of line."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HISTORY = 64
MIN_HISTORY = 16


class SpikeGuard:
    """Tells a loss that stands far out of the recent ones, and which data is left out because of it.

    After a spike the run goes back to its last checkpoint, and the steps from there take other data: all that was
    consumed between the checkpoint and the spike is passed over (Chowdhery et al. 2022, PaLM, section 5.1).
    """

    def __init__(self, deviations: float, limit: int, state: Mapping[str, Any] | None = None) -> None:
        """`deviations` is the threshold in standard deviations above the mean, 0 for no guard."""
        state = state or {}
        self.deviations, self.limit = deviations, limit
        self.passed_over: int = state.get("passed_over", 0)
        """Steps' worth of data that no step of the run consumed."""
        self.rollbacks: int = state.get("rollbacks", 0)
        self._recent: deque[float] = deque(state.get("recent", []), maxlen=HISTORY)

    def sees_spike(self, loss: Tensor) -> bool:
        """Whether `loss` (0-dim) is a spike; if not, it joins the recent losses. Waits for the device."""
        if not self.deviations:
            return False
        value = float(loss)
        if not math.isfinite(value):
            return False  # such an update has been skipped already
        if len(self._recent) >= MIN_HISTORY and self.rollbacks < self.limit:
            limit = statistics.fmean(self._recent) + self.deviations * statistics.stdev(self._recent)
            if value > limit:
                return True
        self._recent.append(value)
        return False

    def went_back(self, *, spike_step: int, checkpoint_step: int, state: Mapping[str, Any]) -> None:
        """Pass over what was consumed since the checkpoint, whose own guard `state` tells the losses before it."""
        self.passed_over += spike_step - checkpoint_step
        self.rollbacks += 1
        self._recent = deque(state.get("recent", []), maxlen=HISTORY)

    def state(self) -> dict[str, Any]:
        return {"passed_over": self.passed_over, "rollbacks": self.rollbacks, "recent": list(self._recent)}
