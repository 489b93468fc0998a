"""A data directory: which of its files are the shards of a split."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

from gpt2_ddp.data.manifest import MANIFEST, read_manifest, require_listed
from gpt2_ddp.data.shards import Shard, Split, anew, read_shard
from gpt2_ddp.system.errors import UserError


def find_shards(data_dir: Path, split: Split) -> tuple[Shard, ...]:
    """The shards of one split, sorted by name: ours, llm.c's and nanoGPT's `*train*.bin`, build-nanogpt's `.npy`.

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
        shards = tuple(replace(shard, vocab_size=manifest.vocabulary.size) for shard in shards)
        require_listed({shard.path.name: shard.tokens for shard in shards}, manifest, split, data_dir)
    if not shards:
        without = ", or leave validation out by --val-every 0" if split == "val" else ""
        raise UserError(f"no {split} shard in {data_dir}: {anew(data_dir / MANIFEST)}{without}")
    return shards


def _split_of(path: Path) -> Split | None:
    """The split that a file's name tells, first by whole words: `retrieval_train_0.bin` is training data."""
    words = re.split("[^a-z]+", path.stem.lower())
    named: list[Split] = [split for split in get_args(Split) if split in words]
    named = named or [split for split in get_args(Split) if any(split in word for word in words)]
    if len(named) > 1:
        raise UserError(f"{path}: its name says both train and val; rename it")
    return named[0] if named else None
