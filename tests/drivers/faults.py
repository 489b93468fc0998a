"""What can go wrong in a training process, each done for real inside it: `FAULTS` maps names to functions.

Steps are counted by the data they consume (`StepBatch.step`). Faults that strike once leave a file in the run
directory, so that the process that resumes is spared.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from drivers.disk import Disk

from gpt2_ddp import periodic, train
from gpt2_ddp.build import settling
from gpt2_ddp.checkpoint import files as checkpoint
from gpt2_ddp.checkpoint import writer
from gpt2_ddp.checkpoint.state import weights_and_moments
from gpt2_ddp.data.loader import StepBatch, TrainData
from gpt2_ddp.metrics import profiling
from gpt2_ddp.optim import updates
from gpt2_ddp.run import Run
from gpt2_ddp.system.speed import MatmulSpeed


def this_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def before_step(do: Callable[[Run, StepBatch], None]) -> None:
    original = train.train_step

    def train_step(run: Run, batch: StepBatch) -> periodic.StepResult:
        do(run, batch)
        return original(run, batch)

    train.train_step = train_step


def first_time(mark: Path) -> bool:
    """Whether `mark` was not there; it is now."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_to_go(run: Run, mark: str) -> None:
    """Show a file and wait for one named `go`, or to be told to stop."""
    mark_file = run.config.out_dir / mark
    if not first_time(mark_file):
        return
    mark_file.write_text(str(os.getpid()))
    while not (run.config.out_dir / "go").exists() and run.stop.reason is None:
        time.sleep(0.01)


def slow_steps(*, seconds: float) -> None:
    before_step(lambda *_: time.sleep(seconds))


def slow_trace(*, seconds: float) -> None:
    """It takes long to write."""
    original = profiling.profile.export_chrome_trace

    def export(self: profiling.profile, path: str) -> None:
        time.sleep(seconds)
        original(self, path)

    profiling.profile.export_chrome_trace = export  # type: ignore[method-assign]


def stop_after(*, step: int) -> None:
    """Ask by the stop file to stop after `step`."""
    before_step(lambda run, batch: (run.config.out_dir / "stop").touch() if batch.step == step else None)


def hold(*, where: str, step: int, rank: int = 0) -> None:
    """Wait once on one rank, at the beginning of a step or a validation."""
    if rank != this_rank():
        return
    if where == "step":
        before_step(lambda run, batch: wait_to_go(run, "held") if batch.step == step else None)
        return
    original = train.evaluate

    def evaluate(run: Run, evaluations: Any) -> None:
        if run.state.step == step:
            wait_to_go(run, "held")
        original(run, evaluations)

    train.evaluate = evaluate


def hold_save(*, step: int) -> None:
    """Wait in the middle of the save of `step`, once, for the file `go`, whatever signals come."""
    original, write_file = writer.write_checkpoint, checkpoint._write_file

    def write_checkpoint(path: Path, *rest: Any) -> int:
        if path.name != checkpoint.step_name(step) or not first_time(path.parent.parent / "saving"):
            return original(path, *rest)

        def slow_write_file(file: Path, content: Any) -> dict[str, Any]:
            while file.name == "optimizer.safetensors" and not (path.parent.parent / "go").exists():
                time.sleep(0.01)
            return write_file(file, content)

        checkpoint._write_file = slow_write_file
        try:
            return original(path, *rest)
        finally:
            checkpoint._write_file = write_file

    writer.write_checkpoint = write_checkpoint


def kill(*, steps: Sequence[int], rank: int = 0, when_saved: bool = False) -> None:
    """SIGKILL this process at the beginning of `steps`, once at each; with `when_saved` after the last save due."""

    def die(run: Run, batch: StepBatch) -> None:
        if batch.step in steps and rank == this_rank() and first_time(run.config.out_dir / f"killed{batch.step}"):
            due = run.state.step - run.state.step % run.config.checkpoint_every
            while when_saved and not (run.config.out_dir / "checkpoints" / checkpoint.step_name(due)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(die)


def kill_in_save(*, step: int, operation: int, listing: str = "") -> None:
    """SIGKILL this process at a file operation, counted from 1, of the save of `step`; 0 lists them instead."""
    disk, original = Disk(operation), writer.CheckpointWriter._write

    def write(self: writer.CheckpointWriter, number: int, *rest: Any) -> writer.SaveReport:
        if number != step:
            return original(self, number, *rest)
        with disk.watched():
            report = original(self, number, *rest)
        if listing:
            Path(listing).write_text("\n".join(disk.operations))
        return report

    writer.CheckpointWriter._write = write


def non_finite(*, steps: Sequence[int], where: str, value: float, rank: int = 0) -> None:
    """Make the loss, or one number of one gradient, inf or nan in the first micro-step of `steps` on one rank."""
    struck: list[int] = []

    def strike(run: Run, batch: StepBatch) -> None:
        if batch.step not in steps or rank != this_rank():
            return

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if batch.step in struck:
                return tensor
            struck.append(batch.step)
            changed = tensor.clone()
            changed.view(-1)[0] = value
            return changed

        if where == "loss":
            hook = run.model.register_forward_hook(lambda _module, _inputs, loss: loss * once(torch.ones(())))
        else:
            hook = run.model.h[0].mlp.c_fc.weight.register_hook(once)
        run.data.after_step = hook  # removed before the next step

    def clean_up(run: Run, _: StepBatch) -> None:
        if hook := run.data.__dict__.pop("after_step", None):
            hook.remove()

    before_step(strike)
    before_step(clean_up)  # wraps the other, so it comes first


def leave_out(*, steps: Sequence[int], halve_scale: bool = False) -> None:
    """Compute `steps`, and leave their update of the weights out."""
    original, current = updates.apply_update, [0]
    before_step(lambda _, batch: current.append(batch.step))

    def apply_update(optimizer: Any, scaler: Any, **values: Any) -> Any:
        if current[-1] not in steps:
            return original(optimizer, scaler, **values)
        optimizer.zero_grad(set_to_none=True)
        if halve_scale:
            scaler.load_state_dict({**scaler.state_dict(), "scale": scaler.get_scale() / 2, "_growth_tracker": 0})
        return torch.zeros(()), torch.tensor(True)

    updates.apply_update = apply_update


def spike(*, steps: Sequence[int], factor: float) -> None:
    """Multiply the loss of `steps`, whichever number of update they come to be."""
    current = [0]

    def watch(run: Run, batch: StepBatch) -> None:
        if len(current) == 1:
            run.model.register_forward_hook(lambda *args: args[2] * (factor if current[-1] in steps else 1))
        current.append(batch.step)

    before_step(watch)


def pass_over(*, after: int, by: int) -> None:
    """From the step after `after` on, train on the data of steps that are later by `by`."""
    original = TrainData.load
    TrainData.load = lambda self, step: original(self, step + by if step > after else step)


def flip_bit(*, step: int, rank: int, tensor: str) -> None:
    """Flip one bit of the last number of a parameter or a moment (`NAME.exp_avg`) on one rank before `step`, high
    enough not to be rounded off.
    """

    def flip(run: Run, batch: StepBatch) -> None:
        if batch.step == step and rank == this_rank() and first_time(run.config.out_dir / "flipped"):
            tensors = weights_and_moments(run.model, run.optimizer)
            tensors[tensor].data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1 << 20)

    before_step(flip)


def no_space(*, steps: Sequence[int], once: bool = False) -> None:
    """The disk is full when the checkpoints of `steps` are written, or only when they are first."""
    original, fsync = writer.write_checkpoint, os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_checkpoint(path: Path, *rest: Any) -> int:
        strike = int(path.name[5:]) in steps and (not once or first_time(path.parent.parent / f"full{path.name}"))
        os.fsync = full if strike else fsync
        try:
            return original(path, *rest)
        finally:
            os.fsync = fsync

    writer.write_checkpoint = write_checkpoint


def fill_disk(*, step: int, until: int = 0) -> None:
    """Leave no byte free on the file system of the run directory from `step` on, and free it again before `until`."""

    def fill(run: Run, batch: StepBatch) -> None:
        filler = run.config.out_dir / "filler"
        if batch.step == step:
            futures.wait(run.writer._saves)  # those before it have found room
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 16, 1):
                    try:
                        while file.write(bytes(size)):
                            pass
                    except OSError:
                        continue
        elif batch.step == until:
            filler.unlink()

    before_step(fill)


def other_data(*, rank: int, data_dir: str) -> None:
    """One rank is given another data directory."""
    if rank == this_rank():
        sys.argv += ["--data-dir", data_dir]


def matmuls(*, float32: Sequence[float], bfloat16: Sequence[float]) -> None:
    """This rank multiplies so fast, in FLOP/s by rank; what is asked of it is told on stderr."""
    speed = MatmulSpeed(float32=float32[this_rank()], bfloat16=bfloat16[this_rank()])

    def measure_speed(requested: str, *_: object) -> MatmulSpeed | None:
        sys.stderr.write(f"rank {this_rank()} is measured for {requested}\n")
        return speed if requested == "auto" else None

    settling.measure_speed = measure_speed


def elsewhere(*, rank: int) -> None:
    """One rank's host has another name."""
    if rank == this_rank():
        socket.gethostname = lambda: "elsewhere"


FAULTS = {
    fault.__name__: fault
    for fault in (
        slow_steps, slow_trace, stop_after, hold, hold_save, kill, kill_in_save, non_finite, leave_out, spike,
        pass_over, flip_bit, no_space, fill_disk, other_data, elsewhere, matmuls,
    )
}  # fmt: skip
