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
PRODUCT_ROWS = 1024
"""Rows of the head's gradient that are added up at a time on a CPU."""
BLOCK_ROWS = 256
"""Queries or keys whose attention weights exist at a time; fewer leave out more that is masked, by smaller matmuls."""


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
    recomputed: there `linear` stays outside, and only its cast of the input is inside.
    """
    if torch.compiler.is_compiling():
        return linear(recomputed(lambda x: cheap(x).to(autocast_dtype(x)), x))
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
    """Exact attention by large matmuls: forward a block of queries at a time, backward a block of keys (Dao 2023,
    arXiv:2307.08691, section 3.1: the weights come back from each query's log-sum-exp, with no sums over keys).

    A product of bfloat16 matrices is rounded to bfloat16, which for scores far from zero would be coarse. What is taken
    from them is therefore subtracted inside the product, by one or two more columns of its factors, and so for their
    gradients. Forward that is the greatest score of each query, for which the scores are computed twice. Backward, the
    logarithm of a weight that counts lies between -log(n), for n keys alike, and 0, for one alone; the middle is moved
    to zero, to a power of two, so that queries' gradients take the factor back without rounding. Errors are at most
    twice those of PyTorch's own kernel, which keeps scores and their gradients in float32 (tests/test_kernels.py).
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
        queries = less(q * scale, logsumexp - half * math.log(2))
        upstream = (upstream * (-half).exp2()).to(q.dtype)
        gradients = less(upstream, upstream.float().mul_(y).sum(-1, keepdim=True))
        del upstream
        keys, values = less(k), less(v)
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


def less(rows: Tensor, amount: Tensor | None = None) -> Tensor:
    """Two columns more, (..., n) -> (..., n + 2), so that less(a, amount) @ less(b).mT is a @ b.mT - amount.

    `amount`, (..., 1) float32, takes two numbers of the dtype of `rows` to be exact enough.
    """
    if amount is None:
        return F.pad(rows, (0, 2), value=1.0)
    high = amount.to(rows.dtype)
    return torch.cat((rows, -high, (high - amount).to(rows.dtype)), -1)


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
        gradients: list[Tensor] = []
        weight_gradient = torch.zeros_like(weight) if any(ctx.needs_input_grad) else None
        for x, target in zip(torch.split(features.to(dtype), rows), torch.split(targets[:, None], rows), strict=True):
            loss, gradient = chunk_loss(x @ lowered.t(), target)
            total = total + loss
            if weight_gradient is not None:
                gradients.append(gradient @ lowered)
                if weight_gradient.dtype == dtype:
                    weight_gradient.addmm_(gradient.t(), x)  # without a product of its own
                else:
                    accumulate(weight_gradient, gradient, x)
            del gradient  # else it would live beside the next chunk's
        if weight_gradient is not None:
            ctx.save_for_backward(torch.cat(gradients), weight_gradient)
        return total / len(features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream / len(features_gradient)
        return features_gradient.to(scale.dtype) * scale, weight_gradient.mul_(scale), None, None


@torch.library.custom_op("gpt2_ddp::accumulate", mutates_args={"total"})
def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.t() @ right to `total` here and now: `torch.compile` would keep the products of all chunks, to add them
    at once. On a CPU so many rows at a time that the product and its copy in float32 never leave the cache."""
    rows = PRODUCT_ROWS if total.device.type == "cpu" else len(total)
    for part, columns in zip(torch.split(total, rows), torch.split(left, rows, dim=1), strict=True):
        part.add_(columns.t() @ right)


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
