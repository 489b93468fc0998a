"""How many tokens there are, and which of them begins a document; GPT-2's own numbers."""

from __future__ import annotations

from dataclasses import dataclass

EOT = 50256
"""Id of `<|endoftext|>`, which begins every document; the greatest id."""
VOCAB_SIZE = EOT + 1
PADDED_VOCAB_SIZE = 50304
"""`VOCAB_SIZE` rounded up to a multiple of 128, for fast matrix products; ids past it stand for nothing."""
MOST_TOKENS = 1 << 16
"""What a shard's uint16 can tell apart."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a tokenizer: 0 to `size` - 1. `eot`, one of them, begins every document and occurs nowhere else."""

    size: int = VOCAB_SIZE
    eot: int = EOT

    @property
    def padded(self) -> int:
        """`size` rounded up to a multiple of 128."""
        return -(-self.size // 128) * 128


GPT2 = Vocabulary()
