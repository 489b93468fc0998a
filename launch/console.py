"""What the launcher says: a pipe whose reader has gone, or a full disk behind it, ends no launch.

As `gpt2_ddp.system.console.speak_safely`: the launcher starts any module and imports none of them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO


def say(line: str, stream: TextIO | None) -> None:
    """Write `line` to `stream`, which may be closed, full or without a reader."""
    if stream is not None:
        with suppress(OSError):
            encoding = stream.encoding or "utf-8"
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        settle(stream)


def settle(stream: TextIO | None) -> None:
    """Empty `stream`, into nothing where that fails: else the interpreter's last flush would, with status 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        with suppress(OSError):
            stream.flush()
