"""Documents into the shards of two splits, so that an interruption at any moment loses little and breaks nothing.

Tokens go to `NAME.part` files. A commit flushes these, writes the manifest with the number of the next chunk, and
only then gives full parts their names; a restart finishes the renames and cuts the parts back to the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt2_ddp.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest, write_manifest
from gpt2_ddp.data.own_tokenizer import FILE, SETTINGS
from gpt2_ddp.data.shards import HEADER_BYTES, PART, Split, Tokens, header, read_shard, shard_name
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import flush, flush_directory, rename, require_writable, sole_use

from .encoding import EncodedChunk
from .split import ValidationSplit, whole_documents

COMMIT_TOKENS = 20_000_000
"""At most this many tokens are tokenized again after an interruption."""


class ShardPart:
    """A shard being written, at `NAME.part`."""

    def __init__(self, data_dir: Path, name: str, tokens: int) -> None:
        """Begin a shard, or go on after its first `tokens` tokens, dropping what was written past them."""
        self.path, self.name, self.tokens = data_dir / (name + PART), name, tokens
        size = HEADER_BYTES + 2 * tokens
        if tokens and not (self.path.is_file() and self.path.stat().st_size >= size):
            raise UserError(f"{self.path}: should hold {tokens} tokens; delete {data_dir} and prepare it again")
        self._file = open(self.path, "r+b" if tokens else "w+b")  # noqa: SIM115  outlives this function
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, tokens: Tokens) -> None:
        """Write (n,) uint16 after what is there."""
        self._file.write(np.ascontiguousarray(tokens, "<u2").data)
        self.tokens += len(tokens)

    def flush(self) -> None:
        """Return when everything appended is on the disk."""
        flush(self._file)

    def seal(self) -> ShardRecord:
        """Write the header, flush and close."""
        self._file.seek(0)
        self._file.write(header(self.tokens))
        self.flush()
        self._file.seek(0)
        digest = hashlib.sha256()
        while block := self._file.read(1 << 20):
            digest.update(block)
        self._file.close()
        return ShardRecord(name=self.name, tokens=self.tokens, sha256=digest.hexdigest())


class ShardWriter:
    """Writes what `begin` found to be missing. Only whole chunks are committed."""

    def __init__(self, data_dir: Path, manifest: Manifest, shard_tokens: int, validation: ValidationSplit) -> None:
        self.manifest = manifest
        self._data_dir, self._shard_tokens, self._validation = data_dir, shard_tokens, validation
        self._uncommitted = 0
        self._sealed: list[ShardRecord] = []
        self._documents = dict(manifest.documents)
        self._shards: dict[Split, int] = {split: len(_records(manifest, split)) for split in manifest.documents}
        self._parts: dict[Split, ShardPart] = {
            split: ShardPart(data_dir, shard_name(split, self._shards[split]), tokens)
            for split, tokens in manifest.unfinished.items()
            if tokens
        }

    def write(self, chunk: EncodedChunk) -> None:
        """Add the manifest's next chunk."""
        self.manifest = replace(self.manifest, next_chunk=self.manifest.next_chunk + 1)
        if not len(chunk.lengths):
            return
        in_val = self._validation.choose(chunk.lengths, chunk.digests)
        runs = np.flatnonzero(np.diff(in_val)) + 1
        for first, tokens in zip([0, *runs], np.split(chunk.tokens, chunk.lengths.cumsum()[runs - 1]), strict=True):
            self._append("val" if in_val[first] else "train", tokens)
        self._documents["train"] += int((~in_val).sum())
        self._documents["val"] += int(in_val.sum())
        self._uncommitted += len(chunk.tokens)
        if self._sealed or self._uncommitted >= COMMIT_TOKENS:
            self._commit()

    def finish(self) -> None:
        """End the last shards and say so in the manifest. Where all documents fell in the validation split, they are
        training data, and there is no such split.

        Raises:
            UserError: if there is no document; then everything written is removed.
        """
        if not any(self._documents.values()):
            self._remove_all()
            raise UserError(f"no document with text in {self.manifest.source}")
        for split in list(self._parts):
            self._seal(split)
        self._commit()
        if self._documents["train"] == 0:
            self._make_training_data()
        self.manifest = replace(self.manifest, complete=True)
        write_manifest(self._data_dir, self.manifest)

    def _make_training_data(self) -> None:
        """Call all shards training shards: first in the manifest, so that a restart can finish the renames."""
        records = tuple(
            replace(record, name=shard_name("train", number)) for number, record in enumerate(self.manifest.shards)
        )
        documents: dict[Split, int] = {"train": self._documents["val"], "val": 0}
        self.manifest = replace(self.manifest, documents=documents, shards=records)
        write_manifest(self._data_dir, self.manifest)
        _publish(self._data_dir, records)

    def _append(self, split: Split, tokens: Tokens) -> None:
        while len(tokens):
            if split not in self._parts:
                self._parts[split] = ShardPart(self._data_dir, shard_name(split, self._shards[split]), 0)
            room = self._shard_tokens - self._parts[split].tokens
            self._parts[split].append(tokens[:room])
            if len(tokens) >= room:
                self._seal(split)
            tokens = tokens[room:]

    def _seal(self, split: Split) -> None:
        self._sealed.append(self._parts.pop(split).seal())
        self._shards[split] += 1

    def _commit(self) -> None:
        for part in self._parts.values():
            part.flush()
        unfinished = {split: self._parts[split].tokens if split in self._parts else 0 for split in self._shards}
        self.manifest = replace(
            self.manifest,
            documents=dict(self._documents),
            shards=(*self.manifest.shards, *self._sealed),
            unfinished=unfinished,
        )
        write_manifest(self._data_dir, self.manifest)
        _publish(self._data_dir, self._sealed)
        self._sealed, self._uncommitted = [], 0

    def _remove_all(self) -> None:
        for record in self.manifest.shards:
            (self._data_dir / record.name).unlink(missing_ok=True)
        _remove_uncommitted(self._data_dir, self.manifest)
        (self._data_dir / MANIFEST).unlink()


def require_place(data_dir: Path) -> None:
    """What can be known before the source is opened, which may be a download of hours.

    Raises:
        OSError: where shards cannot be written.
        UserError: if the directory holds other shards.
    """
    require_writable(data_dir)
    if data_dir.is_dir() and read_manifest(data_dir) is None:
        _require_no_others(data_dir)


def require_no_tokenizer(data_dir: Path, names: Iterable[str]) -> None:
    """
    Raises:
        UserError: if the directory holds one of the files `names` of a tokenizer, and no preparation has put it there.
    """
    manifest = read_manifest(data_dir) if data_dir.is_dir() else None
    if manifest is not None and manifest.tokenizer != "gpt2":
        return
    if there := next((data_dir / name for name in names if (data_dir / name).exists()), None):
        raise UserError(f"{there} would be written over; choose another --out")


def require_apart(out: Path, inputs: Iterable[Path]) -> None:
    """What is read changes with what is written into it, and who deletes `out` to prepare it again shall lose nothing.

    Raises:
        UserError: if `out` is one of the files and folders that are read, lies in one, or holds one.
    """
    place = out.resolve()
    for path in inputs:
        for found in (path.resolve(), path.parent.resolve() / path.name):  # a link, and what it points to
            if found == place or found in place.parents or place in found.parents:
                how = "is" if found == place else "lies in" if found in place.parents else "holds"
                raise UserError(f"--out {out} {how} {path}, which is read: choose an --out apart from it")


def _require_no_others(data_dir: Path) -> None:
    here = {path.name for path in data_dir.iterdir() if path.suffix in (".bin", ".npy")}
    if others := sorted({*here, *(path.name for path in _parts_in(data_dir))}):
        raise UserError(f"{data_dir} holds {others[0]}, which was not made here; choose another --out")


def kept(data_dir: Path) -> Manifest | None:
    """The manifest of what was prepared in a directory and is not lost by going on; None where there is nothing."""
    manifest = read_manifest(data_dir) if data_dir.is_dir() else None
    return manifest if manifest and _is_kept(manifest) else None


def _is_kept(manifest: Manifest) -> bool:
    return manifest.complete or manifest.next_chunk > 0


def begin(data_dir: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on from: that of the directory, or `wanted` in an empty one.

    Raises:
        UserError: if the directory holds other shards, or shards of another source or other settings.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(data_dir)
    if manifest is None:
        _require_no_others(data_dir)
    if manifest is None or not _is_kept(manifest):  # nothing there to lose: ask for anything
        if manifest:
            _remove_uncommitted(data_dir, manifest)
        write_manifest(data_dir, wanted)
        return wanted
    for field, asked, found in _identity(wanted, manifest):
        if asked != found:
            raise UserError(
                f"{data_dir} was prepared with {field} {found!r}, now asked for {asked!r}; choose another --out, "
                "or delete it"
            )
    _publish(data_dir, manifest.shards)
    for record in manifest.shards:
        path = data_dir / record.name
        if not path.is_file() or read_shard(path).tokens != record.tokens:
            mend = f"delete {data_dir} and prepare it again"
            raise UserError(f"{path}: should be a shard of {record.tokens} tokens; {mend}")
    return manifest


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Nobody else prepares this directory meanwhile; the lock ends with the process, however it ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with sole_use(data_dir, f"{data_dir}: another data_prep is writing here; wait for it, or stop it"):
        yield


def committed_documents(data_dir: Path, manifest: Manifest, split: Split) -> Iterator[Tokens]:
    """The documents of a split that are committed, in order; no more is read than is asked for."""
    records = _records(manifest, split)

    def arrays() -> Iterator[Tokens]:
        for record in records:
            yield read_shard(data_dir / record.name).open()
        if tokens := manifest.unfinished[split]:
            part = data_dir / (shard_name(split, len(records)) + PART)
            yield np.fromfile(part, "<u2", tokens, offset=HEADER_BYTES)

    return whole_documents(arrays(), manifest.vocabulary.eot)


def _records(manifest: Manifest, split: Split) -> list[ShardRecord]:
    return [record for record in manifest.shards if record.name.startswith(split)]


def _parts_in(data_dir: Path) -> list[Path]:
    return [path for path in data_dir.glob(f"*{PART}") if re.fullmatch(r"(train|val)_[0-9]{6,9}\.bin", path.stem)]


def _remove_uncommitted(data_dir: Path, manifest: Manifest) -> None:
    """Remove the parts of shards, one of which might be taken for a whole one later, and the copy of a tokenizer."""
    for part in _parts_in(data_dir):
        part.unlink()
    for name in (FILE, SETTINGS) if manifest.tokenizer != "gpt2" else ():
        (data_dir / name).unlink(missing_ok=True)


def _identity(wanted: Manifest, found: Manifest) -> Iterator[tuple[str, object, object]]:
    yield "the source", wanted.source, found.source
    yield "its version", wanted.revision, found.revision
    yield "the tokenizer", wanted.tokenizer, found.tokenizer
    yield "the token that begins documents, id", wanted.vocabulary.eot, found.vocabulary.eot
    for name, value in wanted.settings.items():
        yield f"--{name.replace('_', '-')}", value, found.settings.get(name)


def _publish(data_dir: Path, records: Iterable[ShardRecord]) -> None:
    """Give sealed parts their final names, those that do not have them yet, and validation shards that of training."""
    for record in records:
        part, path = data_dir / (record.name + PART), data_dir / record.name
        as_validation = data_dir / record.name.replace("train", "val")
        if part.exists():
            rename(part, path)
        elif not path.exists() and as_validation.exists():
            rename(as_validation, path)
    flush_directory(data_dir)
