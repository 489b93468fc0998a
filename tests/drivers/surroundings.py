"""What a training process finds around it: its terminal, its variables, its libraries' services."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
from drivers.faults import before_step
from torch.distributed import TCPStore

from gpt2_ddp import boards, train
from gpt2_ddp.distributed import DistContext


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
    """A signal to wandb's own processes, listed, before `step`; the board gets a second at the end."""
    boards.CLOSING_SECONDS = 1.0

    def send() -> None:
        for child in psutil.Process().children(recursive=True):
            if "wandb" in child.name():
                child.send_signal(number)
                with open(listing, "a") as file:
                    file.write(f"{child.pid}\n")
        time.sleep(0.2)

    before_step(lambda _, batch: send() if batch.step == step else None)


SURROUNDINGS = {each.__name__: each for each in (variables, encoding, ignored_hangup, unmet, send_to_wandb)}
