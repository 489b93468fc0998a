"""Checkpoints that are whole or not there: written aside, hashed, flushed, renamed; verified before they are used.

This module knows files, not models: a checkpoint is a mapping of file names to JSON values, bytes or named tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
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

Content = bytes | Mapping[str, Any] | Mapping[str, Tensor]

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
CHUNK = 1 << 22


def step_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step_{step:08d}"


def write_checkpoint(path: Path, files: Mapping[str, Content]) -> int:
    """Write the checkpoint `path` and return its size in bytes; it appears under that name only when it is whole.

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


def faults(path: Path) -> list[str]:
    """What is wrong with the checkpoint `path`, one phrase a fault; empty where every byte is as it was written."""
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
    found = [_fault(path, name, size, sha256) for name, (size, sha256) in entries.items()]
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


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first, whatever their state; what was set aside is not among them."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or None where there is none at all, and what was found broken.

    Broken ones that are newer are set aside under a name that says so.

    Raises:
        UserError: where there are checkpoints and all are broken; none of them is touched.
    """
    broken: list[tuple[Path, str]] = []
    for path in checkpoints(directory):
        problems = faults(path)
        if not problems:
            said = [f"{bad} is broken ({what}); set aside as {set_aside(bad, 'broken').name}" for bad, what in broken]
            return path, said
        broken.append((path, ", ".join(problems)))
    if broken:
        listed = "; ".join(f"{path.name}: {what}" for path, what in broken)
        raise UserError(f"every checkpoint in {directory} is broken ({listed}): restore one, or use another --out-dir")
    return None, []


def named(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint `path`, or the newest good one of the run directory `path`, and what was passed over in it.

    Raises:
        UserError: where there is none, or none that verifies; nothing is touched.
    """
    directory = next((place for place in (path / "checkpoints", path) if checkpoints(place)), None)
    if directory is None:
        if problems := faults(path):
            mend = "give a run directory, or a step_... folder of its checkpoints"
            raise UserError(f"cannot resume from {path}: {', '.join(problems)}; {mend}")
        return path, []
    passed_over: list[str] = []
    for found in checkpoints(directory):
        if not (problems := faults(found)):
            return found, passed_over
        passed_over.append(f"{found} is broken ({', '.join(problems)}); passed over")
    raise UserError(f"cannot resume from {path}: {'; '.join(passed_over)}; give another run or checkpoint")


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no run takes it up again, and return its new name."""
    target, number = path.with_name(f"{path.name}.{why}"), 2
    while target.exists():
        target, number = path.with_name(f"{path.name}.{why}-{number}"), number + 1
    disk.rename(path, target)
    return target


def prune(directory: Path, keep: int) -> None:
    """Keep the `keep` newest good checkpoints. A broken one never counts, and goes with those that are too old."""
    good: list[Path] = []
    for path in checkpoints(directory):
        if len(good) == keep:
            shutil.rmtree(path)
        elif faults(path):
            set_aside(path, "broken")
        else:
            good.append(path)
    if len(good) == keep:
        for path in directory.glob("step_*.*"):
            step = path.name[5:].split(".")[0]
            if step.isdecimal() and int(step) < int(good[-1].name[5:]):
                shutil.rmtree(path, ignore_errors=True)


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
