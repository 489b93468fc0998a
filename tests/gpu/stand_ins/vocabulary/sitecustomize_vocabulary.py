"""A made-up vocabulary in the place of GPT-2's, where its files are not here and cannot be downloaded."""

from __future__ import annotations

import itertools

import tiktoken


def made_up() -> tiktoken.Encoding:
    """50,256 tokens: the bytes, then pairs of them; and <|endoftext|>."""
    pairs = (bytes(pair) for pair in itertools.product(range(256), repeat=2))
    tokens = [*(bytes([byte]) for byte in range(256)), *itertools.islice(pairs, 50_000)]
    return tiktoken.Encoding(
        name="made_up",
        pat_str=r"\S+|\s+",
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": 50_256},
    )


def install() -> None:
    """From now on the project's tokenizer is the made-up one; before other modules have taken the function's name."""
    from gpt2_ddp.data import tokenizer

    encoding = made_up()
    tokenizer.load_tokenizer = lambda: encoding
