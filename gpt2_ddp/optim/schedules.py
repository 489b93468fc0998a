"""The learning rate of each update. A new schedule is a class here, a row in `SCHEDULES`, its name in config.py."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A linear rise from 0 to `max_lr` at step `warmup_steps`, then the subclass's way down to `final_lr`.

    The fields, and those that a subclass adds, are flags or properties of `TrainConfig` by the same name.
    """

    max_steps: int
    warmup_steps: int
    max_lr: float
    final_lr: float

    def rate(self, step: int) -> float:
        """The rate of update `step`, counted from 1; exactly `final_lr` at the last step and at any after it."""
        if step <= self.warmup_steps:
            return self.max_lr * step / self.warmup_steps
        if step >= self.max_steps:
            return self.final_lr
        if step <= self.last_stable_step:
            return self.max_lr
        progress = (step - self.last_stable_step) / (self.max_steps - self.last_stable_step)
        return self.final_lr + self.height(progress) * (self.max_lr - self.final_lr)

    @property
    def last_stable_step(self) -> int:
        """The last step at `max_lr`."""
        return self.warmup_steps

    @property
    def branch_step(self) -> int | None:
        """The step whose checkpoint is kept, since a longer run would go on from there; None where none would."""
        return None

    @abstractmethod
    def height(self, progress: float) -> float:
        """How high the rate stands between `final_lr` (0) and `max_lr` (1), `progress` of the way down done, which lies
        between 0 and 1.
        """


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine (Loshchilov and Hutter 2017, SGDR, without restarts)."""

    def height(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line."""

    def height(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Linear):
    """`max_lr` until the last steps, a fraction of all; there a straight line (Hu et al. 2024, arXiv:2404.06395)."""

    cooldown_fraction: float

    @property
    def last_stable_step(self) -> int:
        return max(self.warmup_steps, self.max_steps - round(self.cooldown_fraction * self.max_steps))

    @property
    def branch_step(self) -> int | None:
        return self.last_stable_step if 0 < self.last_stable_step < self.max_steps else None


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "linear": Linear, "wsd": WarmupStableDecay}
