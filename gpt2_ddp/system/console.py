"""A console that never ends a run: what nobody takes any more is dropped."""

from __future__ import annotations

import errno
import io
import os
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Console(io.FileIO):
    """A descriptor that takes whatever is written to it: what its reader, disk or terminal refuses is dropped."""

    refused: OSError | None = None
    """Why something was dropped."""

    def write(self, data: ReadableBuffer, /) -> int:
        """The number of bytes in `data`, written or not."""
        try:
            written = super().write(data)
        except OSError as error:
            self.refused = error
            written = None
        return memoryview(data).nbytes if written is None else written  # None: a full pipe that does not block


def speak_safely() -> None:
    """Let nothing that is written to stdout and stderr raise from now on, to the interpreter's last flush.

    A pipe whose reader has gone, a terminal that hung up, a full disk behind `> log`, a stream that was closed, an
    encoding without the letter: a run goes on by its files. Letters that the encoding lacks come as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`; the next file to be opened would take the descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        try:
            console = Console(stream.fileno(), "wb", closefd=False)
            stream.flush()
        except OSError:  # what stands there has no descriptor: a notebook's, or a test's
            continue
        safe = io.BufferedWriter(console)
        setattr(
            sys, name, io.TextIOWrapper(safe, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
        )


def lost_output() -> OSError | None:
    """Why a part of stdout was dropped, where somebody would have read it."""
    lost = refused_output()
    return lost if lost is not None and lost.errno != errno.EPIPE else None


def refused_output() -> OSError | None:
    """Why a part of stdout was dropped, a reader that has gone among the reasons."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.refused if isinstance(raw, Console) else None


def visible(text: str) -> str:
    """`text` for a terminal: what moves a cursor, colours, turns the direction or hides comes as an escape.

    Line ends stay; a tab is four blanks.
    """
    shown = text.expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


def printable(text: str) -> str:
    """`text` with escapes for the control characters that a terminal would obey, but for line ends and tabs."""
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in text
    )
