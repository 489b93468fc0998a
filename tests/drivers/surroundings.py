"""What a training process finds around it, changed inside it: its terminal, its variables, its compiler, its libraries'
services. `SURROUNDINGS` maps names to functions, as `FAULTS`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from drivers.faults import before_step, this_rank
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch.distributed import TCPStore

from gpt2_ddp import train
from gpt2_ddp.build import settling
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation import reference
from gpt2_ddp.metrics import boards
from gpt2_ddp.system.hardware import Hardware


def variables(**values: str | None) -> None:
    """The process was started with these environment variables; None for one that was not set."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def encoding(*, name: str) -> None:
    """As PYTHONIOENCODING does it."""
    sys.stdout.reconfigure(encoding=name, errors="strict")


def ignored_hangup() -> None:
    """As nohup does it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def unmet(*, mark: str) -> None:
    """The other ranks do not come: this one waits in PyTorch's own code for an address at which nobody answers."""

    @contextmanager
    def open_context(_: str) -> Iterator[DistContext]:
        Path(mark).touch()
        TCPStore("127.0.0.1", 9, is_master=False, timeout=timedelta(seconds=120))
        yield DistContext()

    train.open_context = open_context


def send_to_wandb(*, step: int, number: int, listing: str) -> None:
    """A signal to wandb's own processes, listed, before `step`; at the end the board gets a second, not thirty."""
    boards.CLOSING_SECONDS = 1.0

    def send() -> None:
        for child in psutil.Process().children(recursive=True):
            if "wandb" in child.name():
                child.send_signal(number)
                with open(listing, "a") as file:
                    file.write(f"{child.pid}\n")
        time.sleep(0.2)

    before_step(lambda _, batch: send() if batch.step == step else None)


def broken_compiler(*, backward: bool, rank: int | None = None) -> None:
    """The compiler fails, for the forward or only for the backward pass, on one rank or on all."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("PassManager::run failed\nfor this architecture")

    broken = aot_autograd(fw_compiler=nop, bw_compiler=fail) if backward else fail
    torch.compile = functools.partial(torch.compile, backend=broken if rank in (None, this_rank()) else "eager")


def two_kinds_of_gpu() -> None:
    """The ranks but the first have a GPU for which no format is fast and that the compiler does not know."""
    capability = (8, 6) if this_rank() == 0 else (6, 1)
    settling.found_hardware = lambda _: Hardware(device_type="cuda", capability=capability)


def missing(*, module: str) -> None:
    """A package is not installed."""
    sys.modules[module] = None


def published(*, file: str) -> None:
    """Other curves are published than those that we know."""
    reference.FILE = Path(file)


CHANGES = (
    variables, encoding, ignored_hangup, unmet, send_to_wandb, broken_compiler, two_kinds_of_gpu, missing, published,
)  # fmt: skip
SURROUNDINGS = {change.__name__: change for change in CHANGES}
