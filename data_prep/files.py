"""Documents from .txt, .jsonl and .parquet files, folders, patterns and addresses."""

from __future__ import annotations

import glob
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from gpt2_ddp.system.errors import UserError

from .formats import PARQUET_BYTES, ParquetRows, Piece, json_documents, packed_pieces, parquet_pieces, text_documents
from .places import KINDS, PACKED, Found, Place, found_at, is_address, is_packed, kind_of, opened, unpacked
from .sources import CHUNK_BYTES

READ = f"{', '.join(KINDS)}, the first two also as {' and '.join(PACKED)}"
UNREAD = (*PACKED, ".bz2", ".xz", ".zip", ".7z")
"""Packed files of which a folder may hold some that are not read, as a .tar.gz."""
CHUNK_FILES = 256
LOCAL = "file://"
"""How fsspec begins the address of a file on this machine."""
UNPACKERS = 4
"""Packed files that are unpacked at a time, to see that they are whole."""


@dataclass(kw_only=True)
class Files:
    """A document is a line of .jsonl, a row of .parquet, or a .txt file, a long one cut at blank lines.

    Not frozen: a worker keeps its place in a Parquet file.
    """

    paths: tuple[str, ...]
    """Files, folders, glob patterns and addresses; a folder's files are taken in the order of their names."""
    text_field: str
    revision: str = ""
    _rows: ParquetRows | None = field(default=None, init=False)
    _elsewhere: dict[str, list[Found]] = field(default_factory=dict, init=False)
    """What each address stood for at the start: asked once, so that it stays the same."""

    def __post_init__(self) -> None:
        self._elsewhere = {path: found_at(path) for path in self.paths if is_address(path)}
        twice = Counter(found.place for files in self._elsewhere.values() for found in files)
        if place := next((place for place, count in twice.items() if count > 1), None):
            raise UserError(f"{place}: given twice")
        self.revision = self.revision or self._digest()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_elsewhere": {}}  # a worker gets pieces of them

    @property
    def name(self) -> str:
        return f"{' '.join(self.paths)}, field {self.text_field}"

    def left_out(self) -> str:
        """What lies in the folders and is not read, by kinds of file; empty where there is nothing."""
        kinds = Counter[str]()
        for path in _distinct(self.paths):
            kinds.update(_kinds_left_out(path) if path.is_dir() else ["empty"] if not path.stat().st_size else [])
        for found in self._elsewhere.values():
            kinds.update(_suffixes(file.place) for file in found if not kind_of(file.place))
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))

    def inputs(self) -> Iterator[Path]:
        """The files and folders on this machine that are named. Of a folder that a pattern matches, which may be one
        that an earlier run has made, its files that are read.
        """
        for path in _distinct(self.paths):
            named = path in map(Path, self.paths)
            yield from [path] if named or not path.is_dir() else _files_under(path)
        for found in (found for files in self._elsewhere.values() for found in files):
            if str(found.place).startswith(LOCAL):
                yield Path(str(found.place).removeprefix(LOCAL))

    def check(self, *, whole: bool = True) -> None:
        """Open every file and look at its first line, or its columns: hours before its turn may come.

        With `whole`, packed files on this machine are unpacked to their end, with nothing kept of it.

        Raises:
            UserError: for one that does not begin as it should, and a packed one that is cut short.
        """
        packed = list[Path]()
        for place in (found.place for found in self._files()):
            if kind_of(place) == ".parquet":
                next(parquet_pieces(place, self.text_field), None)
                continue
            first = next(packed_pieces(place), None) if is_packed(place) else Piece(path=place, start=0, stop=1)
            if first and kind_of(place) == ".jsonl":
                next(json_documents(first, self.text_field), None)
            elif first:
                with opened(place):
                    pass
            packed += [place] if is_packed(place) and isinstance(place, Path) else []
        if whole and packed:
            _require_whole(packed)

    def chunks(self, first: int) -> Iterator[list[Piece]]:
        number, chunk, size = 0, list[Piece](), 0
        for piece in self._pieces():
            chunk.append(piece)
            size += CHUNK_BYTES if kind_of(piece.path) == ".parquet" else piece.stop - piece.start
            if size >= CHUNK_BYTES or len(chunk) == CHUNK_FILES:
                if number >= first:
                    yield chunk
                number, chunk, size = number + 1, [], 0
        if chunk and number >= first:
            yield chunk

    def documents(self, chunk: list[Piece]) -> Iterable[str | None]:
        for piece in chunk:
            if kind_of(piece.path) == ".txt":
                yield from text_documents(piece)
            elif kind_of(piece.path) == ".jsonl":
                yield from json_documents(piece, self.text_field)
            else:
                if self._rows is None or self._rows.path != piece.path:
                    self._rows = ParquetRows(piece.path, self.text_field)
                yield from self._rows.take(piece)

    def _digest(self) -> str:
        """Changes when a file is added, removed, renamed or written, or is cut otherwise; reads no file."""
        digest, found = hashlib.sha256(f"{CHUNK_BYTES} {CHUNK_FILES} {PARQUET_BYTES}".encode()), False
        for file in self._files():
            found = True
            digest.update(os.fsencode(f"{file.place}\0{file.size}\0{file.version}\0"))
        if not found:
            held = f", which holds {left_out}" if (left_out := self.left_out()) else ""
            raise UserError(f"no {', '.join(KINDS)} file in {' '.join(self.paths)}{held}")
        return digest.hexdigest()

    def _files(self) -> Iterator[Found]:
        for path in _files(self.paths):
            status = path.stat()
            yield Found(place=path, size=status.st_size, version=str(status.st_mtime_ns))
        for files in self._elsewhere.values():
            yield from (file for file in files if kind_of(file.place))

    def _pieces(self) -> Iterator[Piece]:
        for file in self._files():
            if kind_of(file.place) == ".parquet":
                yield from parquet_pieces(file.place, self.text_field)
            elif is_packed(file.place):
                yield from packed_pieces(file.place)
            elif file.size is None:
                raise UserError(f"{file.place}: its server does not tell its size; copy it here first")
            else:
                for start in range(0, file.size, CHUNK_BYTES):
                    yield Piece(path=file.place, start=start, stop=min(start + CHUNK_BYTES, file.size))


def _require_whole(packed: list[Path]) -> None:
    """Unpack files to their end, with nothing kept of it.

    Raises:
        UserError: for one that is damaged or ends early.
    """
    given_up = threading.Event()

    def read(path: Path) -> int:
        with unpacked(path) as file:
            while not given_up.is_set() and file.read(1 << 20):
                pass
        return path.stat().st_size

    bytes_in_all = sum(path.stat().st_size for path in packed)
    bar = tqdm(total=bytes_in_all, unit="B", unit_scale=True, desc="are the packed files whole?", leave=False, delay=1)
    with bar, ThreadPoolExecutor(UNPACKERS) as pool:
        try:
            for size in pool.map(read, packed):
                bar.update(size)
        finally:
            given_up.set()


def _files(arguments: tuple[str, ...]) -> Iterator[Path]:
    for path in _distinct(arguments):
        if path.is_dir():
            yield from _files_under(path)
        elif path.is_file() and kind_of(path):
            yield path
        else:
            unpack = "; unpack it first" if path.suffix in UNREAD else ""
            raise UserError(f"{path}: not a file that ends in {READ}{unpack}")


def _files_under(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files_under(Path(entry))
        elif kind_of(entry.name) and entry.is_file():
            yield Path(entry)


def _kinds_left_out(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        path = Path(entry)
        if entry.name.startswith("."):
            yield "hidden"
        elif entry.is_dir(follow_symlinks=False):
            yield from _kinds_left_out(path)
        elif not kind_of(path):
            yield "linked folder" if entry.is_dir() and not path.suffix else _suffixes(path)
        elif not entry.is_file():
            yield f"{path.suffix} that is no regular file"
        elif not entry.stat().st_size:
            yield "empty"


def _suffixes(place: Place) -> str:
    """What a file's name ends in: `.bz2`, or `.jsonl.bz2`, or nothing, said in words."""
    name = PurePosixPath(place)
    before = PurePosixPath(name.stem).suffix if name.suffix in UNREAD else ""
    return before + name.suffix or "without a suffix"


def _distinct(arguments: tuple[str, ...]) -> list[Path]:
    """The paths here that the arguments stand for; one within another would put its documents in twice."""
    paths: dict[Path, Path] = {}
    for argument in arguments:
        if is_address(argument):
            continue
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
