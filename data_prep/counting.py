"""What a split holds, counted in one pass over its shards in constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt2_ddp.data.shards import TOKEN_BYTES, Shard, Tokens

BLOCK_BYTES = 1 << 23
LENGTH_BINS = 48
"""Of lengths 1, 2 to 3, 4 to 7, ..., of which the last is never reached."""


@dataclass(kw_only=True)
class SplitCount:
    """What was counted in a split so far. A document is what stands between two ids `eot`, if that is anything."""

    eot: int
    vocab_size: int
    tokens: int = 0
    documents: int = 0
    longest: int = 0
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LENGTH_BINS, np.int64))
    """(LENGTH_BINS,) documents by length, where bin b is for 2^b to 2^(b+1) - 1 tokens without the `eot`."""
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << 16, np.int64))
    """(65536,) how often each id occurs."""
    first_stranger: str = ""
    """Where the first id past the vocabulary is."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each shard by its name."""
    _open: int = 0
    """Tokens of the document that the last block ended in."""

    def add_shard(self, shard: Shard, bar: tqdm[Any]) -> None:
        """Count a shard, which follows the one before it; `bar` counts bytes."""
        digest = hashlib.sha256()
        with open(shard.path, "rb") as file:
            digest.update(file.read(shard.offset))
            at = 0
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                self._add(np.frombuffer(block[: len(block) // TOKEN_BYTES * TOKEN_BYTES], "<u2"), shard, at)
                at += len(block) // TOKEN_BYTES
                bar.update(len(block))
        self.sha256[shard.path.name] = digest.hexdigest()

    def finish(self) -> None:
        """The split is at its end, and so is its last document."""
        self._add_lengths(np.array([self._open]))
        self._open = 0

    @property
    def strangers(self) -> int:
        """How many ids are past the vocabulary."""
        return int(self.ids[self.vocab_size :].sum())

    def _add(self, tokens: Tokens, shard: Shard, at: int) -> None:
        self.tokens += len(tokens)
        self.ids += np.bincount(tokens, minlength=1 << 16)
        if self.strangers and not self.first_stranger:
            place = int((tokens >= self.vocab_size).argmax())
            self.first_stranger = f"id {tokens[place]} at position {at + place} of {shard.path.name}"
        ends = np.flatnonzero(tokens == self.eot)
        if not len(ends):
            self._open += len(tokens)
            return
        lengths = np.diff(ends, prepend=-1) - 1
        lengths[0] += self._open
        self._add_lengths(lengths)
        self._open = len(tokens) - 1 - int(ends[-1])

    def _add_lengths(self, lengths: npt.NDArray[np.int64]) -> None:
        lengths = lengths[lengths > 0]
        self.documents += len(lengths)
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.lengths += np.bincount(np.frexp(lengths)[1] - 1, minlength=LENGTH_BINS)


def count_split(shards: Sequence[Shard], *, eot: int, vocab_size: int) -> SplitCount:
    """Read all of a split, with a bar where that takes more than a moment."""
    counted = SplitCount(eot=eot, vocab_size=vocab_size)
    total = sum(shard.tokens * TOKEN_BYTES for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False, delay=1) as bar:
        for shard in shards:
            counted.add_shard(shard, bar)
    counted.finish()
    return counted


class Stream:
    """The tokens of a split, one shard after the other, read here and there."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._ends = np.cumsum([shard.tokens for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> Tokens:
        """At most `count` tokens from `start` on: fewer at the end."""
        parts, stop = [np.array([], np.uint16)], min(start + count, len(self))
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            begin = int(self._ends[number]) - self._shards[number].tokens
            here = min(stop, int(self._ends[number]))
            parts.append(self._shards[number].open()[start - begin : here - begin])
            start = here
        return np.concatenate(parts)

    def find(self, token: int, start: int, most: int) -> int | None:
        """Where `token` is next from `start` on, within `most` tokens."""
        for at in range(start, min(start + most, len(self)), 1 << 16):
            found = np.flatnonzero(self.read(at, 1 << 16) == token)
            if len(found):
                return at + int(found[0])
        return None
