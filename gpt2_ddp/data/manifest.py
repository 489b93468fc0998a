"""The manifest beside the shards that `data_prep` wrote: what lies there, whether it is whole, where it came from."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from gpt2_ddp.data.shards import Split, anew, regular_size
from gpt2_ddp.model.vocabulary import GPT2, MOST_TOKENS, Vocabulary
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object, replace_file

Value = TypeVar("Value")

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 26
"""A longer manifest is refused unread; a shard takes about 130 bytes of it."""


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
    """gpt2, or `sha256:` and the digest of the tokenizer.json beside the manifest."""
    vocabulary: Vocabulary = GPT2


def read_manifest(data_dir: Path) -> Manifest | None:
    """The manifest of a data directory, None where there is none.

    Raises:
        UserError: if it is not such a manifest.
    """
    path = data_dir / MANIFEST
    if not path.exists():
        return None
    try:
        if (size := regular_size(path)) > MANIFEST_BYTES:
            raise UserError(f"{size} bytes, more than {MANIFEST_BYTES}")
        return _parse_manifest(json_object(path.read_bytes()))
    except ValueError as error:
        raise UserError(
            f"{path}: not a manifest of token shards ({error}); delete it to train on the shards as they are, or "
            f"{anew(path)}"
        ) from error


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest, atomically and durably."""
    replace_file(data_dir / MANIFEST, json.dumps(asdict(manifest), indent=1))


def require_listed(shards: dict[str, int], manifest: Manifest, split: Split, data_dir: Path) -> None:
    """
    Raises:
        UserError: where the `shards` of a split, name to tokens, are not those of the manifest.
    """
    listed = {record.name: record.tokens for record in manifest.shards if record.name.startswith(split)}
    for name in sorted(shards.keys() | listed.keys()):
        if (here := shards.get(name)) != (there := listed.get(name)):
            raise UserError(f"{data_dir / name}: {there} tokens by the manifest, {here} here; {anew(data_dir / name)}")


def _parse_manifest(data: dict[str, Any]) -> Manifest:
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
        vocabulary=_parse_vocabulary(data["vocabulary"]) if "vocabulary" in data else GPT2,
    )


def _parse_vocabulary(data: object) -> Vocabulary:
    found = Vocabulary(size=_count(data, "size"), eot=_count(data, "eot"))
    if not found.eot < found.size <= MOST_TOKENS:
        raise UserError(f"no vocabulary of shards has {found.size} ids with {found.eot} among them")
    return found


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
