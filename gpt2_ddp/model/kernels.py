"""The places where plain operations waste most: the head with its loss, attention in bfloat16 on a CPU, and what the
backward pass need not be given, since it can compute it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CPU_HEAD_ROWS = 512
HEAD_ROWS, LARGE_HEAD_ROWS = 4096, 8192
"""Positions whose logits exist at a time in training, on a CPU, on a GPU, and on one with a large memory; adding up the
head's gradient costs more the fewer they are."""
LARGE_MEMORY = 36 * 10**9
"""Bytes from which a GPU's memory is large: 8192 positions of GPT-2's vocabulary take 1.6 GB more than 4096."""
PRODUCT_ROWS = 1024
"""Rows of the head's gradient that are added up at a time on a CPU."""
FLOAT32_SUMS = "2.10"
"""The torch from which `addmm(..., out_dtype=torch.float32)` adds to a sum in float32 (pytorch pull request 167931)."""
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


def head_rows(device: torch.device) -> int:
    """Positions whose logits exist at a time on `device`."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return head_rows_for(device.type, memory)


def head_rows_for(device_type: str, memory: int) -> int:
    """As `head_rows`, of a device with `memory` bytes."""
    if device_type == "cpu":
        return CPU_HEAD_ROWS
    return LARGE_HEAD_ROWS if memory >= LARGE_MEMORY else HEAD_ROWS


def chunk_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The summed loss of logits (rows, vocab_size) for target (rows, 1), a float32 scalar."""
    return F.cross_entropy(logits.float(), target.squeeze(1), reduction="sum")


def chunk_loss_and_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
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


ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def head_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int | None = None,
    loss_and_gradient: ChunkLoss = chunk_loss_and_gradient,
) -> Tensor:
    """Mean cross-entropy in nats of the head's logits, a float32 scalar.

    features (N, n_embd), weight (vocab_size, n_embd), targets (N,) int64. Logits of `rows` positions exist at a time,
    by default as many as keep the device's matmuls busy. Where no gradient is asked for, none is computed.
    `loss_and_gradient` is `chunk_loss_and_gradient`, or that compiled.
    """
    rows = rows or head_rows(features.device)
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        loss: Tensor = HeadLoss.apply(features, weight, targets, rows, loss_and_gradient)  # type: ignore[no-untyped-call]
        return loss
    dtype = autocast_dtype(features)
    lowered = weight.to(dtype)
    total = features.new_zeros((), dtype=torch.float32)
    for x, target in chunks(features.to(dtype), targets, rows):
        total = total + chunk_loss(x @ lowered.t(), target)
    return total / len(features)


def chunks(features: Tensor, targets: Tensor, rows: int) -> Iterable[tuple[Tensor, Tensor]]:
    """features (at most `rows`, n_embd) and targets (at most `rows`, 1), from first to last."""
    return zip(torch.split(features, rows), torch.split(targets[:, None], rows), strict=True)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head, over chunks of rows, so that the logits never exist all at once.

    The gradients are computed with the loss, while a chunk's logits are there: computing those again in the backward
    pass would cost another matmul. The idea is that of Liger's fused linear cross-entropy (Hsu et al. 2024,
    arXiv:2410.10989), in plain PyTorch operations.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, rows: int, loss_and_gradient: ChunkLoss
    ) -> Tensor:
        dtype = autocast_dtype(features)
        lowered = weight.to(dtype)
        total = features.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        weight_gradient = torch.zeros_like(weight)
        for x, target in chunks(features.to(dtype), targets, rows):
            loss, gradient = loss_and_gradient(x @ lowered.t(), target)
            total = total + loss
            gradients.append(gradient @ lowered)
            accumulate(weight_gradient, gradient, x)
            del gradient  # else it would live beside the next chunk's
        ctx.save_for_backward(torch.cat(gradients), weight_gradient)
        return total / len(features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream / len(features_gradient)
        return features_gradient.to(scale.dtype) * scale, weight_gradient.mul_(scale), None, None, None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.t() @ right to `total`, of float32, without rounding the product to the dtype of its factors first.

    That would be coarse in bfloat16, and in float16 infinite past 65504, where no gradient scaler can help, since these
    gradients have not met it yet. Where there is no such matmul, the product is rounded in bfloat16, and computed in
    float32 instead of float16; so many rows at a time that on a CPU it never leaves the cache.
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif total.device.type in ("cuda", "meta") and torch.__version__ >= FLOAT32_SUMS:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    else:
        rows = PRODUCT_ROWS if total.device.type == "cpu" else len(total)
        if left.dtype == torch.float16:
            right = right.float()
        for part, columns in zip(torch.split(total, rows), torch.split(left, rows, dim=1), strict=True):
            part.add_(columns.t().to(right.dtype) @ right)
