"""A data directory, told in lines: what lies in it, whether that is whole, how it reads, what will hurt a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import Manifest, read_manifest
from gpt2_ddp.data.shards import Split
from gpt2_ddp.data.tokenizer import tokenizer_of_data
from gpt2_ddp.system.console import visible
from gpt2_ddp.system.errors import UserError

from .counting import SplitCount, Stream
from .inspection import Inspected, damage, harm, inspect_split
from .samples import passages, shown


def inspect(data_dir: Path, *, sequence_length: int, documents: int) -> Iterator[str]:
    """Lines to print about a data directory.

    Raises:
        UserError: where the trainer would refuse it; and, after all lines, where something in it is damaged.
    """
    train_shards = find_shards(data_dir, "train")
    manifest = read_manifest(data_dir)
    tokenizer = tokenizer_of_data(data_dir)
    splits: list[Split] = ["train"]
    others = {path.name for path in data_dir.iterdir() if path.suffix in (".bin", ".npy")}
    if (manifest and manifest.documents["val"]) or others - {shard.path.name for shard in train_shards}:
        splits.append("val")
    inspected = [inspect_split(data_dir, split, tokenizer, sequence_length) for split in splits]
    damaged, harms = damage(inspected, manifest), harm(inspected, sequence_length)
    yield _title(data_dir, manifest)
    for split in inspected:
        yield from _summary(split, sequence_length)
    yield _hashes(inspected, manifest)
    for split in inspected:
        yield f"\nlengths of the documents of {split.split}, in tokens:"
        yield from histogram(split.count)
    for split in inspected:
        stream = Stream(split.shards)
        for passage in passages(stream, tokenizer.eot_token, documents):
            yield f"\na document of {split.split}, {passage.stop - passage.start:,} tokens from {passage.start:,} on:"
            yield from shown(passage, stream, tokenizer)
    yield ""
    yield from (f"damaged: {line}" for line in damaged)
    yield from (f"warning: {line}" for line in harms)
    if damaged:
        raise UserError(f"{data_dir}: {damaged[0]}; prepare it again")
    if not harms:
        yield "nothing was found that would hurt a run"


def _title(data_dir: Path, manifest: Manifest | None) -> str:
    if manifest is None:
        return f"{data_dir}: tokens from elsewhere, read with GPT-2's vocabulary"
    return f"{data_dir}: prepared from {visible(manifest.source)[:200]}, tokenizer {visible(manifest.tokenizer)[:60]}"


def _hashes(inspected: Sequence[Inspected], manifest: Manifest | None) -> str:
    if manifest is None:
        return "hashes: none to compare with, for there is no manifest.json of data_prep"
    listed = {record.name: record.sha256 for record in manifest.shards}
    equal = [listed[name] == digest for split in inspected for name, digest in split.count.sha256.items()]
    return f"hashes: {sum(equal)} of {len(equal)} shards have the SHA-256 that they were written with"


def _summary(split: Inspected, sequence_length: int) -> Iterator[str]:
    count = split.count
    shards = "1 shard" if len(split.shards) == 1 else f"{len(split.shards):,} shards"
    documents = "1 document" if count.documents == 1 else f"{count.documents:,} documents"
    yield f"{split.split}: {count.tokens:,} tokens of {documents} in {shards}"
    yield f"  {split.windows:,} windows of {sequence_length:,} tokens; the longest document has {count.longest:,}"
    if split.text_bytes is not None:
        yield f"  {split.text_bytes:,} bytes of text, {split.text_bytes / count.tokens:.2f} a token (English: 4 to 5)"


def histogram(count: SplitCount) -> list[str]:
    """Documents by length, a line a bin from the first to the last that has any."""
    filled = np.flatnonzero(count.lengths)
    if not len(filled):
        return []
    bins = range(int(filled[0]), int(filled[-1]) + 1)
    width = min(40, max(10, shutil.get_terminal_size().columns - 45))
    most = int(count.lengths.max())
    lines = []
    for number in bins:
        documents = int(count.lengths[number])
        bar = "#" * max(documents > 0, round(documents * width / most))
        lines.append(f"  {2**number:>11,} to {2 ** (number + 1) - 1:<11,} {documents:>11,}  {bar}".rstrip())
    return lines
