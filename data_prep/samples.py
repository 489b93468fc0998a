"""Documents of a split, decoded for eyes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpt2_ddp.data.shards import Tokens
from gpt2_ddp.data.tokenizer import Tokenizer
from gpt2_ddp.system.console import visible

from .counting import Stream

SHOWN_HEAD, SHOWN_TAIL = 80, 30
"""Tokens of a longer document that are shown."""
FAR = 1 << 24
"""Tokens within which the end of a document is looked for."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A document of a split: tokens [start, stop), and whether an end of text stands before and after it."""

    start: int
    stop: int
    begins: bool
    ends: bool


def decode(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """Ids to text, with `<|ID|>` for one past the vocabulary and U+FFFD for bytes that are no UTF-8."""
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens >= tokenizer.n_vocab)) + 1)
    strange = (run for run in runs if len(run))
    return "".join(
        "".join(f"<|{token}|>" for token in run.tolist())
        if run[0] >= tokenizer.n_vocab
        else tokenizer.decode(run.tolist())
        for run in strange
    )


def passages(stream: Stream, eot: int, count: int) -> Iterator[Passage]:
    """At most `count` different documents, evenly spaced over a split."""
    last = -1
    for number in range(count):
        at = len(stream) * number // count
        before = stream.find(eot, at, FAR) if number else -1
        if before is None:  # no other document begins behind here
            continue
        start = before + 1
        while start < len(stream) and stream.read(start, 1)[0] == eot:
            start += 1
        if start <= last or start >= len(stream):
            continue
        last = start
        found = stream.find(eot, start, FAR)
        stop = min(len(stream), start + FAR) if found is None else found
        yield Passage(start=start, stop=stop, begins=start > 0, ends=found is not None)


def shown(passage: Passage, stream: Stream, tokenizer: Tokenizer) -> list[str]:
    """Lines that show a document, its beginning and its end if it is long, with the end of text where one stands."""
    length, mark = passage.stop - passage.start, visible(tokenizer.decode([tokenizer.eot_token]))
    if length <= SHOWN_HEAD + SHOWN_TAIL:
        text = visible(decode(tokenizer, stream.read(passage.start, length)))
    else:
        head, tail = (passage.start, SHOWN_HEAD), (passage.stop - SHOWN_TAIL, SHOWN_TAIL)
        parts = [visible(decode(tokenizer, stream.read(*part))) for part in (head, tail)]
        text = f"\n[... {length - SHOWN_HEAD - SHOWN_TAIL:,} tokens ...]\n".join(parts)
    text = f"{mark if passage.begins else ''}{text}{mark if passage.ends else ''}"
    return [f"  | {line}" for line in text.split("\n")]
