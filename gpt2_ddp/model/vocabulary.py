"""The numbers of GPT-2's vocabulary."""

EOT = 50256
"""Id of `<|endoftext|>`, which begins every document; the greatest id."""
VOCAB_SIZE = EOT + 1
PADDED_VOCAB_SIZE = 50304
"""`VOCAB_SIZE` rounded up to a multiple of 128, for fast matrix products; ids past it stand for nothing."""
