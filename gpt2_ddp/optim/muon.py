"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, made orthogonal matrix by matrix.

The arithmetic is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982),
by which rates and decay mean what they mean for AdamW. Beyond it, q, k and v are three matrices, the ranks share the
work, the dtype is that of the run, and the momentum rises at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.optim.rule import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: Jordan et al. chose them for a steep slope at 0; singular values end near 1, not at it."""
ITERATIONS = 5
EPSILON = 1e-7
FIRST_MOMENTUM = 0.85
"""What the momentum rises from, as in modded-nanogpt."""


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, n) float32 to (m, n) of `dtype`: near U V' of the singular value decomposition U S V'."""
    a, b, c = COEFFICIENTS
    wide = matrix.to(dtype)
    if matrix.size(0) > matrix.size(1):
        wide = wide.T
    wide = wide / wide.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.size(0) > matrix.size(1) else wide


def momentum_at(step: int, group: Mapping[str, Any]) -> float:
    """The momentum of update `step`, counted from 1: linear from 0.85 to the group's over its `momentum_warmup`."""
    last: float = group["momentum"]
    if step > group["momentum_warmup"]:
        return last
    return FIRST_MOMENTUM + (last - FIRST_MOMENTUM) * (step - 1) / group["momentum_warmup"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One matrix that is made orthogonal for itself: rows of a parameter, of its gradient and of its momentum."""

    weight: Tensor
    gradient: Tensor
    buffer: Tensor
    momentum: float
    group: Mapping[str, Any]

    @property
    def cost(self) -> int:
        """Multiplications in one iteration."""
        small, large = sorted(self.weight.shape)
        return small * small * (2 * large + small)

    def update(self, dtype: torch.dtype) -> Tensor:
        """Nesterov's momentum, made orthogonal."""
        return orthogonal(self.gradient.lerp(self.buffer, self.momentum), dtype).contiguous()

    def apply(self, update: Tensor) -> None:
        """Decay, and add the update with the root mean square that AdamW's have in practice: 0.2 of the rate."""
        rate = self.group["lr"]
        self.weight.mul_(1 - rate * self.group["weight_decay"])
        self.weight.add_(update, alpha=-rate * (0.2 * math.sqrt(max(self.weight.shape))))


class Muon(torch.optim.Optimizer):
    """Muon for the groups of matrices, and another optimizer for the rest of the parameters.

    A group has its `momentum`, `momentum_warmup` in updates, and `pieces`: how many matrices of equal size lie below
    each other in a parameter. Every rank must come with the same gradients. Each matrix is made orthogonal by one rank,
    alone and whole, and sent to the others: which rank depends on their number, what comes out does not. While it
    updates it holds one matrix in `dtype` for each rank.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], rest: torch.optim.Optimizer, context: DistContext, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._context, self._dtype, self._rest, self._groups = context, dtype, rest, self.param_groups
        rest.state = self.state  # one state and one list of groups for all who look at an optimizer
        self.param_groups = [*self._groups, *rest.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; collective. Waits for the device, which counts the updates."""
        assert closure is None
        self._rest.step()
        pieces = sorted(self._pieces(), key=lambda piece: -piece.cost)
        ranks = self._context.world_size
        for start in range(0, len(pieces), ranks):  # in rounds of like costs, one for each rank
            self._update(pieces[start : start + ranks])

    def _pieces(self) -> Iterator[Piece]:
        """Every matrix, its gradient taken into its momentum."""
        for group in self._groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] += 1
                momentum = momentum_at(int(state["step"]), group)
                state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                parts = (each.chunk(group["pieces"]) for each in (weight, weight.grad, state["momentum_buffer"]))
                for rows, gradient, buffer in zip(*parts, strict=True):
                    yield Piece(weight=rows, gradient=gradient, buffer=buffer, momentum=momentum, group=group)

    def _update(self, pieces: Sequence[Piece]) -> None:
        """Piece after piece, of which the rank of that number makes the update."""
        updates = [
            piece.update(self._dtype)
            if owner == self._context.rank
            else torch.empty_like(piece.weight, dtype=self._dtype)
            for owner, piece in enumerate(pieces)
        ]
        for owner, (piece, update) in enumerate(zip(pieces, updates, strict=True)):
            self._context.broadcast_from(owner, update)
            piece.apply(update)


@dataclass(frozen=True, kw_only=True)
class MuonAndAdamW(AdamW):
    """Muon for the matrices of the blocks, AdamW for embeddings, norms and biases.

    Each has its rate, and both follow the one schedule.
    """

    max_lr: float
    muon_lr: float
    muon_momentum: float
    muon_momentum_warmup: int
    muon_weight_decay: float

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        rest = super().groups(model)
        parts: dict[int, list[nn.Parameter]] = {1: [], 3: []}
        for name, parameter in model.named_parameters():
            if name.startswith("h.") and parameter.dim() == 2:
                parts[3 if name.endswith("attn.c_attn.weight") else 1].append(parameter)  # q, k and v
        hidden = {id(parameter) for found in parts.values() for parameter in found}
        for group in rest:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in hidden]
        shared = {
            "lr_factor": self.muon_lr / self.max_lr if self.max_lr else 0.0,
            "momentum": self.muon_momentum,
            "momentum_warmup": self.muon_momentum_warmup,
            "weight_decay": self.muon_weight_decay,
        }
        return [{"params": found, "pieces": pieces, **shared} for pieces, found in parts.items()] + rest

    def over(self, groups: list[dict[str, Any]], context: DistContext, dtype: torch.dtype) -> torch.optim.Optimizer:
        matrices = [group for group in groups if "momentum" in group]
        rest = super().over([group for group in groups if "momentum" not in group], context, dtype)
        fast = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 was not tried
        return Muon(matrices, rest, context, fast)

    def first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        if "momentum" not in group:
            return super().first_state(parameter, group)
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "momentum_buffer": torch.zeros_like(parameter)}
