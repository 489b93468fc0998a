"""The global order of the training data.

`step` is the only cursor: which tokens a step consumes is a pure function of (seed, step, batch size), so nothing
about a loader is saved, seeking costs nothing, and any number of ranks sees the same tokens in the same order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

FEISTEL_ROUNDS = 6


def shuffled(sequences: Indices, *, n: int, seed: int) -> Indices:
    """The windows (count,) of `n` that the global `sequences` (count,) are, epoch after epoch."""
    epochs = sequences // n
    order = np.empty_like(sequences)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = permute(sequences[here] % n, n=n, seed=seed, epoch=int(epoch))
    return order


def permute(index: Indices, *, n: int, seed: int, epoch: int) -> Indices:
    """The places of `index` (any shape, values in [0, n)) in the order of `epoch`: a keyed permutation of [0, n).

    A Feistel network over the next even power of two, applied again while it lands outside [0, n) (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains", cycle walking). Random access, no table, cost independent of `n`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha512(f"gpt2_ddp {seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8")[:FEISTEL_ROUNDS]
    places = index.astype(np.uint64)
    outside = np.ones(places.shape, dtype=bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & mask
        for key in keys:
            left, right = right, left ^ (scrambled(right ^ key) & mask)
        places[outside] = left << half | right
        outside = places >= n
    return places.astype(np.int64)


def scrambled(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit of the input reaches every bit out."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def chained_hash(previous: str, windows: Indices) -> str:
    """The `data_hash` after a step: SHA-256 over the one before it and the step's window numbers as `<i8`."""
    return hashlib.sha256(previous.encode() + windows.astype("<i8").tobytes()).hexdigest()
