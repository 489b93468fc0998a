"""Documents to token ids, many at a time."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt2_ddp.data.own_tokenizer import own_tokenizer
from gpt2_ddp.data.shards import Tokens
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.model.vocabulary import EOT

BATCH_CHARACTERS = 1 << 17
DOCUMENT, CUT = "\ufdd0", "\ufdd1"
"""Two code points that Unicode keeps out of all text; they stand for a document's beginning and for a cut."""
CUT_ID = EOT + 1
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
WHITE_SPACE = (range(9, 14), [32, 0x85, 0xA0, 0x1680], range(0x2000, 0x200B), [0x2028, 0x2029, 0x202F, 0x205F, 0x3000])
"""The code points of Unicode's property White_Space, the `\\s` of tiktoken's regular expressions."""


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of one chunk, one after the other."""

    tokens: Tokens
    """(sum of lengths,) uint16; each document begins with the end-of-text token, which occurs nowhere else."""
    lengths: npt.NDArray[np.int64]
    """(documents,)"""
    digests: npt.NDArray[np.uint64]
    """(documents,) `document_digest` of each."""
    without_text: int
    """Documents that are left out."""


def document_digest(tokens: Tokens) -> int:
    """64 bits that are equal for documents of equal text; `tokens` includes the end-of-text."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<u2", copy=False).data, digest_size=8).digest(), "little")


def encoder_for(place: Path | None) -> Encoder | OwnEncoder:
    """What encodes by the tokenizer in `place`, a data directory, or by GPT-2's."""
    return OwnEncoder(place) if place else Encoder()


class OwnEncoder:
    """The ids of a tokenizer of the user's own."""

    def __init__(self, place: Path) -> None:
        # The workers share the processor's cores already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = own_tokenizer(place)

    def encode(self, documents: Iterable[str | None]) -> EncodedChunk:
        """As `Encoder.encode`; a document of blanks alone, of which some tokenizers make no token, is one without text.

        Raises:
            UserError: where a document has the token in it that begins documents.
        """
        number, eot = itertools.count(), self._tokenizer.eot_token
        counted = (text for text, _ in zip(documents, number, strict=False))
        rows = (row for batch in _batches(counted) for row in self._tokenizer.encode_many(batch))
        texts: list[Tokens] = [np.array([eot, *row], np.uint16) for row in rows if row]
        return EncodedChunk(
            tokens=np.concatenate([np.array([], np.uint16), *texts]),
            lengths=np.array([len(text) for text in texts], np.int64),
            digests=np.array([document_digest(text) for text in texts], np.uint64),
            without_text=next(number) - len(texts),
        )


class Encoder:
    """tiktoken's `gpt2` ids at about twice its speed.

    Half of tiktoken's time goes to a look-ahead in GPT-2's pattern: white space before a word is a piece without
    its last character, which goes with the word. Where a run of white space is cut before that character
    beforehand, the pattern needs no look-ahead, and tiktoken's plain regular expressions find the same pieces.
    """

    def __init__(self) -> None:
        self._exact = load_tokenizer()
        self._fast = tiktoken.Encoding(
            "gpt2 without look-ahead",
            pat_str=WORDS,
            mergeable_ranks=self._exact._mergeable_ranks,
            special_tokens={DOCUMENT: EOT, CUT: CUT_ID},
        )
        # A document's beginning ends a run of white space like the end of the text: nothing to cut before it.
        self._ends_no_run = np.zeros(1 << 16, np.bool_)
        self._ends_no_run[[ord(DOCUMENT), *(code for codes in WHITE_SPACE for code in codes)]] = True

    def encode(self, documents: Iterable[str | None]) -> EncodedChunk:
        """Tokenize a chunk; documents without text are left out, and `<|endoftext|>` within one is ordinary text."""
        number = itertools.count()
        counted = (text for text, _ in zip(documents, number, strict=False))
        parts = [np.array([], np.uint16), *map(self._encode_batch, _batches(counted))]
        tokens = np.concatenate(parts)
        begins = np.flatnonzero(tokens == EOT)
        texts = np.split(tokens, begins)[1:]
        return EncodedChunk(
            tokens=tokens,
            lengths=np.diff(np.append(begins, len(tokens))),
            digests=np.array([document_digest(text) for text in texts], np.uint64),
            without_text=next(number) - len(begins),
        )

    def _encode_batch(self, texts: list[str]) -> Tokens:
        joined = "".join(DOCUMENT + text for text in texts)
        if joined.count(DOCUMENT) != len(texts) or CUT in joined:
            return self._encode_singly(texts)
        try:
            units = np.frombuffer(joined.encode("utf-16-le"), "<u2")
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
            return self._encode_singly(texts)
        space = self._ends_no_run[units]
        cuts = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
        text = np.insert(units, cuts, ord(CUT)).tobytes().decode("utf-16-le")
        ids = self._fast.encode_to_numpy(text, allowed_special={DOCUMENT, CUT}, disallowed_special=())
        tokens: Tokens = ids[ids != CUT_ID].astype(np.uint16)
        return tokens

    def _encode_singly(self, texts: list[str]) -> Tokens:
        ids = [token for text in texts for token in (EOT, *self._exact.encode_ordinary(text))]
        return np.array(ids, np.uint16)


def _batches(documents: Iterable[str | None]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in documents:
        if not text:
            continue
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
