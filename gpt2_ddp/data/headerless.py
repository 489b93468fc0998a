"""nanoGPT's `train.bin` and `val.bin`: uint16 token ids from the first byte on, with no header before them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt2_ddp.model.vocabulary import VOCAB_SIZE
from gpt2_ddp.system.errors import UserError

NAMES = ("train.bin", "val.bin")
ALPHABET = "meta.pkl"
"""What nanoGPT writes beside ids of a vocabulary of its own, as that of its `shakespeare_char`; it is not opened."""


def headerless_tokens(path: Path, beginning: bytes) -> int | None:
    """How many token ids the file at `path` holds, None where it is no such file.

    `beginning` is its first KiB, or all of it. The magic number of a header has an id past GPT-2's vocabulary as its
    first two bytes (55432), which tells the two apart.

    Raises:
        UserError: for ids of another vocabulary or another width, and a file that is cut within an id.
    """
    ids = np.frombuffer(beginning[: len(beginning) // 2 * 2], "<u2")
    if path.name not in NAMES or not len(ids) or ids[0] >= VOCAB_SIZE:
        return None
    if path.with_name(ALPHABET).exists():
        mend = "prepare the text itself: python -m data_prep text FILE --out DIR"
        raise UserError(f"{path}: by {ALPHABET} beside it, its ids are not those of GPT-2's vocabulary; {mend}")
    if len(ids) > 1 and not ids[1::2].any():
        mend = "write them as uint16, as nanoGPT does"
        raise UserError(f"{path}: every second id at its beginning is 0, so these are ids of 32 bits, or none; {mend}")
    if (size := path.stat().st_size) % 2:
        raise UserError(f"{path}: {size} bytes without a header are no whole number of uint16 ids; copy it again")
    return size // 2
