"""Where documents come from, cut into chunks that a worker reads on its own."""

from __future__ import annotations

import codecs
import importlib
import itertools
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from gpt2_ddp.system.errors import UserError

STREAM_ROWS = 256
"""Rows of a streamed data set in a chunk: a fixed number, so that a restart can skip whole chunks."""
CHUNK_BYTES = 1 << 21
"""About this much text in a chunk: half a million tokens, a tenth of a second of tokenizing."""
CHUNK_ROWS = 1 << 14


def conversion(beginning: bytes) -> str:
    """The mend for a text that is not UTF-8, by its first bytes."""
    utf_16 = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return f"convert it, for instance by: iconv -f {'UTF-16' if utf_16 else 'LATIN1'} -t UTF-8"


def text_of(value: object, where: str) -> str | None:
    """The text that a row holds: a string, or bytes of UTF-8; None where it holds nothing.

    Raises:
        UserError: for anything else, with `where` it is.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text at byte {error.start} of it; {conversion(value)}") from error
    raise UserError(f"{where}: {type(value).__name__}, not text; choose another --text-field")


class Source(Protocol):
    """Documents in a fixed order.

    The chunks depend on nothing but the source, so that neither the number of workers nor an interruption changes
    what is written. A source is sent to each worker once, a chunk (something small, or its texts) for each task.
    """

    @property
    def name(self) -> str:
        """What it is, for the manifest."""

    @property
    def revision(self) -> str:
        """Which version of it; another version gets another text."""

    def chunks(self, first: int) -> Iterator[Any]:
        """Chunk number `first` and those after it."""

    def documents(self, chunk: Any) -> Iterable[str | None]:
        """The texts of one of the chunks."""


@dataclass(frozen=True, kw_only=True)
class PythonTopics:
    """The Python language reference that ships inside Python, a document a topic."""

    @property
    def name(self) -> str:
        return "pydoc_data.topics"

    @property
    def revision(self) -> str:
        return f"Python {platform.python_version()}"

    def chunks(self, first: int) -> Iterator[list[str]]:
        names = sorted(self._topics())
        return iter([names[i : i + 8] for i in range(0, len(names), 8)][first:])

    def documents(self, chunk: list[str]) -> Iterable[str]:
        topics = self._topics()
        return [topics[name] for name in chunk]

    def _topics(self) -> dict[str, str]:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return topics


@dataclass(frozen=True, kw_only=True)
class DatasetRows:
    """A data set of the `datasets` library that lies on this disk."""

    name: str
    revision: str
    rows: Any
    """datasets.Dataset with the column `field` alone; workers map the same files."""
    field: str

    def chunks(self, first: int) -> Iterator[range]:
        row_bytes = max(1, self.rows.data.nbytes // max(1, len(self.rows)))
        size = min(max(1, CHUNK_BYTES // row_bytes), CHUNK_ROWS)
        for start in range(first * size, len(self.rows), size):
            yield range(start, min(start + size, len(self.rows)))

    def documents(self, chunk: range) -> Iterable[str | None]:
        values = self.rows[chunk.start : chunk.stop][self.field]
        return (text_of(value, f"{self.name}, row {row}") for row, value in zip(chunk, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class DatasetStream:
    """A data set of the `datasets` library that is read as it arrives, in the parent."""

    name: str
    revision: str
    stream: Any
    """datasets.IterableDataset; the workers get None."""
    field: str

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"stream": None}

    def chunks(self, first: int) -> Iterator[list[str | None]]:
        rows = iter(self.stream.skip(first * STREAM_ROWS))
        for number in itertools.count(first):
            try:
                values = [row[self.field] for row in itertools.islice(rows, STREAM_ROWS)]
            except Exception as error:  # whatever the library's network stack raises
                raise UserError(
                    f"{self.name}: stopped after row {number * STREAM_ROWS} ({type(error).__name__}: {error}); run the "
                    "same command again to go on, and if it stops there again, a file of the data set is damaged"
                ) from error
            if not values:
                return
            first_row = number * STREAM_ROWS
            yield [text_of(value, f"{self.name}, row {row}") for row, value in enumerate(values, start=first_row)]

    def documents(self, chunk: list[str | None]) -> Iterable[str | None]:
        return chunk
