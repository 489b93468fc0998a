"""Token shards: the files that training reads, and the manifest beside them. The only definition of their format.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros) and then uint16 token ids: the
format of llm.c and modded-nanogpt. build-nanogpt's `.npy` files are read too. Nothing that is read is trusted.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from gpt2_ddp.model.vocabulary import VOCAB_SIZE
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object, replace_file

Split = Literal["train", "val"]
Tokens = npt.NDArray[np.uint16]
Value = TypeVar("Value")

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 26
"""A longer manifest is refused unread; a shard takes about 130 bytes of it."""
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

    def open(self) -> Tokens:
        """The tokens, (tokens,) uint16, memory-mapped and read-only.

        Raises:
            UserError: if the file has become shorter since its header was read.
        """
        try:
            return np.memmap(self.path, "<u2", "r", self.offset, (self.tokens,)).view(np.ndarray)
        except ValueError as error:
            raise UserError(SHRUNK.format(self.path, self.tokens, _anew(self.path))) from error


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
            raise UserError(SHRUNK.format(self.shard.path, self.shard.tokens, _anew(self.shard.path)))


def find_shards(data_dir: Path, split: Split) -> tuple[Shard, ...]:
    """The shards of one split, sorted by name: ours, llm.c's `*train*.bin`, build-nanogpt's `*train*.npy`.

    Raises:
        UserError: for a missing or empty directory, a shard that is not one, a split without shards, and a
            directory that does not hold what its manifest says.
    """
    prepare = f"prepare it with: python -m data_prep demo --out {data_dir}"
    if not data_dir.is_dir():
        raise UserError(f"no data directory at {data_dir}; {prepare}")
    paths = {path: _split_of(path) for path in sorted(data_dir.iterdir()) if path.suffix in (".bin", ".npy")}
    manifest = read_manifest(data_dir)
    if manifest and not manifest.complete:
        raise UserError(f"the preparation of {data_dir} did not finish; run the same data_prep command again")
    if not any(paths.values()):
        unnamed = [path.name for path in paths][:1]
        mend = f"{unnamed[0]} says neither train nor val, rename it" if unnamed else prepare
        raise UserError(f"no token shards (*train*.bin, *val*.bin, *.npy) in {data_dir}; {mend}")
    shards = tuple(read_shard(path) for path, found in paths.items() if found == split)
    if manifest:
        _compare({shard.path.name: shard.tokens for shard in shards}, manifest, split, data_dir)
    if not shards:
        without = ", or leave validation out by --val-every 0" if split == "val" else ""
        raise UserError(f"no {split} shard in {data_dir}: {_anew(data_dir / MANIFEST)}{without}")
    return shards


def read_shard(path: Path) -> Shard:
    """The shard at `path`, its header checked against its size.

    Raises:
        UserError: for anything that is not a whole token shard.
    """
    size = _regular_size(path)
    with open(path, "rb") as file:
        tokens, offset = (_read_npy_header if path.suffix == ".npy" else _read_header)(path, file)
    held = (size - offset) // TOKEN_BYTES
    if size != offset + tokens * TOKEN_BYTES:
        raise UserError(f"{path}: its header says {tokens} tokens, its {size} bytes hold {held}; {_anew(path)}")
    if tokens == 0:
        raise UserError(f"{path}: holds no tokens; delete it")
    return Shard(path=path, tokens=tokens, offset=offset)


def check_tokens(shard: Shard, tokens: npt.NDArray[Any], start: int = 0) -> None:
    """Check token ids of any shape that were read from `shard` from token `start` on.

    Raises:
        UserError: if an id is not in GPT-2's vocabulary, with the shard and the position in it.
    """
    if tokens.size and tokens.max() >= VOCAB_SIZE:
        at = int((tokens.ravel() >= VOCAB_SIZE).argmax())
        found = f"token id {tokens.ravel()[at]} at position {start + at}"
        raise UserError(f"{shard.path}: {found}, past GPT-2's vocabulary of {VOCAB_SIZE}; {_anew(shard.path)}")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the manifest says of one shard."""

    name: str
    tokens: int
    sha256: str
    """Of the whole file, as `sha256sum` prints it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What lies in a data directory that `data_prep` wrote, and where it came from."""

    source: str
    revision: str
    settings: dict[str, object]
    documents: dict[Split, int]
    shards: tuple[ShardRecord, ...]
    complete: bool
    next_chunk: int
    """Of the source, where an unfinished preparation goes on."""
    unfinished: dict[Split, int]
    """Tokens in the part file of each split's next shard."""
    tokenizer: str = "gpt2"


def shard_name(split: Split, index: int) -> str:
    """The file name of a split's shard, counted from 0."""
    return f"{split}_{index:06d}.bin"


def read_manifest(data_dir: Path) -> Manifest | None:
    """The manifest of a data directory, None where there is none.

    Raises:
        UserError: if it is not such a manifest.
    """
    path = data_dir / MANIFEST
    if not path.exists():
        return None
    try:
        if (size := _regular_size(path)) > MANIFEST_BYTES:
            raise UserError(f"{size} bytes, more than {MANIFEST_BYTES}")
        return _parse_manifest(json_object(path.read_bytes()))
    except ValueError as error:
        raise UserError(
            f"{path}: not a manifest of token shards ({error}); delete it to train on the shards as they are, or "
            f"{_anew(path)}"
        ) from error


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest, atomically and durably."""
    replace_file(data_dir / MANIFEST, json.dumps(asdict(manifest), indent=1))


def header(tokens: int) -> bytes:
    """The first `HEADER_BYTES` bytes of a shard of that many tokens."""
    return np.array([MAGIC, VERSION, tokens, *[0] * (HEADER_BYTES // 4 - 3)], "<i4").tobytes()


def write_shard(path: Path, tokens: Tokens) -> None:
    """Write one shard of (n,) uint16; it appears under its name only when it is whole and on the disk."""
    replace_file(path, header(len(tokens)) + np.ascontiguousarray(tokens, "<u2").tobytes())


def _anew(path: Path) -> str:
    """How to get whole shards again; a preparation that is complete by its manifest does nothing a second time."""
    return f"delete {path.parent} and prepare it again"


def _split_of(path: Path) -> Split | None:
    """The split that a file's name tells, first by whole words: `retrieval_train_0.bin` is training data."""
    words = re.split("[^a-z]+", path.stem.lower())
    named: list[Split] = [split for split in get_args(Split) if split in words]
    named = named or [split for split in get_args(Split) if any(split in word for word in words)]
    if len(named) > 1:
        raise UserError(f"{path}: its name says both train and val; rename it")
    return named[0] if named else None


def _compare(shards: dict[str, int], manifest: Manifest, split: Split, data_dir: Path) -> None:
    listed = {record.name: record.tokens for record in manifest.shards if record.name.startswith(split)}
    for name in sorted(shards.keys() | listed.keys()):
        if (here := shards.get(name)) != (there := listed.get(name)):
            raise UserError(f"{data_dir / name}: {there} tokens by the manifest, {here} here; {_anew(data_dir / name)}")


def _regular_size(path: Path) -> int:
    if not path.is_file():  # a pipe or a device would make a read wait for ever
        raise UserError(f"{path}: not a regular file")
    return path.stat().st_size


def _read_header(path: Path, file: BinaryIO) -> tuple[int, int]:
    found = file.read(HEADER_BYTES)
    if len(found) < HEADER_BYTES:
        raise UserError(f"{path}: shorter than a shard's header of {HEADER_BYTES} bytes; {_anew(path)}")
    header = np.frombuffer(found, "<i4")
    if header[0] != MAGIC:
        raise UserError(f"{path}: magic number {header[0]}, a token shard has {MAGIC}; {_anew(path)}")
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} of the format, this reads {VERSION}; {_anew(path)}")
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


def _parse_manifest(data: object) -> Manifest:
    return Manifest(
        source=_get(data, "source", str),
        revision=_get(data, "revision", str),
        settings=_get(data, "settings", dict),
        documents=_counts(data, "documents"),
        shards=tuple(_parse_record(record) for record in _get(data, "shards", list)),
        complete=_get(data, "complete", bool),
        next_chunk=_count(data, "next_chunk"),
        unfinished=_counts(data, "unfinished"),
        tokenizer=_get(data, "tokenizer", str),
    )


def _parse_record(data: object) -> ShardRecord:
    name, sha256 = _get(data, "name", str), _get(data, "sha256", str)
    if not re.fullmatch(r"(train|val)_[0-9]{6,9}\.bin", name):
        raise UserError(f"{name!r} is no shard's name")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{sha256!r} is no SHA-256")
    return ShardRecord(name=name, tokens=_count(data, "tokens"), sha256=sha256)


def _counts(data: object, field: str) -> dict[Split, int]:
    return {split: _count(_get(data, field, dict), split) for split in get_args(Split)}


def _count(data: object, field: str) -> int:
    if (value := _get(data, field, int)) < 0:
        raise UserError(f"{field} is {value}")
    return value


def _get(data: object, field: str, kind: type[Value]) -> Value:
    value = data.get(field) if isinstance(data, dict) else None
    if type(value) is not kind:  # a bool is an int, but no count
        raise UserError(f"{field} should be {kind.__name__}, is {str(value)[:60]!r}")
    return value
