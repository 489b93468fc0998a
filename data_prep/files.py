"""Documents from .txt, .jsonl and .parquet files, folders and patterns."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpt2_ddp.system.errors import UserError

from .formats import PARQUET_BYTES, ParquetRows, Piece, json_documents, parquet_pieces, text_documents
from .sources import CHUNK_BYTES

KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
CHUNK_FILES = 256


@dataclass(kw_only=True)
class Files:
    """A document is a line of .jsonl, a row of .parquet, or a .txt file, a long one cut at blank lines.

    Not frozen: a worker keeps its place in a Parquet file.
    """

    paths: tuple[str, ...]
    """Files, folders and glob patterns; a folder's files are taken in the order of their names."""
    text_field: str
    revision: str = ""
    _rows: ParquetRows | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.revision = self.revision or self._digest()

    @property
    def name(self) -> str:
        return f"{' '.join(self.paths)}, field {self.text_field}"

    def left_out(self) -> str:
        """What lies in the folders and is not read, by kinds of file; empty where there is nothing."""
        kinds = Counter[str]()
        for path in _distinct(self.paths):
            kinds.update(_kinds_left_out(path) if path.is_dir() else ["empty"] if not path.stat().st_size else [])
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))

    def check(self) -> None:
        """Open every file and look at its first line, or its columns: hours before its turn may come.

        Raises:
            UserError: for one that does not begin as it should.
        """
        for path in _files(self.paths):
            beginning = Piece(path=path, start=0, stop=1)
            if path.suffix == ".parquet":
                next(parquet_pieces(path, self.text_field), None)
            elif path.suffix == ".jsonl":
                next(iter(json_documents(beginning, self.text_field)), None)
            else:
                path.open("rb").close()

    def chunks(self, first: int) -> Iterator[list[Piece]]:
        number, chunk, size = 0, list[Piece](), 0
        for piece in self._pieces():
            chunk.append(piece)
            size += CHUNK_BYTES if piece.path.suffix == ".parquet" else piece.stop - piece.start
            if size >= CHUNK_BYTES or len(chunk) == CHUNK_FILES:
                if number >= first:
                    yield chunk
                number, chunk, size = number + 1, [], 0
        if chunk and number >= first:
            yield chunk

    def documents(self, chunk: list[Piece]) -> Iterable[str | None]:
        for piece in chunk:
            if piece.path.suffix == ".txt":
                yield from text_documents(piece)
            elif piece.path.suffix == ".jsonl":
                yield from json_documents(piece, self.text_field)
            else:
                if self._rows is None or self._rows.path != piece.path:
                    self._rows = ParquetRows(piece.path, self.text_field)
                yield from self._rows.take(piece)

    def _digest(self) -> str:
        """Changes when a file is added, removed, renamed or written, or is cut otherwise; reads no file."""
        digest, found = hashlib.sha256(f"{CHUNK_BYTES} {CHUNK_FILES} {PARQUET_BYTES}".encode()), False
        for path in _files(self.paths):
            found, status = True, path.stat()
            digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"))
        if not found:
            held = f", which holds {left_out}" if (left_out := self.left_out()) else ""
            raise UserError(f"no {', '.join(KINDS)} file in {' '.join(self.paths)}{held}")
        return digest.hexdigest()

    def _pieces(self) -> Iterator[Piece]:
        for path in _files(self.paths):
            if path.suffix == ".parquet":
                yield from parquet_pieces(path, self.text_field)
                continue
            size = path.stat().st_size
            for start in range(0, size, CHUNK_BYTES):
                yield Piece(path=path, start=start, stop=min(start + CHUNK_BYTES, size))


def _files(arguments: tuple[str, ...]) -> Iterator[Path]:
    for path in _distinct(arguments):
        if path.is_dir():
            yield from _files_under(path)
        elif path.is_file() and path.suffix in KINDS:
            yield path
        else:
            unpack = "; unpack it first" if path.suffix in PACKED else ""
            raise UserError(f"{path}: not a file that ends in {', '.join(KINDS)}{unpack}")


def _files_under(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files_under(Path(entry))
        elif Path(entry).suffix in KINDS and entry.is_file():
            yield Path(entry)


def _kinds_left_out(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        path = Path(entry)
        if entry.name.startswith("."):
            yield "hidden"
        elif entry.is_dir(follow_symlinks=False):
            yield from _kinds_left_out(path)
        elif path.suffix not in KINDS:
            before = path.with_suffix("").suffix  # of b.jsonl.gz, for one
            whole = before + path.suffix if before in KINDS else path.suffix
            yield whole or ("linked folder" if entry.is_dir() else "without a suffix")
        elif not entry.is_file():
            yield f"{path.suffix} that is no regular file"
        elif not entry.stat().st_size:
            yield "empty"


def _distinct(arguments: tuple[str, ...]) -> list[Path]:
    """The paths that the arguments stand for; one within another would put its documents in twice."""
    paths: dict[Path, Path] = {}
    for argument in arguments:
        exact = os.path.lexists(argument)
        matches = [argument] if exact else sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  may be absolute
        if not matches:
            raise UserError(f"{argument}: no such file or folder")
        for match in map(Path, matches):
            if match.resolve() in paths:
                raise UserError(f"{match}: given twice")
            paths[match.resolve()] = match
    for path in paths:
        if outer := next((parent for parent in path.parents if parent in paths), None):
            raise UserError(f"{paths[path]}: given twice, also as part of {paths[outer]}")
    return list(paths.values())
