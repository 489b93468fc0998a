"""Causal attention, and the keys and values that sampling keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_ddp.model.block_attention import BlockAttention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention of the last T of S positions to themselves and those before, (B, n_head, T, head width).

    q (B, n_head, T, head width); k and v (B, n_head, S, head width). A boolean `mask`, broadcast to (B, n_head, T, S),
    says instead which positions are seen. PyTorch's own everywhere but in bfloat16 on a CPU, where its backward pass is
    far slower than the matmuls in it.
    """
    length, seen = q.shape[2], k.shape[2]
    if mask is None and 1 < length < seen:
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
    causal = mask is None and length == seen
    if causal and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        y: Tensor = BlockAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return y
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)


class KeyValueCache:
    """The keys and values of the positions that one layer has read, so that the next ones can look back at them.

    The memory for `capacity` positions is taken once: a step that copied what is there would take longer with each.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._stored: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, n_head, T, head width) of the next T positions -> those of all so far, (B, n_head, S, width)."""
        if self._stored is None:
            shape = (*k.shape[:2], self._capacity, k.shape[3])
            self._stored = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        for stored, new in zip(self._stored, (k, v), strict=True):
            stored[:, :, start : self.length] = new
        return self._stored[0][:, :, : self.length], self._stored[1][:, :, : self.length]
