"""Losses that jump out of line."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2_ddp.system.fields import count, field, is_finite

HISTORY = 64
MIN_HISTORY = 16


class SpikeGuard:
    """Tells a loss that stands far out of the recent ones, and which data is left out because of it.

    After a spike the run goes back to its last checkpoint, and the steps from there take other data: all that was
    consumed between the checkpoint and the spike is passed over (Chowdhery et al. 2022, PaLM, section 5.1).
    """

    def __init__(self, deviations: float, limit: int) -> None:
        """`deviations` is the threshold in standard deviations above the mean, 0 for no guard."""
        self.deviations, self.limit = deviations, limit
        self.passed_over = 0
        """Steps' worth of data that no step of the run consumed."""
        self.rollbacks = 0
        self._recent: deque[float] = deque(maxlen=HISTORY)

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

    def went_back(self, at_spike: Mapping[str, Any], *, spike_step: int, checkpoint_step: int) -> None:
        """Pass over what was consumed since the checkpoint, whose state was loaded, and all that was passed over before
        by the guard's own state `at_spike`, of which the checkpoint may know nothing.
        """
        self.passed_over = at_spike["passed_over"] + spike_step - checkpoint_step
        self.rollbacks = at_spike["rollbacks"] + 1

    def state_dict(self) -> dict[str, Any]:
        return {"passed_over": self.passed_over, "rollbacks": self.rollbacks, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: where a part cannot be what it should be; nothing is changed then.
        """
        passed_over, rollbacks = count(state, "passed_over"), count(state, "rollbacks")
        recent = field(state, "recent", lambda value: isinstance(value, list) and all(map(is_finite, value)))
        self.passed_over, self.rollbacks = passed_over, rollbacks
        self._recent = deque(recent, maxlen=HISTORY)
