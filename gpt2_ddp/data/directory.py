"""A data directory: which of its files are the shards of a split."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

from gpt2_ddp.data.manifest import MANIFEST, read_manifest, require_listed
from gpt2_ddp.data.shards import Shard, Split, anew, read_shard
from gpt2_ddp.system.errors import UserError

COMMANDS = ("demo", "shakespeare", "fineweb-edu")
"""Those of data_prep that need no more than a folder to write to; the presets call the folder the same."""


def find_shards(data_dir: Path, split: Split) -> tuple[Shard, ...]:
    """The shards of one split, sorted by name: ours, llm.c's and nanoGPT's `*train*.bin`, build-nanogpt's `.npy`.

    Raises:
        UserError: for a missing or empty directory, a shard that is not one, a split without shards, and a
            directory that does not hold what its manifest says.
    """
    prepare = f"prepare it with: python -m data_prep {data_dir.name} --out {data_dir}"
    prepare = prepare if data_dir.name in COMMANDS else "python -m data_prep --help lists how to prepare it"
    if not data_dir.is_dir():
        raise UserError(f"no data directory at {data_dir}; {prepare}")
    paths = {path: _split_of(path) for path in sorted(data_dir.iterdir()) if path.suffix in (".bin", ".npy")}
    if (manifest := read_manifest(data_dir)) and not manifest.complete:
        raise UserError(f"the preparation of {data_dir} did not finish; run the same data_prep command again")
    if not any(paths.values()):
        mend = next((f"{path.name} says neither train nor val, rename it" for path in paths), prepare)
        raise UserError(f"no token shards (*train*.bin, *val*.bin, *.npy) in {data_dir}; {mend}")
    shards = tuple(read_shard(path) for path, found in paths.items() if found == split)
    if manifest:
        shards = tuple(replace(shard, vocab_size=manifest.vocabulary.size) for shard in shards)
        require_listed({shard.path.name: shard.tokens for shard in shards}, manifest, split, data_dir)
    if not shards:
        head, tail = ("train without by --val-every 0, or ", ", of several documents") if split == "val" else ("", "")
        raise UserError(f"no {split} shard in {data_dir}: {head}{anew(data_dir / MANIFEST)}{tail}")
    return shards


def _split_of(path: Path) -> Split | None:
    """The split that a file's name tells, first by whole words: `retrieval_train_0.bin` is training data."""
    words = re.split("[^a-z]+", path.stem.lower())
    named: list[Split] = [split for split in get_args(Split) if split in words]
    named = named or [split for split in get_args(Split) if any(split in word for word in words)]
    if len(named) > 1:
        raise UserError(f"{path}: its name says both train and val; rename it")
    return named[0] if named else None
