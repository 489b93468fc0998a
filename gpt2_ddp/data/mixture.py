"""Several data directories mixed by weight, in an order that is still a pure function of (seed, step).

The global sequences are dealt to the sources one source after the other, the lightest first. A source of `part` of the
`whole` weight that is left gets one of each `whole / part` sequences that are left, at a place that a hash of the seed
and the number of this stretch chooses. So its windows before any place are counted without a table: the stretches that
have ended, and that of the place itself if the hash chose an earlier one. The count is within 1 of `part / whole` of
the sequences that were left, which makes it within K - 1 of the exact share where there are K sources.

What a source is dealt it reads as a run of this source alone would: epoch after epoch, each a keyed permutation of its
windows, under a key of its own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.data.order import Indices, scrambled, shuffled
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.shards import Shard
from gpt2_ddp.data.sources import DataDir, Source, read_manifests, sources_of
from gpt2_ddp.data.windows import Windows, fingerprint
from gpt2_ddp.system.errors import UserError


def deal(places: Indices, weights: Sequence[int], seed: int) -> tuple[Indices, Indices]:
    """The source (n,) that each of the global sequences `places` (n,) is dealt to, and how many sequences each of the
    K sources is dealt before it, (K, n): of its own source, the number that it has there.
    """
    sources, dealt = np.empty_like(places), np.empty((len(weights), *places.shape), np.int64)
    left, whole, is_left = places, sum(weights), np.ones(places.shape, bool)
    *lighter, heaviest = sorted(range(len(weights)), key=lambda number: weights[number])
    for number in lighter:
        chosen, dealt[number] = _one_of_each_stretch(
            left, part=weights[number], whole=whole, key=_keys(seed, number)[0]
        )
        sources[is_left & chosen] = number
        is_left &= ~chosen
        left, whole = left - dealt[number], whole - weights[number]
    sources[is_left], dealt[heaviest] = heaviest, left
    return sources, dealt


def _one_of_each_stretch(
    places: Indices, *, part: int, whole: int, key: np.uint64
) -> tuple[npt.NDArray[np.bool_], Indices]:
    """Whether each place is a chosen one, one of each whole / part (at least 2), and how many are before it."""
    stretches = places * part // whole
    first, end = (-(-number * whole // part) for number in (stretches, stretches + 1))
    chosen = first + (scrambled(stretches.astype(np.uint64) ^ key) % (end - first).astype(np.uint64)).astype(np.int64)
    return places == chosen, stretches + (chosen < places)


def _keys(seed: int, number: int) -> npt.NDArray[np.uint64]:
    """Eight keys of a source: the first of the places that it is dealt, the second of its own order."""
    return np.frombuffer(hashlib.sha512(f"gpt2_ddp mixture {seed} {number}".encode()).digest(), dtype="<u8")


class Mixture(Windows):
    """The windows of several sources, one source after the other, in an order that mixes them by weight."""

    def __init__(self, shards: Mapping[Source, Sequence[Shard]], sequence_length: int) -> None:
        super().__init__([shard for each in shards.values() for shard in each], sequence_length)
        self.shards_of = shards
        self.sources = tuple(shards)
        self.counts = [len(Windows(each, sequence_length)) for each in shards.values()]
        self.weights = [source.weight for source in self.sources]

    def of_step(self, step: int, *, count: int, seed: int) -> Indices:
        sources, dealt = deal(np.arange((step - 1) * count, step * count, dtype=np.int64), self.weights, seed)
        windows = np.empty_like(sources)
        for number, n in enumerate(self.counts):
            here = sources == number
            own = shuffled(dealt[number, here], n=n, seed=int(_keys(seed, number)[1]))
            windows[here] = own + sum(self.counts[:number])
        return windows

    def given(self, sequences: int, *, seed: int) -> list[dict[str, object]]:
        """What each source gave to the first `sequences` of a run, which the spike guard may have passed over in part;
        of its `epochs` the last need not be whole.
        """
        _, dealt = deal(np.array([sequences]), self.weights, seed)
        return [
            {
                "data_dir": str(source.path),
                "windows": windows,
                "tokens": windows * self.sequence_length,
                "epochs": round(windows / n, 4),
            }
            for source, n, windows in zip(self.sources, self.counts, dealt[:, 0].tolist(), strict=True)
        ]

    def fingerprint(self) -> str:
        """Hex SHA-256 of the sources and their weights, in their order."""
        parts = [f"{source.weight}:{fingerprint(shards)}" for source, shards in self.shards_of.items()]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_mixture(data_dir: DataDir, plan: BatchPlan) -> Mixture:
    """The training windows of several sources.

    Raises:
        UserError: as `find_shards` and `read_manifests`, and where a source has fewer windows than a step takes of it.
    """
    read_manifests(data_dir)
    shards = {source: find_shards(source.path, "train") for source in sources_of(data_dir)}
    mixture = Mixture(shards, plan.sequence_length)
    for source, n in zip(mixture.sources, mixture.counts, strict=True):
        needed = -(-plan.sequences_per_step * source.weight // sum(mixture.weights))
        if n < needed:
            raise UserError(
                f"{source.path} holds {n} training windows of {plan.sequence_length} tokens, and by its weight a step "
                f"takes {needed}: prepare more data, or give a smaller weight, --total-batch-size or --sequence-length"
            )
    return mixture


def find_validation(data_dir: DataDir) -> dict[Source, tuple[Shard, ...]]:
    """The validation shards of each source. Raises as `find_shards` and `read_manifests`."""
    read_manifests(data_dir)
    return {source: find_shards(source.path, "val") for source in sources_of(data_dir)}


def share_validation(
    shards: Mapping[Source, Sequence[Shard]], *, sequence_length: int, val_tokens: int, micro_batch_size: int
) -> dict[str, ValidationData]:
    """The validation data of each source by its path: `val_tokens` divided by weight, and at least one sequence each.

    Where a source holds less than its share, all have as much less, so that the shares stay. Without a sequence all are
    where `val_tokens` are less than one, or one source holds none.
    """
    windows = {source: Windows(each, sequence_length) for source, each in shards.items()}
    *ends, whole = itertools.accumulate(source.weight for source in shards)
    held = [len(own) * whole // source.weight for source, own in windows.items()]
    count = min(val_tokens // sequence_length, *held)
    shares = np.diff([count * end // whole for end in (0, *ends, whole)]).tolist()
    return {
        str(source.path): ValidationData(
            windows=own,
            val_tokens=min(count, max(1, share)) * sequence_length,
            micro_batch_size=micro_batch_size,
        )
        for (source, own), share in zip(windows.items(), shares, strict=True)
    }
