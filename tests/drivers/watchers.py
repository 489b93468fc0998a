"""What looks at a training process from inside and changes nothing: `WATCHERS` maps names to functions, as `FAULTS`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from drivers.faults import before_step
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ddp import train
from gpt2_ddp.build import Run
from gpt2_ddp.data import StepBatch


def watch_reads(*, listing: str) -> None:
    """List the steps in which the host reads a number out of a tensor: where there is a GPU, it waits for it."""
    steps: set[int] = set()

    class Reads(TorchDispatchMode):
        step = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                steps.add(self.step)
                Path(listing).write_text(json.dumps(sorted(steps)))
            return func(*args, **(kwargs or {}))

    reads = Reads()
    before_step(lambda _, batch: setattr(reads, "step", batch.step))
    original = train.train

    def watched(run: Run) -> str:
        with reads:
            return original(run)

    train.train = watched


def watch_compiled(*, listing: str) -> None:
    """List how often the compiled module is called to train, and how often otherwise; compiled by a backend that is
    quick because it changes nothing.
    """
    calls = {"train": 0, "other": 0}
    torch.compile = functools.partial(torch.compile, backend="eager")

    def count(module: torch.nn.Module, _: Any) -> None:
        assert hasattr(module, "_orig_mod"), "not compiled"
        calls["train" if module.training and torch.is_grad_enabled() else "other"] += 1
        Path(listing).write_text(json.dumps(calls))

    def begin(run: Run, batch: StepBatch) -> None:
        if batch.step == 1:
            run.train_model.register_forward_pre_hook(count)

    before_step(begin)


WATCHERS = {watcher.__name__: watcher for watcher in (watch_reads, watch_compiled)}
