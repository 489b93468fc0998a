"""Documents to token ids, a whole chunk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tiktoken

from gpt2_ddp.shards import Tokens
from gpt2_ddp.tokenizer import EOT


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of one chunk, one after the other."""

    tokens: Tokens
    """(sum of lengths,) uint16; each document begins with `EOT`, which occurs nowhere else."""
    lengths: npt.NDArray[np.int64]
    """(documents,)"""
    digests: npt.NDArray[np.uint64]
    """(documents,) `document_digest` of each."""


def document_digest(tokens: Tokens) -> int:
    """64 bits that are equal for documents of equal text; `tokens` includes the `EOT`."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<u2", copy=False).data, digest_size=8).digest(), "little")


def encode(documents: Iterable[str | None], tokenizer: tiktoken.Encoding) -> EncodedChunk:
    """Tokenize a chunk; documents without text are left out, and `<|endoftext|>` within one is ordinary text."""
    begin = np.array([EOT], np.uint16)
    encoded = [np.concatenate([begin, _ids(text, tokenizer).astype(np.uint16)]) for text in documents if text]
    return EncodedChunk(
        tokens=np.concatenate([begin[:0], *encoded]),
        lengths=np.array([len(tokens) for tokens in encoded], np.int64),
        digests=np.array([document_digest(tokens) for tokens in encoded], np.uint64),
    )


def _ids(text: str, tokenizer: tiktoken.Encoding) -> npt.NDArray[np.uint32]:
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return tokenizer.encode_to_numpy(whole, disallowed_special=())
