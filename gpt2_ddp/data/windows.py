"""Token shards as windows of a sequence and the token after it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gpt2_ddp.data.order import Indices, shuffled
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.shards import OpenShard, Shard, check_tokens
from gpt2_ddp.system.errors import OneRankError, UserError, user_error

OPEN_SHARDS = 104
"""Shards that one read opens and the next finds open: those of 10 billion tokens, 100 million each.
There can be more than files that a process may open, of which macOS allows 256."""


class Windows:
    """All windows of `sequence_length + 1` tokens of some shards, in file order; none crosses a shard's end.

    Neighbours share one token: the last target of one is the first input of the next.
    """

    def __init__(self, shards: Sequence[Shard], sequence_length: int) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        counts = [max(0, shard.tokens - 1) // sequence_length for shard in shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._begins = self._ends - counts
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(lambda number: OpenShard(shards[number]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def of_step(self, step: int, *, count: int, seed: int) -> Indices:
        """The windows (count,) that update `step`, counted from 1, consumes, of `count` sequences a step."""
        return shuffled(np.arange((step - 1) * count, step * count, dtype=np.int64), n=len(self), seed=seed)

    def fingerprint(self) -> str:
        """Hex SHA-256 of what the data is, as the function below."""
        return fingerprint(self.shards)

    def read(self, windows: Indices) -> Tensor:
        """The tokens of `windows` (n,) as int64 (n, sequence_length + 1).

        Raises:
            OneRankError: where a shard cannot be read or a token is past the vocabulary, naming the shard: other ranks
                read other windows.
        """
        numbers = np.searchsorted(self._ends, windows, side="right")
        firsts = ((windows - self._begins[numbers]) * self.sequence_length).tolist()
        tokens = np.empty((len(windows), self.sequence_length + 1), "<u2")
        groups = np.unique(numbers, return_inverse=True)[1] // OPEN_SHARDS
        try:
            for group in range(groups.max(initial=-1) + 1):
                opened = [(self._opened(numbers[at]), firsts[at], tokens[at]) for at in np.flatnonzero(groups == group)]
                for shard, first, row in opened:
                    shard.expect(first, len(row))
                for shard, first, row in opened:
                    shard.read(first, row)
                    check_tokens(shard.shard, row, first)
                del opened, shard  # or they would stay open while the next group is opened
        except (ValueError, OSError) as error:
            if line := user_error(error):
                raise OneRankError(line) from error
            raise
        return torch.from_numpy(tokens.astype(np.int64))


def require_one_step(windows: Windows, plan: BatchPlan) -> None:
    """Raise a UserError where the data has fewer windows than one step consumes, with flags that it is enough for."""
    if len(windows) < plan.sequences_per_step:
        ranks, most = plan.world_size, max(plan.world_size, len(windows))
        length = plan.sequence_length if most == len(windows) else (max(s.tokens for s in windows.shards) - 1) // ranks
        micro = min(plan.micro_batch_size, most // ranks)
        total = most // (micro * ranks) * micro * ranks * length
        flags = f"--sequence-length {length} --micro-batch-size {micro} --total-batch-size {total}"
        raise UserError(
            f"{windows.shards[0].path.parent} holds {len(windows)} training windows of {plan.sequence_length} tokens, "
            f"and one step needs {plan.sequences_per_step}: prepare more data{f', or give {flags}' if length else ''}"
        )


def fingerprint(shards: Sequence[Shard]) -> str:
    """Hex SHA-256 of what the data is: of each shard in order its token count, head, tail and blocks between.

    Wherever the directory lies the answer is the same. The cost per shard is constant.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.tokens.to_bytes(8, "little"))
        opened, block = OpenShard(shard), np.empty(min(4096, shard.tokens), "<u2")
        for start in np.linspace(0, shard.tokens - len(block), num=8, dtype=np.int64).tolist():
            opened.read(start, block)
            digest.update(block.tobytes())
    return digest.hexdigest()
