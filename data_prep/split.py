"""Which documents are for validation: never one of which the training split has the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from gpt2_ddp.data.shards import Tokens

from .encoding import document_digest


class ValidationSplit:
    """By tokens: documents from the first on, until they are enough. By fraction: by a hash of the text.

    With a fraction the first document always trains, and the next that differs from it is taken in any case, so that
    there is something to train on and something to validate on. A document equal to one that was taken is taken too.
    Memory: 8 bytes a document of the validation split, none by fraction.
    """

    def __init__(
        self, *, tokens: int | None, fraction: float, trained: Iterable[Tokens], taken: Iterable[Tokens]
    ) -> None:
        """Go on after the documents `trained` and `taken`, of which a restart finds the digests again."""
        self._wanted = tokens
        self._below = int(fraction * 2**64) if tokens is None else 0
        self._tokens = 0
        self._digests: set[int] = set()
        self._first: int | None = None
        if self._below:
            self._first = next(map(document_digest, trained), None)
        for document in taken if tokens else islice(taken, 1):
            self._take(document_digest(document), len(document))

    def choose(self, lengths: npt.NDArray[np.int64], digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """(documents,) bool, True for validation, of the next documents in order."""
        documents = zip(lengths.tolist(), digests.tolist(), strict=True)
        chosen = self._by_fraction if self._wanted is None else self._by_tokens
        return np.array([chosen(length, digest) for length, digest in documents], np.bool_)

    def _by_fraction(self, length: int, digest: int) -> bool:
        if not self._below:
            return False
        if self._first is None and not self._digests:
            self._first = digest
        if digest == self._first:
            return False
        if not self._digests:
            self._take(digest, length)
        return digest < self._below or digest in self._digests

    def _by_tokens(self, length: int, digest: int) -> bool:
        assert self._wanted is not None
        if self._tokens >= self._wanted and digest not in self._digests:
            return False
        self._take(digest, length)
        return True

    def _take(self, digest: int, length: int) -> None:
        self._digests.add(digest)
        self._tokens += length


def whole_documents(shards: Iterable[Tokens], eot: int) -> Iterator[Tokens]:
    """The documents that lie one after the other in consecutive shards, some across a shard's end."""
    held: list[Tokens] = []
    for shard in shards:
        begins = np.flatnonzero(shard == eot)
        for part in np.split(shard, begins):
            if len(part) and part[0] == eot and held:
                yield np.concatenate(held)
                held = []
            held += [part] if len(part) else []
    if held:
        yield np.concatenate(held)
