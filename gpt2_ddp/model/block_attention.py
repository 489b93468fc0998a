"""Causal attention in large matmuls, for bfloat16 on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ROWS = 256
"""Queries or keys whose attention weights exist at a time; fewer leave out more that is masked, by smaller matmuls."""


class BlockAttention(torch.autograd.Function):
    """Exact attention by large matmuls: forward a block of queries at a time, backward a block of keys (Dao 2023,
    arXiv:2307.08691, section 3.1: the weights come back from each query's log-sum-exp, with no sums over keys).

    A product of bfloat16 matrices is rounded to bfloat16, which for scores far from zero would be coarse. What is taken
    from them is therefore subtracted inside the product, by one or two more columns of its factors, and so for their
    gradients. Forward that is the greatest score of each query, for which the scores are computed twice. Backward, the
    logarithm of a weight that counts lies between -log(n), for n keys alike, and 0, for one alone; the middle is moved
    to zero, to a power of two, so that queries' gradients take the factor back without rounding. Errors are at most
    twice those of PyTorch's own kernel, which keeps scores and gradients in float32 (tests/model/test_kernels.py).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, width = q.shape[2:]
        queries, values = q * (1 / math.sqrt(width)), v.contiguous()
        keys = F.pad(k, (0, 1), value=1.0)  # other than below: the compiler would keep equal ones, and k as well
        outputs: list[Tensor] = []
        logsumexps: list[Tensor] = []
        for start in range(0, length, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, length)
            block = queries[:, :, start:end]
            future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
            scores = block @ keys[:, :, :end, :width].mT
            greatest = scores.masked_fill_(future, -math.inf).amax(-1, keepdim=True)
            weights = (torch.cat((block, -greatest), -1) @ keys[:, :, :end].mT).exp_().tril_(start)
            total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            outputs.append(((weights @ values[:, :, :end]) / total).to(q.dtype).transpose(1, 2))
            logsumexps.append(total.log() + greatest)
        y = torch.cat(outputs, 1).transpose(1, 2)  # so laid out, the heads of a position lie side by side
        ctx.save_for_backward(q, k, v, y, torch.cat(logsumexps, 2))
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, logsumexp = ctx.saved_tensors
        length, width = q.shape[2:]
        scale = 1 / math.sqrt(width)
        half = (torch.arange(1, length + 1, device=q.device).log2() / 2).round()[:, None]
        queries = append_negated(q * scale, logsumexp - half * math.log(2))
        upstream = (upstream * (-half).exp2()).to(q.dtype)
        gradients = append_negated(upstream, upstream.float().mul_(y).sum(-1, keepdim=True))
        del upstream
        keys, values = append_ones(k), append_ones(v)
        dq = q.new_zeros((*q.shape[:2], 0, width), dtype=torch.float32)
        dk: list[Tensor] = []
        dv: list[Tensor] = []
        for start in reversed(range(0, length, BLOCK_ROWS)):
            end = start + BLOCK_ROWS
            weights = (queries[:, :, start:] @ keys[:, :, start:end].mT).exp_().tril_()
            dv.insert(0, weights.mT @ gradients[:, :, start:, :width])
            dscores = (gradients[:, :, start:] @ values[:, :, start:end].mT).mul_(weights)
            del weights
            dk.insert(0, dscores.mT @ queries[:, :, start:, :width])
            tail, dq = dq, (dscores @ keys[:, :, start:end, :width]).float()
            dq[:, :, BLOCK_ROWS:] += tail
        return (dq * scale).to(q.dtype), torch.cat(dk, 2), torch.cat(dv, 2)


def append_negated(rows: Tensor, amount: Tensor) -> Tensor:
    """Two columns more, (..., n) -> (..., n + 2): append_negated(a, amount) @ append_ones(b).mT is a @ b.mT - amount.

    `amount`, (..., 1) float32, takes two numbers of the dtype of `rows` to be exact enough.
    """
    high = amount.to(rows.dtype)
    return torch.cat((rows, -high, (high - amount).to(rows.dtype)), -1)


def append_ones(rows: Tensor) -> Tensor:
    """Two columns more, (..., n) -> (..., n + 2), the other factor of `append_negated`."""
    return F.pad(rows, (0, 2), value=1.0)
