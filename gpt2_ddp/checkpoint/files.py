"""Checkpoints that are whole or not there: written aside, hashed, flushed, renamed; verified before they are used.

This module knows files, not models: a checkpoint is a mapping of file names to JSON values, bytes or named tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors
import torch
from torch import Tensor

from gpt2_ddp.system import files as disk
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json

Stamp = list[tuple[str, int, int]]
Content = bytes | Mapping[str, Any] | Mapping[str, Tensor]

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
CHUNK = 1 << 22


def step_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def stamp(path: Path) -> Stamp:
    """Names, sizes and times of change of a checkpoint's files: one that has the same ones is taken for unchanged."""
    found = [(file.name, file.lstat()) for file in path.iterdir()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def write_checkpoint(path: Path, files: Mapping[str, Content], stamps: dict[Path, Stamp] | None = None) -> int:
    """Write the checkpoint `path` and return its size in bytes; it appears under that name only when it is whole.

    Into `stamps` goes its own, taken before it has its name: whatever is done to it later shows.

    Raises:
        OSError: where the disk refuses; what was written aside is taken away again.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        entries = {name: _write_file(aside / name, content) for name, content in files.items()}
        manifest = {"version": MANIFEST_VERSION, "files": entries}
        _write_file(aside / MANIFEST, manifest)
        disk.flush_directory(aside)
        if stamps is not None:
            stamps[path] = stamp(aside)
        disk.rename(aside, path, last=MANIFEST)
        disk.flush_directory(path.parent)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return sum(entry["size"] for entry in entries.values())


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write one file, flush it to the disk, and return its manifest entry."""
    with open(path, "wb") as file:
        writer = _HashingWriter(file)
        if isinstance(content, bytes):
            writer.write(content)
        elif path.suffix == ".safetensors":
            _write_safetensors(writer, content)
        else:
            writer.write(json.dumps(content, indent=2).encode() + b"\n")
        disk.flush(file)
    return {"size": writer.size, "sha256": writer.sha256.hexdigest()}


class _HashingWriter:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def _write_safetensors(writer: _HashingWriter, tensors: Mapping[str, Any]) -> None:
    """The safetensors format, streamed and hashed on the way, one tensor laid out at a time.

    The library's `save_file` takes only what lies contiguous, so that all transposed matrices would be copied at once,
    and what it wrote would have to be read again to be hashed.

    Eight bytes little-endian with the length of a JSON header, the header, the tensors' bytes without gaps
    (safetensors README, "Format").
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        writer.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def faults(path: Path, *, of: str = "") -> list[str]:
    """What is wrong with the checkpoint `path`, one phrase a fault; empty where every byte is as it was written.

    With `of`, a name, only that file is read.
    """
    try:
        manifest = read_json(path / MANIFEST)
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = manifest["version"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    if version != MANIFEST_VERSION or not entries:
        return [f"{MANIFEST} has version {str(version)[:40]!r} and {len(entries)} files"]
    found = [_fault(path, name, size, sha256) for name, (size, sha256) in entries.items() if of in ("", name)]
    return [fault for fault in found if fault]


def _fault(path: Path, name: str, size: int, sha256: str) -> str | None:
    file = path / name
    try:
        plain = name not in ("", ".", "..") and Path(name).name == name and name.isprintable()
        if not plain or file.is_symlink():
            return f"{name[:60]!r} is no file of the checkpoint"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != sha256:
            return f"{name} does not have the SHA-256 it was written with"
    except OSError as error:  # a disk that fails, a name that is too long
        return f"{name} cannot be read ({error.strerror})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The named tensors of a safetensors file, on the CPU, each read when it is asked for and kept by who asked.

    Raises:
        UserError: where it is not one.
    """
    return _TensorFile(path)


class _TensorFile(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self._path = path
        with self._refusing():
            self._file = cast(Any, safetensors.safe_open(path, framework="pt"))
            in_order = getattr(self._file, "offset_keys", self._file.keys)  # older safetensors know only sorted names
            self._names = dict.fromkeys(in_order())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with self._refusing():
            tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except safetensors.SafetensorError as error:
            raise UserError(f"{self._path} is not a safetensors file: {error}") from None
