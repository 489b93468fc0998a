"""Files that are whole or not there, and directories with one writer, on whatever file system they lie.

Mounted drives, shared folders, FUSE and cluster file systems each miss another part of POSIX. One decision for all of
the project: what a file system cannot do is left out or done in another way; what it can do and failed at is an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_ddp.system.errors import UserError

UNKNOWN_CALL = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Answers to a call that a file system does not have."""
UNFLUSHED_DIRECTORY = UNKNOWN_CALL | {errno.EACCES, errno.EBADF, errno.EISDIR, errno.EPERM}
"""Answers where directories cannot be opened or flushed: EINVAL from CIFS and most of FUSE, EBADF, EISDIR, EPERM from
shared folders, EACCES where a directory may be written to and not be listed."""
NO_RENAME = UNKNOWN_CALL | {
    *(errno.EACCES, errno.EBUSY, errno.EEXIST, errno.EPERM, errno.EPROTO, errno.ETXTBSY, errno.EXDEV),
}
"""Answers where there is no renaming over a file, or of a folder (EXDEV from overlays), or none at all."""

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
"""Of the times in JSON files, in local time."""
MAX_JSON_BYTES = 16 << 20
"""More than any JSON file of ours has, a vocabulary's 1 MB among them."""


def flush(file: BinaryIO) -> None:
    """Return when what was written to `file` is on the disk, or as near to it as the file system brings it.

    Raises:
        OSError: where the disk refuses it.
    """
    file.flush()
    with _left_out(UNKNOWN_CALL):
        os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Return when the names in `directory` are on the disk, or at once where a directory cannot be flushed.

    Raises:
        OSError: where the disk refuses them.
    """
    with _left_out(UNFLUSHED_DIRECTORY):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(directory: Path) -> None:
    """Try that files can be made in `directory`, or in the nearest one above it that is there; nothing is left behind.

    Raises:
        OSError: where they cannot.
    """
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


def rename(source: Path, target: Path, *, last: str = "") -> None:
    """Give `source` the name `target`, in one step where the file system can; a file of that name is replaced.

    Where it cannot, the file of that name goes first, and where there is no renaming at all, `source` is copied: of a
    folder, which holds only files, the file named `last` comes last, so that its absence shows a copy that is torn.

    Raises:
        OSError: where the disk refuses it; `source` is still there.
    """
    try:
        source.rename(target)
        return
    except OSError as error:
        if error.errno not in NO_RENAME or target.is_dir():
            raise
    target.unlink(missing_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        _move_by_copy(source, target, last)


def _move_by_copy(source: Path, target: Path, last: str) -> None:
    """Copy, flush, and only then remove the `source`."""
    if not source.is_dir():
        _copy(source, target)
        source.unlink()
        return
    try:
        target.mkdir()
        for file in sorted(source.iterdir(), key=lambda file: (file.name == last, file.name)):
            _copy(file, target / file.name)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    flush_directory(target)
    shutil.rmtree(source)


def _copy(source: Path, target: Path) -> None:
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            shutil.copyfileobj(old, new, 1 << 22)
            flush(new)
    except OSError:
        target.unlink(missing_ok=True)
        raise


def replace_file(path: Path, contents: bytes | str, *, contested: bool = False) -> None:
    """Put `contents`, text as UTF-8, at `path`: whole or not at all, and on the disk when this returns.

    `contested` is for a file that several processes may write at once, all of them the same.

    Raises:
        OSError: where the disk refuses it, with `path` as the name. What was there before still is there, or, where
            there is no renaming, `contents` are in `NAME.tmp`.
    """
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if contested else f"{path.name}.tmp")
    try:
        try:
            with open(beside, "wb") as file:
                file.write(contents.encode() if isinstance(contents, str) else contents)
                flush(file)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        rename(beside, path)
        flush_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not name the file


def json_object(text: bytes | str) -> dict[str, Any]:
    """The JSON object that `text` is, from wherever it comes.

    Raises:
        UserError: where it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object")
    return value


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: where the file holds something else, or more than `most` bytes.
        OSError: where it cannot be read.
    """
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path} has {size} bytes, more than {most}")
    try:
        return json_object(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} is {error}") from None


@contextlib.contextmanager
def sole_use(directory: Path, refusal: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold `directory` for this process within the block; the kernel gives it free however the process ends.

    `patience` is how many seconds another process is waited for. A file system that knows no locks, as some network
    and cluster file systems, grants the directory to everybody. (`filelock` needs a file of its own there, and one that
    outlives a killed process where it replaces the kernel's lock.)

    Raises:
        UserError: `refusal`, where another process keeps holding it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise UserError(refusal)
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    import fcntl  # not on Windows, which is refused in a line of its own

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP, EBADF: whatever a file system without locks answers
        return True
    return True


@contextlib.contextmanager
def _left_out(answers: frozenset[int]) -> Iterator[None]:
    """Within it, an error that is one of `answers` ends the block and no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in answers:
            raise
