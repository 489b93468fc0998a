"""Dies at a chosen file operation."""

from __future__ import annotations

import builtins
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2_ddp.checkpoint import files as checkpoint

OPERATIONS = ("open", "close", "fsync", "mkdir", "rename", "unlink", "rmdir")


class Disk:
    """Counts what a save asks of the file system; operation number `fatal` is not done, and the process is killed.

    A fatal write is done by half. Files are not buffered, so that each write of the program is one to the disk.
    """

    def __init__(self, fatal: int, on_death: Callable[[str], object] = lambda _: None) -> None:
        self.fatal, self.on_death = fatal, on_death
        self.operations: list[str] = []

    def count(self, name: str, half_done: Callable[[], object] = lambda: None) -> None:
        self.operations.append(name)
        if len(self.operations) == self.fatal:
            half_done()
            self.fatal = 0  # what `on_death` does counts no more
            self.on_death(name)
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it every operation of this thread counts; training goes on in another, and flushes its log."""
        thread = threading.get_ident()
        originals = {name: getattr(os, name) for name in OPERATIONS}
        for name, original in originals.items():
            setattr(os, name, self._counted(name, original, thread))
        checkpoint.open = lambda path, mode: CountedFile(self, path, mode)
        try:
            yield
        finally:
            del checkpoint.open
            for name, original in originals.items():
                setattr(os, name, original)

    def _counted(self, name: str, original: Callable[..., Any], thread: int) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            file = f"/proc/self/fd/{args[0]}" if isinstance(args[0], int) else str(args[0])
            self.count(f"{name} {Path(os.path.realpath(file)).name}")
            return original(*args, **kwargs)

        return operation


class CountedFile:
    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        self.disk, self.name = disk, path.name
        disk.count(f"open {self.name}")
        self.file = builtins.open(path, mode, buffering=0)  # noqa: SIM115  closed by `__exit__`

    def write(self, data: bytes | memoryview) -> int:
        self.disk.count(f"write {self.name}", lambda: self.file.write(data[: len(data) // 2]))
        return self.file.write(data)

    def read(self, size: int) -> bytes:
        return self.file.read(size)

    def flush(self) -> None:
        self.disk.count(f"flush {self.name}")

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.count(f"close {self.name}")
        self.file.close()
