"""The places where plain operations waste most: the head with its loss, attention in bfloat16 on a CPU, and what the
backward pass need not be given, since it can compute it again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HEAD_ROWS = {"cpu": 512, "cuda": 4096}
"""Positions whose logits exist at a time in training; adding up the head's gradient costs more the fewer they are."""
QUERY_ROWS = 256
"""Queries whose attention weights exist at a time. Fewer leave out more of the masked half, but make small matmuls."""


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *, random: bool = False) -> Tensor:
    """function(x), of which only `x` is kept for the backward pass, which computes the rest again, up to the inputs of
    the last operation. Where `function` draws random numbers, `random` makes it draw the same ones."""
    if not torch.is_grad_enabled():
        return function(x)
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=random)
    return y


def product(linear: Callable[[Tensor], Tensor], cheap: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """linear(cheap(x)), of which `x` is kept for the backward pass and what `cheap` gives is not.

    Called on its own, `linear` would keep what `cheap` gives. So in eager mode it is part of what is recomputed, which
    ends before its matmul. `torch.compile` would compute that matmul again, but keeps nothing that is marked as
    recomputed: there `linear` stays outside.
    """
    if torch.compiler.is_compiling():
        return linear(recomputed(cheap, x))
    return recomputed(lambda x: linear(cheap(x)), x)


def gelu(x: Tensor) -> Tensor:
    """GELU by the tanh of Hendrycks and Gimpel 2016 (arXiv:1606.08415), with which GPT-2 was trained.

    Where it is compiled, 1 + tanh(u) is written 2 sigmoid(2u), which a CPU computes in half the time.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention of each position to itself and those before: q, k, v (B, n_head, T, head width) -> the same.

    PyTorch's own everywhere but in bfloat16 on a CPU, where its backward pass is far slower than the matmuls in it.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout:
        y: Tensor = BlockAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return y
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class BlockAttention(torch.autograd.Function):
    """Exact attention, a block of queries at a time; the backward pass computes the weights again.

    A product of bfloat16 matrices is rounded to bfloat16, which for scores far from zero would be coarse. They are
    therefore computed twice: first for the greatest of each row, then with that subtracted inside the product, by one
    more column in q and k, so that the weights that count have scores near zero. The result is then as good as that of
    PyTorch's kernel, which keeps scores in float32 (tests/test_kernels.py).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[-1]
        q, v = q * (1 / math.sqrt(width)), v.contiguous()
        keys = torch.cat((k, torch.ones_like(k[..., :1])), -1)
        outputs, queries = [], []
        for start, end in blocks(q):
            block = q[:, :, start:end]
            greatest = masked_scores(block, keys[:, :, :end, :width], start).amax(-1, keepdim=True)
            queries.append(torch.cat((block, -greatest), -1))
            weights = masked_scores(queries[-1], keys[:, :, :end], start).softmax(-1)
            outputs.append(weights @ v[:, :, :end])
        ctx.save_for_backward(torch.cat(queries, 2), keys, v)
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, v = ctx.saved_tensors
        width = v.shape[-1]
        upstream = upstream.contiguous()
        dq, dk, dv = [], torch.zeros_like(v, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for start, end in blocks(queries):
            block, dy = queries[:, :, start:end], upstream[:, :, start:end]
            weights = masked_scores(block, keys[:, :, :end], start).softmax(-1)
            dv[:, :, :end] += weights.transpose(-1, -2) @ dy
            dweights = dy @ v[:, :, :end].transpose(-1, -2)
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq.append(dscores @ keys[:, :, :end, :width])
            dk[:, :, :end] += dscores.transpose(-1, -2) @ block[..., :width]
        return torch.cat(dq, 2) * (1 / math.sqrt(width)), dk.to(v.dtype), dv.to(v.dtype)


def blocks(q: Tensor) -> list[tuple[int, int]]:
    """Where each block of queries begins and ends."""
    length = q.shape[2]
    return [(start, min(start + QUERY_ROWS, length)) for start in range(0, length, QUERY_ROWS)]


def masked_scores(q: Tensor, keys: Tensor, start: int) -> Tensor:
    """q times keys, minus infinity where the key comes after the query; q begins at position `start`, keys at 0."""
    scores = q @ keys.transpose(-1, -2)
    future = torch.full((q.shape[2], q.shape[2]), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores[..., start:] += future
    return scores


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What a matmul of `tensor` computes in here: autocast's dtype where that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def head_loss(features: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Mean cross-entropy in nats of the head's logits, a float32 scalar.

    features (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64. Logits of `rows` positions exist at a time,
    by default as many as keep the device's matmuls busy.
    """
    rows = rows or HEAD_ROWS.get(features.device.type, HEAD_ROWS["cpu"])
    loss: Tensor = HeadLoss.apply(features, weight, targets, rows)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head, over chunks of rows, so that the logits never exist all at once.

    The gradients are computed with the loss, while a chunk's logits are there: computing those again in the backward
    pass would cost another matmul. The idea is that of Liger's fused linear cross-entropy (Hsu et al. 2024,
    arXiv:2410.10989), in plain PyTorch operations, which `torch.compile` fuses.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        dtype = autocast_dtype(features)
        lowered = weight.to(dtype)
        total = features.new_zeros((), dtype=torch.float32)
        gradients, weight_gradient = [], None
        for x, target in zip(torch.split(features.to(dtype), rows), torch.split(targets[:, None], rows), strict=True):
            loss, gradient = chunk_loss(x @ lowered.t(), target)
            total = total + loss
            if any(ctx.needs_input_grad):
                gradients.append(gradient @ lowered)
                if weight_gradient is None:
                    weight_gradient = (gradient.t() @ x).to(weight.dtype)
                elif weight_gradient.dtype == dtype:
                    weight_gradient.addmm_(gradient.t(), x)  # without a product of its own
                else:
                    weight_gradient.add_(gradient.t() @ x)
            del gradient  # else it would live beside the next chunk's
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(gradients), weight_gradient)
        return total / len(features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream / len(features_gradient)
        return features_gradient.to(scale.dtype) * scale, weight_gradient.mul_(scale), None, None


def chunk_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (rows, vocab_size) for target (rows, 1), float32, and its gradient in their dtype.

    Float32 logits become their gradient in place: one exponential for each, and no second tensor of their size.
    """
    dtype, picked = logits.dtype, logits.gather(-1, target).float()
    greatest = logits.amax(-1, keepdim=True).float()
    exponentials = logits.float().sub_(greatest).exp_()
    total = exponentials.sum(-1, keepdim=True)
    log_probability = picked - greatest - total.log()
    gradient = exponentials.div_(total).to(dtype)
    gradient.scatter_(-1, target, log_probability.expm1().to(dtype))
    return -log_probability.sum(), gradient
