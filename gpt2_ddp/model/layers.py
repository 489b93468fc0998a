"""The cheap layers of a block, whose outputs the backward pass computes again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_ddp.model.recomputation import Recomputed
from gpt2_ddp.system.precision import matmul_dtype


class LayerNorm(Recomputed, nn.LayerNorm):
    """Of the residual stream in float32, in the dtype of the matmul that reads it."""

    def compute(self, x: Tensor) -> Tensor:
        return nn.LayerNorm.forward(self, x).to(matmul_dtype(x))


class GELU(Recomputed):
    """By the tanh of Hendrycks and Gimpel 2016 (arXiv:1606.08415), with which GPT-2 was trained.

    Where it is compiled, 1 + tanh(u) is written 2 sigmoid(2u), which a CPU computes in half the time.
    """

    def compute(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        wide = x.float()
        return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
