"""Where the files of a source lie: on this machine, or at an address that fsspec reads; packed, or as they are."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from gpt2_ddp.system.errors import UserError

Place = Path | str
"""A file on this machine, or the address of one elsewhere."""
KINDS = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
LOCKSTEP = ("s3fs", "gcsfs")
"""Packages that work with the fsspec of their own version alone."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file to be read."""

    place: Place
    size: int | None
    """In bytes; None where the server does not tell it."""
    version: str
    """Changes when the file does."""


def suffix_of(place: Place) -> str:
    return PurePosixPath(place).suffix


def kind_of(place: Place) -> str | None:
    """Which of `KINDS` a file's name tells, packed or not; None for another. A packed file without a second suffix is
    text."""
    suffix = suffix_of(place)
    if suffix not in PACKED:
        return suffix if suffix in KINDS else None
    within = PurePosixPath(PurePosixPath(place).stem).suffix or ".txt"
    return within if within in (".txt", ".jsonl") else None


def is_packed(place: Place) -> bool:
    return suffix_of(place) in PACKED


def is_address(argument: str) -> bool:
    return "://" in argument


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it.

    Raises:
        UserError: where fsspec knows no such protocol, or needs a package for it.
    """
    protocol = address.split("://")[0]
    if "::" in address:
        raise UserError(f"{address}: addresses within addresses (::) are not read; copy the files here first")
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").split(".")[0]
        version = f"=={fsspec.__version__}" if package in LOCKSTEP else ""
        mend = f"pip install {package}{version}" if package and package != "fsspec" else str(error)
        raise UserError(f"{address}: {protocol}:// needs another package: {mend}") from error
    except Exception as error:  # whatever that package raises
        raise UserError(f"{address}: {_told(error)}") from error


def found_at(address: str) -> list[Found]:
    """The files at an address: itself, those that match its pattern, or all in its folder, in the order of their names.

    Raises:
        UserError: where there is none, or its server refuses.
    """
    files, path = filesystem(address)
    with refusals_told(address):
        if glob.has_magic(path):
            infos = files.glob(path, detail=True)
        elif files.info(path)["type"] == "directory":
            infos = files.find(path, detail=True)
        else:
            infos = {path: files.info(path)}
        found = [
            Found(place=files.unstrip_protocol(name), size=info.get("size"), version=files.ukey(name))
            for name, info in sorted(infos.items(), key=lambda entry: entry[0].split("/"))
            if info["type"] == "file" and not _is_hidden(name, path)
        ]
    if not found:
        raise UserError(f"{address}: no file there")
    return found


def _is_hidden(name: str, asked: str) -> bool:
    """Whether a file is hidden in the folder `asked`, or below the folders that a pattern names in full."""
    fixed = re.split(r"[*?[]", asked)[0]
    folder = asked if fixed == asked else fixed[: fixed.rfind("/") + 1]
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


@contextlib.contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """The bytes of a file as they lie there, to be read here and there.

    Raises:
        UserError: where its server refuses.
    """
    if isinstance(place, Path):
        with open(place, "rb") as file:
            yield file
        return
    files, path = filesystem(place)
    with refusals_told(place), files.open(path, "rb") as remote:
        yield cast(BinaryIO, io.BufferedReader(remote))


@contextlib.contextmanager
def unpacked(place: Place) -> Iterator[BinaryIO]:
    """What a packed file holds, to be read once from its beginning, in constant memory.

    Raises:
        UserError: where it is no such file, or ends early.
    """
    with opened(place) as packed, _damage_told(place):
        if suffix_of(place) == ".gz":
            with gzip.GzipFile(fileobj=packed) as file:
                yield cast(BinaryIO, io.BufferedReader(file))
        else:
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd") as stream:
                yield cast(BinaryIO, io.BufferedReader(stream))


@contextlib.contextmanager
def _damage_told(place: Place) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(
            f"{place}: cut short or damaged ({_told(error)}); get it again, or unpack it yourself"
        ) from error


@contextlib.contextmanager
def refusals_told(address: str) -> Iterator[None]:
    try:
        yield
    except (UserError, UnicodeError, pyarrow.ArrowException):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{address}: no such file, folder or bucket") from error
    except Exception as error:  # whatever the package for its protocol raises
        raise UserError(
            f"{address}: {_told(error)}; where the network failed, the same command goes on from here"
        ) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
