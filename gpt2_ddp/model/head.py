"""The tied head with its loss, over chunks of positions, so that the logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_ddp.system.precision import matmul_dtype

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
    dtype = matmul_dtype(features)
    lowered = weight.to(dtype)
    total = features.new_zeros((), dtype=torch.float32)
    for x, target in row_chunks(features.to(dtype), targets, rows):
        total = total + chunk_loss(x @ lowered.t(), target)
    return total / len(features)


def row_chunks(features: Tensor, targets: Tensor, rows: int) -> Iterable[tuple[Tensor, Tensor]]:
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
        dtype = matmul_dtype(features)
        lowered = weight.to(dtype)
        total = features.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        weight_gradient = torch.zeros_like(weight)
        for x, target in row_chunks(features.to(dtype), targets, rows):
            loss, gradient = loss_and_gradient(x @ lowered.t(), target)
            total = total + loss
            gradients.append(gradient @ lowered)
            add_product(weight_gradient, gradient, x)
            del gradient  # else it would live beside the next chunk's
        ctx.save_for_backward(torch.cat(gradients), weight_gradient)
        return total / len(features)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        features_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream / len(features_gradient)
        return features_gradient.to(scale.dtype) * scale, weight_gradient.mul_(scale), None, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
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
