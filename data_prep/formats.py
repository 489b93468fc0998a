"""Pieces of .txt, .jsonl and .parquet files to documents. A piece is read without the pieces before it.

Of a packed file that cannot be: there, a piece brings its bytes along.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object

from .places import Place, filesystem, is_packed, kind_of, opened, refusals_told, unpacked
from .sources import CHUNK_BYTES, conversion, text_of

DOCUMENT_BYTES = 1 << 16
"""A longer .txt file is cut at blank lines into documents of about this size, so that it is never in memory whole."""
LINE_BYTES = 1 << 26
"""A longer line of a packed .jsonl file is refused: what unpacks to a thousand times its size must fit into memory."""
PARQUET_ROWS = 1024
"""Rows decoded at a time."""
PARQUET_BYTES = 1 << 23
"""Of a larger row group, uncompressed, several workers read pieces, and each decodes the rows before its own, too."""
TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
"""How Arrow calls its layouts of strings and bytes."""
JSON_NAMES = {dict: "an object", list: "an array", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a file: bytes of .txt and .jsonl, rows of one row group of .parquet."""

    path: Place
    start: int
    stop: int
    row_group: int = 0
    contents: bytes | None = None
    """Of a packed file, unpacked: the bytes from `start` on, past `stop` as far as the last document may reach."""
    first_line: int = 1
    """Its number, where a packed file's lines are the contents."""


def packed_pieces(place: Place) -> Iterator[Piece]:
    """A packed file in pieces, which are those of the unpacked one, but that lines are never cut.

    Raises:
        UserError: where it is damaged or ends early, and for a line that is too long.
    """
    with unpacked(place) as file:
        if kind_of(place) == ".txt":
            start, held = 0, b""
            while held := held + file.read(CHUNK_BYTES + DOCUMENT_BYTES - len(held)):
                stop = start + min(len(held), CHUNK_BYTES)
                yield Piece(path=place, start=start, stop=stop, contents=held)
                start, held = stop, held[CHUNK_BYTES:]
            return
        start, line = 0, 1
        while block := file.read(CHUNK_BYTES):
            block += file.readline(LINE_BYTES)
            if len(block) >= CHUNK_BYTES + LINE_BYTES and not block.endswith(b"\n"):
                number = line + block.count(b"\n")
                raise UserError(f"{place}, line {number}: more than {LINE_BYTES:,} bytes; split it, or unpack the file")
            yield Piece(path=place, start=start, stop=start + len(block), contents=block, first_line=line)
            start, line = start + len(block), line + block.count(b"\n")


def text_documents(piece: Piece) -> Iterator[str]:
    """The documents of a .txt file whose numbers times `DOCUMENT_BYTES` lie in the piece.

    Raises:
        UserError: for bytes that are not UTF-8.
    """
    text = piece.contents
    if text is None:
        with opened(piece.path) as file:
            file.seek(piece.start)
            text = file.read(piece.stop - piece.start + DOCUMENT_BYTES)
    begin = _cut(text, 0) if piece.start else 0
    for target in range(DOCUMENT_BYTES, piece.stop - piece.start + DOCUMENT_BYTES, DOCUMENT_BYTES):
        end = _cut(text, target)
        if end == begin:  # the cut before this one reached as far
            continue
        document = text[begin:end].removeprefix(codecs.BOM_UTF8 if piece.start + begin == 0 else b"")
        try:
            yield document.decode()
        except UnicodeDecodeError as error:
            at = piece.start + end - len(document) + error.start
            raise UserError(f"{piece.path}: not UTF-8 text at byte {at}; {_conversion(piece.path)}") from error
        begin = end


def _conversion(place: Place) -> str:
    with unpacked(place) if is_packed(place) else opened(place) as file:
        return conversion(file.read(2))


def _cut(text: bytes, target: int) -> int:
    """Where to cut near `target`: after the next blank line, or line, or before the next character.

    At most `DOCUMENT_BYTES` further on, so that neighbouring pieces find the same cuts.
    """
    target = min(target, len(text))
    window = text[target : target + DOCUMENT_BYTES]
    found = re.search(rb"\n[ \t\r]*\n", window) or re.search(rb"\n", window)
    if found:
        return target + found.end()
    inside_character = re.match(rb"[\x80-\xbf]{0,3}", window)
    return target + (inside_character.end() if inside_character else 0)


def json_documents(piece: Piece, text_field: str) -> Iterator[str | None]:
    """The texts of the lines of a .jsonl file that begin within the piece.

    Raises:
        UserError: for a line that is not a JSON object with that field, by its number.
    """
    for begin, line in _lines(piece):
        if line.isspace():
            continue
        try:
            yield _text_of(json_object(line), text_field)
        except UserError as error:
            where = f"{piece.path}, line {_line_number(piece, begin)}"
            if isinstance(error.__context__, UnicodeDecodeError):
                raise UserError(f"{where}: not UTF-8 text; {_conversion(piece.path)}") from error
            raise UserError(f"{where}: {error}") from error


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within the piece, each with its offset in what the piece is read from."""
    if piece.contents is not None:
        begin = 0
        for line in io.BytesIO(piece.contents):
            yield begin, line
            begin += len(line)
        return
    with opened(piece.path) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline(piece.stop - piece.start + 1)
        while (begin := file.tell()) < piece.stop and (line := file.readline()):
            yield begin, line


def _text_of(record: Mapping[str, object], text_field: str) -> str | None:
    text = record.get(text_field)
    if text_field not in record or not isinstance(text, str | None):
        found = f" ({JSON_NAMES.get(type(text), 'a number')})" if text_field in record else ""
        mend = choices(repr(name) for name, value in record.items() if isinstance(value, str))
        raise UserError(f"no text in {text_field!r}{found}; {mend}")
    return text


def choices(fields: Iterable[str]) -> str:
    """What to do where the field of the texts holds none: the `fields` that do."""
    if found := ", ".join(fields):
        return f"choose --text-field among {found[:200]}"
    return "no other field holds text either: write the texts into a field of their own"


def _line_number(piece: Piece, offset: int) -> int:
    if piece.contents is not None:
        return piece.first_line + piece.contents.count(b"\n", 0, offset)
    count = 1
    with opened(piece.path) as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def parquet_pieces(path: Place, text_field: str) -> Iterator[Piece]:
    """The row groups of a .parquet file, each in as few pieces of like size as `PARQUET_BYTES` allow.

    Raises:
        UserError: for a file that is not Parquet or has no such column of text.
    """
    with _open_parquet(path, text_field) as file:
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            pieces = max(1, math.ceil(group.total_byte_size / PARQUET_BYTES))
            rows = max(1, math.ceil(group.num_rows / pieces))
            for start in range(0, group.num_rows, rows):
                yield Piece(path=path, start=start, stop=min(start + rows, group.num_rows), row_group=index)


class ParquetRows:
    """The texts of one file, in constant memory. Pieces of a row group cost least in their order."""

    def __init__(self, path: Place, text_field: str) -> None:
        self.path, self._text_field = path, text_field
        self._file = _open_parquet(path, text_field)
        self._row_group, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())
        self._texts: Any = pyarrow.array([])

    def take(self, piece: Piece) -> Iterator[str | None]:
        """The texts of `piece`; rows between the last piece and this one are skipped.

        Raises:
            UserError: for a damaged file, and a row whose text is not UTF-8.
        """
        if piece.row_group != self._row_group or piece.start < self._next:
            self._row_group, self._next, self._texts = piece.row_group, 0, pyarrow.array([])
            groups, columns = [piece.row_group], [self._text_field]
            self._batches = self._file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns)
        while self._next < piece.stop:
            if not len(self._texts):
                with _errors_named(piece.path):
                    self._texts = _plain(next(self._batches).column(0))
            skipped = self._next < piece.start
            count = min(len(self._texts), (piece.start if skipped else piece.stop) - self._next)
            taken, self._texts = self._texts.slice(0, count), self._texts.slice(count)
            where, first, self._next = f"{piece.path}, row group {piece.row_group}", self._next, self._next + count
            if skipped:
                continue
            try:
                values = taken.to_pylist()
            except UnicodeDecodeError as error:  # a column that calls itself text and was not checked
                raise UserError(
                    f"{where}, rows {first} to {self._next - 1}: not UTF-8 text; {conversion(b'')}"
                ) from error
            yield from (text_of(value, f"{where}, row {row}") for row, value in enumerate(values, start=first))


def _open_parquet(path: Place, text_field: str) -> Any:
    files, name = filesystem(path) if isinstance(path, str) else (None, path)
    with _errors_named(path):
        file = pyarrow.parquet.ParquetFile(name, filesystem=files)
    schema = file.schema_arrow
    require_text(schema, text_field, str(path))
    return file


def require_text(schema: Any, text_field: str, where: str) -> None:
    """
    Raises:
        UserError: where the column `text_field` of the pyarrow.Schema cannot hold text, with those that can.
    """
    if text_field in schema.names and is_text(schema.field(text_field).type):
        return
    found = f" (it is {schema.field(text_field).type}, not text)" if text_field in schema.names else ""
    mend = choices(field.name for field in schema if is_text(field.type))
    raise UserError(f"{where}: no text column {text_field!r}{found}; {mend}")


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds text: strings or bytes in any layout, codes for them, and types that extend them."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return is_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return str(kind) in TEXT_TYPES


def _plain(array: Any) -> Any:
    """An array without the types that extend or encode its strings."""
    while True:
        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        elif isinstance(array, pyarrow.DictionaryArray):
            array = array.dictionary_decode()
        else:
            return array


@contextlib.contextmanager
def _errors_named(path: Place) -> Iterator[None]:
    refusals = refusals_told(path) if isinstance(path, str) else contextlib.nullcontext()
    try:
        with refusals:
            yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{path}: not a whole Parquet file: {error}") from error
