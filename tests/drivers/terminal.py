"""A real terminal with a command in it, and somebody who types."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

from running import ROOT, environment


class Terminal:
    """A command of Python in a terminal of its own; `chunks` is what has come so far."""

    def __init__(self, *words: object) -> None:
        self.master, inside = pty.openpty()
        self.running = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, *map(str, words)],
            env=environment(), cwd=ROOT, stdin=inside, stdout=inside, stderr=inside,
        )  # fmt: skip
        os.close(inside)
        self.chunks: list[bytes] = []

    def read_until(self, pattern: str, *, after: int = 0) -> str:
        """What has come, when `pattern` is in it past the first `after` characters."""
        deadline = time.monotonic() + 240
        while not re.search(pattern, self.text()[after:]):
            assert time.monotonic() < deadline, self.text()
            self.chunks.append(os.read(self.master, 1 << 16))
        return self.text()

    def text(self) -> str:
        """What has come, with the line ends that the command wrote."""
        return b"".join(self.chunks).decode().replace("\r\n", "\n")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Read to the end; the exit status."""
        while True:
            try:
                self.chunks.append(os.read(self.master, 1 << 16))
            except OSError:  # the terminal has no user any more
                break
        os.close(self.master)
        return self.running.wait(timeout=240)
