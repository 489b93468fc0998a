"""A trace of some steps, for Perfetto (ui.perfetto.dev) or chrome://tracing, and a table of what took longest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpt2_ddp.metrics.timer import StepTimer

ROWS = 20
"""Of the table."""


class StepProfiler:
    """Records steps; every rank writes a trace of its own. Recording slows them down, and nothing else.

    The loop names its parts by `region`: data, forward, backward, reduction, update. What DDP sums while a
    backward pass runs lies within that pass.
    """

    def __init__(self, steps: range, directory: Path, *, rank: int, device: torch.device) -> None:
        """The traces go into `directory`; no steps, no trace."""
        self._steps, self._directory, self._rank, self._device = steps, directory, rank, device
        self._profile: profile | None = None

    def before(self, step: int, say: Callable[[str], None], timer: StepTimer) -> None:
        """Begin before the first of the steps, end before the one after the last, in the time of neither."""
        if (self._profile is not None) == (step in self._steps):
            return
        with timer.paused(due=True):
            if self._profile is not None:
                self.end(say)
                return
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._profile = profile(activities=activities)
            self._profile.start()

    def region(self, name: str) -> AbstractContextManager[object]:
        """A part of a step, under its name in the trace; where nothing is recorded it does nothing."""
        return nullcontext() if self._profile is None else record_function(name)

    def end(self, say: Callable[[str], None]) -> None:
        """Write what was recorded, also where the run ends within the steps.

        A disk that refuses it ends no run, nor does a device that has failed: of that the run tells itself.
        """
        recorded, self._profile, self._steps = self._profile, None, range(0)
        if recorded is None:
            return
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        path = self._directory / f"rank{self._rank}.json.gz"
        try:
            self._wait()
            recorded.stop()
            say(recorded.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=50))
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            say(f"the trace {path} could not be written: {error}")
            return
        say(f"trace in {path}, one for each rank: open it at ui.perfetto.dev")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
