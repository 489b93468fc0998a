"""The ranks of a run: how they meet, what they say to each other, how gradients are summed, how they end."""
