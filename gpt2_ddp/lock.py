"""One trainer at a time in a run directory: a second start, or ranks that outlived their torchrun, would spoil it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 10.0
"""A trainer that is just ending, or notices that its torchrun is gone, needs a moment."""


@contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process within the block; the kernel gives it free however the process ends.

    A file system that knows no locks, as some cluster file systems, grants it to everybody.

    Raises:
        ValueError: where another process keeps holding it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise ValueError(f"{directory} is in use by another trainer: end it, or choose another --out-dir")
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
