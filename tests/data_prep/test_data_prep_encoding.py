"""The encoder of data_prep against tiktoken's own `gpt2`, id by id."""

from __future__ import annotations

import re
import sys
import unicodedata
from pydoc_data.topics import topics

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.encoding import CUT, DOCUMENT, Encoder
from gpt2_ddp.data.tokenizer import load_tokenizer

SPACES = (
    " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
PIECES = [
    *SPACES,
    "  ",
    "\n\n",
    "\r\n",
    " a",
    "word",
    "'s",
    "'LL",
    "'re",
    "7",
    "½",
    "٣",
    "é",
    "日本",
    "👩‍👩‍👧",
    "\u0301",
    "_-",
    "#",
]
ODD = [DOCUMENT, CUT, "<|endoftext|>", "\ud83d", "\udc00", "\0", "\uffff", "\U0010ffff"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=25).map("".join)


def check(encoder: Encoder, texts: list[str]) -> None:
    one_by_one = [[50256, *load_tokenizer().encode_ordinary(text)] for text in texts if text]
    chunk = encoder.encode(texts)
    assert chunk.tokens.tolist() == [token for tokens in one_by_one for token in tokens]
    assert chunk.lengths.tolist() == [len(tokens) for tokens in one_by_one]
    assert len(set(chunk.digests.tolist())) == len({tuple(tokens) for tokens in one_by_one})


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
@example(texts=["a \n", " b", "\n\n", "c  ", "  d"])
@example(texts=[])
def test_any_text_gets_the_ids_of_tiktoken(encoder: Encoder, texts: list[str]) -> None:
    check(encoder, texts)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES + ODD), max_size=12).map("".join), min_size=1, max_size=4))
def test_text_that_looks_like_markers_stays_text(encoder: Encoder, texts: list[str]) -> None:
    check(encoder, texts)


def test_real_text_in_many_batches(encoder: Encoder) -> None:
    texts = [topics[name] for name in sorted(topics)]
    reflowed = [text.replace("\n   ", "\u3000\n\t ").replace(". ", ".\xa0 ") for text in texts]
    check(encoder, [*texts, *reflowed, "x" * 400_000, " " * 400_000, " \n" * 100_000 + "end"])


def test_every_white_space_character_is_known(encoder: Encoder) -> None:
    """Each code point that could be white space, between words and in runs."""
    suspects = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if chr(code).isspace() or re.match(r"\s", chr(code)) or unicodedata.category(chr(code)) in ("Zs", "Cc", "Cf")
    ]
    check(encoder, [f"a{first}{second}b" for first in suspects for second in (" ", "\n", first)])
