"""Token shards: the files that training reads. The only definition of their format.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) and then uint16 token ids: the
format of llm.c and modded-nanogpt. build-nanogpt's `.npy` files and nanoGPT's `train.bin` and `val.bin` are read too.
Nothing that is read is trusted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from gpt2_ddp.data.headerless import headerless_tokens
from gpt2_ddp.model.vocabulary import VOCAB_SIZE
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.uint16]

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
PART = ".part"
"""Suffix of a file that is not whole."""
SHRUNK = "{}: no longer holds its {} tokens; {}"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens whose header agrees with its size."""

    path: Path
    tokens: int
    offset: int = HEADER_BYTES
    """Bytes before the first token."""
    vocab_size: int = VOCAB_SIZE
    """The ids that its tokenizer has."""

    def open(self) -> Tokens:
        """The tokens, (tokens,) uint16, memory-mapped and read-only.

        Raises:
            UserError: if the file has become shorter since its header was read.
        """
        try:
            return np.memmap(self.path, "<u2", "r", self.offset, (self.tokens,)).view(np.ndarray)
        except ValueError as error:
            raise UserError(SHRUNK.format(self.path, self.tokens, anew(self.path))) from error


class OpenShard:
    """A shard whose tokens are read here and there; it closes with this object.

    Not through a mapping: its faults read up to megabytes around each place, which then count as the process's memory.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._file = open(shard.path, "rb", buffering=0)  # noqa: SIM115

    def expect(self, start: int, count: int) -> None:
        """Let the disk begin with `count` tokens from `start` on, which will be read."""
        if hasattr(os, "posix_fadvise"):  # macOS has none
            first, size = self.shard.offset + TOKEN_BYTES * start, TOKEN_BYTES * count
            os.posix_fadvise(self._file.fileno(), first, size, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, into: Tokens) -> None:
        """Fill `into` (n,) with the tokens from `start` on; raises as `Shard.open` does."""
        if os.preadv(self._file.fileno(), [into.data], self.shard.offset + TOKEN_BYTES * start) < into.nbytes:
            raise UserError(SHRUNK.format(self.shard.path, self.shard.tokens, anew(self.shard.path)))


def read_shard(path: Path) -> Shard:
    """The shard at `path`, its header checked against its size.

    Raises:
        UserError: for anything that is not a whole token shard.
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        tokens, offset = (_read_npy_header if path.suffix == ".npy" else _read_header)(path, file)
    held = (size - offset) // TOKEN_BYTES
    if size != offset + tokens * TOKEN_BYTES:
        raise UserError(f"{path}: its header says {tokens} tokens, its {size} bytes hold {held}; {anew(path)}")
    if tokens == 0:
        raise UserError(f"{path}: holds no tokens; delete it")
    return Shard(path=path, tokens=tokens, offset=offset)


def check_tokens(shard: Shard, tokens: npt.NDArray[Any], start: int = 0) -> None:
    """Check token ids of any shape that were read from `shard` from token `start` on.

    Raises:
        UserError: if an id is not in the shard's vocabulary, with the shard and the position in it.
    """
    if tokens.size and tokens.max() >= shard.vocab_size:
        at = int((tokens.ravel() >= shard.vocab_size).argmax())
        found = f"token id {tokens.ravel()[at]} at position {start + at}"
        whose = "GPT-2's vocabulary" if shard.vocab_size == VOCAB_SIZE else "the vocabulary"
        raise UserError(f"{shard.path}: {found}, past {whose} of {shard.vocab_size}; {anew(shard.path)}")


def shard_name(split: Split, index: int) -> str:
    """The file name of a split's shard, counted from 0."""
    return f"{split}_{index:06d}.bin"


def header(tokens: int) -> bytes:
    """The first `HEADER_BYTES` bytes of a shard of that many tokens."""
    return np.array([MAGIC, VERSION, tokens, *[0] * (HEADER_BYTES // 4 - 3)], "<i4").tobytes()


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write one shard of (n,) uint16; it appears under its name only when it is whole and on the disk."""
    replace_file(path, header(len(tokens)) + np.ascontiguousarray(tokens, "<u2").tobytes())


def anew(path: Path) -> str:
    """How to get whole shards again; a preparation that is complete by its manifest does nothing a second time."""
    return f"delete {path.parent} and prepare it again"


def regular_size(path: Path) -> int:
    if not path.is_file():  # a pipe or a device would make a read wait for ever
        raise UserError(f"{path}: not a regular file")
    return path.stat().st_size


def _read_header(path: Path, file: BinaryIO) -> tuple[int, int]:
    found = file.read(HEADER_BYTES)
    if (headerless := headerless_tokens(path, found)) is not None:
        return headerless, 0
    if len(found) < HEADER_BYTES:
        raise UserError(f"{path}: shorter than a shard's header of {HEADER_BYTES} bytes; {anew(path)}")
    header = np.frombuffer(found, "<i4")
    if header[0] != MAGIC:
        raise UserError(f"{path}: magic number {header[0]}, a token shard has {MAGIC}; {anew(path)}")
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} of the format, this reads {VERSION}; {anew(path)}")
    return int(header[2]), HEADER_BYTES


def _read_npy_header(path: Path, file: BinaryIO) -> tuple[int, int]:
    try:
        version = np.lib.format.read_magic(file)
        # Version 2 allows a header of 4 GiB; np.save only uses it for structured arrays.
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
    except Exception as error:  # numpy's header parser lets several kinds through
        raise UserError(f"{path}: not a NumPy file: {error}") from error
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise UserError(f"{path}: {dtype} array of shape {shape}, a token shard is one row of uint16")
    return shape[0], file.tell()
