"""What looks at a training process from inside and changes nothing: `WATCHERS` maps names to functions, as `FAULTS`."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drivers.faults import before_step, this_rank
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ddp import periodic, train
from gpt2_ddp.data.loader import StepBatch
from gpt2_ddp.evaluation.hellaswag import HellaSwag
from gpt2_ddp.evaluation.sampling import Sample
from gpt2_ddp.evaluation.validation import Validation
from gpt2_ddp.metrics.timer import StepTimer
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.run import Run


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
    """List how often compiled blocks are called to train, and how often otherwise, and how many graphs are compiled
    before the first step and after it; by a backend that is quick because it changes nothing.
    """
    seen = {"train": 0, "other": 0, "graphs": 0, "later graphs": 0}
    begun: list[bool] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen["later graphs" if begun else "graphs"] += 1

        def compiled(*tensors: Any) -> Any:
            if begun:
                seen["train" if torch.is_grad_enabled() else "other"] += 1
                Path(f"{listing}.{os.getpid()}").write_text(json.dumps(seen))
            return graph(*tensors)

        return compiled

    torch.compile = functools.partial(torch.compile, backend=compiler)

    before_step(lambda *_: begun.append(True))


def watch_clock(*, listing: str) -> None:
    """List the steps after which the clock of the steps waits for the device."""
    step, waited = [0], set[int]()
    original = StepTimer._settled

    def settled(timer: StepTimer) -> float:
        waited.add(step[0])
        Path(listing).write_text(json.dumps(sorted(waited)))
        return original(timer)

    StepTimer._settled = settled
    before_step(lambda _, batch: step.__setitem__(0, batch.step))


def around(name: str, do: Callable[[Run, Callable[[], Any]], Any]) -> None:
    """Let `do` call what the loop calls by `name`, such as `save`."""
    original = getattr(train, name)
    setattr(train, name, lambda run, *args, **kwargs: do(run, lambda: original(run, *args, **kwargs)))


def around_evaluation(kind: type, do: Callable[[GPT, Callable[[], Any]], Any]) -> None:
    """Let `do` run the evaluations of a kind."""
    original = kind.run
    kind.run = lambda self, model, *args, **kwargs: do(model, lambda: original(self, model, *args, **kwargs))


def work_clock(*, step: float, beside: float) -> None:
    """A clock that goes by work: `step` seconds for a training step, `beside` for each thing done between steps."""
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def read() -> float:
        spend(1e-7)  # else there would be rates without end
        return now[0]

    time.perf_counter = read
    before_step(lambda *_: spend(step))
    for name in ("save", "require_equal_ranks"):
        around(name, lambda _, work: (spend(beside), work())[1])
    for kind in (Validation, HellaSwag, Sample):
        around_evaluation(kind, lambda _, work: (spend(beside), work())[1])


def known_peak(*, flops: float) -> None:
    """The device is one whose peak is known."""
    periodic.peak_flops = lambda *_: flops


def watch_shares(*, listing: str) -> None:
    """List the tokens that this rank's model has read in validations and HellaSwag, at `listing` and the rank."""
    tokens = {"Validation": 0, "HellaSwag": 0}

    def watch(name: str) -> Callable[[GPT, Callable[[], Any]], Any]:
        def count(_: torch.nn.Module, args: Any) -> None:
            tokens[name] += args[0].numel()

        def watched(model: GPT, work: Callable[[], Any]) -> Any:
            hook = model.wte.register_forward_pre_hook(count)
            found = work()
            hook.remove()
            Path(f"{listing}{this_rank()}").write_text(json.dumps(tokens))
            return found

        return watched

    for kind in (Validation, HellaSwag):
        around_evaluation(kind, watch(kind.__name__))


def watch_comparisons(*, listing: str) -> None:
    """List the steps after which the ranks' weights are compared; the loop's own call, which needs no second rank."""
    done = [0]
    before_step(lambda run, _: done.append(run.state.step + 1))

    def watched(_: Any, work: Callable[[], Any]) -> None:
        with Path(listing).open("a") as file:
            file.write(f"{done[-1]} ")
        work()

    around("require_equal_ranks", watched)


def watch_update(*, folder: str) -> None:
    """Keep in `folder` the gradients that this rank's update gets, and what was sent for them."""
    original = train.train_step

    def watched(run: Run, batch: StepBatch) -> periodic.StepResult:
        gradients = dict[str, torch.Tensor]()

        def keep(*_: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in run.model.named_parameters()})

        run.optimizer.register_step_pre_hook(keep)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = original(run, batch)
        reduced = [event.name for event in profile.events() if event.name == "c10d::allreduce_"]
        found = {"all_reduces": len(reduced), "micro_steps": run.plan.grad_accum_steps, "loss": float(result.loss)}
        file = Path(folder) / f"rank{this_rank()}"
        save_file(gradients, file.with_suffix(".safetensors"))
        file.with_suffix(".json").write_text(json.dumps(found))
        return result

    train.train_step = watched


WATCHERS = {
    watcher.__name__: watcher
    for watcher in (
        watch_reads, watch_compiled, watch_clock, work_clock, known_peak, watch_shares, watch_comparisons, watch_update
    )
}  # fmt: skip
