"""Tokens: the vocabulary, the shards they lie in, the order in which a run sees them."""
