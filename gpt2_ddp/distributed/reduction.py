"""How the gradients of a step's micro-batches become the one gradient of the step, on every rank.

Two ways with one interface: DDP, the fast one, and a fixed binary tree, whose sum is the same to the bit on any
power-of-two number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.distributed.wrapping import grad_sync
from gpt2_ddp.system.errors import UserError


class GradientReduction(Protocol):
    """Called around every micro-step, forward and backward; `finish` leaves the mean gradient in each `.grad`."""

    weight: float
    """What the loss of a micro-batch is multiplied with before its backward pass."""
    zero_in_place: bool
    """Whether the gradients must stay where they are when they are zeroed."""

    def micro_step(self, number: int) -> AbstractContextManager[None]:
        """The context of micro-step `number`, counted from 1, forward and backward."""

    def add(self, loss: Tensor) -> None:
        """Take in the loss (0-dim, detached) of the micro-step whose backward pass has just run."""

    def finish(self) -> Tensor:
        """The mean loss of the step over all ranks, 0-dim on the device."""


class DDPReduction:
    """DDP reduces once a step, in the backward pass of the last micro-step; the others run under `no_sync`."""

    def __init__(self, module: nn.Module, context: DistContext, micro_steps: int) -> None:
        self.weight = 1 / micro_steps
        self.zero_in_place = isinstance(module, DistributedDataParallel)
        self._module, self._context, self._micro_steps = module, context, micro_steps
        self._loss = torch.zeros((), device=context.device)

    def micro_step(self, number: int) -> AbstractContextManager[None]:
        return grad_sync(self._module, sync=number == self._micro_steps)

    def add(self, loss: Tensor) -> None:
        self._loss += loss * self.weight

    def finish(self) -> Tensor:
        loss, self._loss = self._loss, torch.zeros_like(self._loss)
        return self._context.sum(loss) / self._context.world_size


class TreeReduction:
    """The micro-batches of a step, in their global order, are the leaves of a binary tree that is summed pairwise.

    A rank sums the subtree of its contiguous share, holding one partial sum a level; then the ranks exchange theirs by
    recursive doubling. Addition commutes, so both partners of an exchange get the same bits, and the tree is the same
    however many ranks share it.
    """

    def __init__(self, module: nn.Module, context: DistContext, micro_steps: int) -> None:
        self.weight = 1 / (micro_steps * context.world_size)
        self.zero_in_place = False
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._context = context
        self._partial: list[tuple[int, list[Tensor]]] = []  # (level, loss and gradients), the levels falling

    def micro_step(self, number: int) -> AbstractContextManager[None]:  # noqa: ARG002  every micro-step is alike
        return nullcontext()

    def add(self, loss: Tensor) -> None:
        level, leaf = 0, [loss * self.weight]
        for parameter in self._parameters:
            assert parameter.grad is not None
            leaf.append(parameter.grad.contiguous())
            parameter.grad = None
        while self._partial and self._partial[-1][0] == level:
            _, left = self._partial.pop()
            torch._foreach_add_(left, leaf)
            level, leaf = level + 1, left
        self._partial.append((level, leaf))

    def finish(self) -> Tensor:
        [(_, (loss, *gradients))] = self._partial
        self._partial = []
        distance = 1
        while distance < self._context.world_size:
            for tensor in (loss, *gradients):
                self._context.add_from(self._context.rank ^ distance, tensor)
            distance *= 2
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss


def require_tree(micro_batches: int, world_size: int) -> None:
    """
    Raises:
        UserError: where the micro-batches of a step, or the ranks, do not make a full binary tree.
    """
    for name, count in (("micro-batches in a step", micro_batches), ("ranks", world_size)):
        if count & (count - 1):
            raise UserError(f"--reproducible needs a power of two of {name}, not {count}")


def require_same_numerics(told: Sequence[Mapping[str, object]], saved: object) -> None:
    """Check that every rank, and the run that is resumed, computes with the same hardware, formats and versions.

    Raises:
        UserError: naming what differs; bits are only promised where all of it is equal.
    """
    if saved is not None and not saved:
        raise UserError("--reproducible: the run that is resumed was not begun with it: resume without the flag")
    first = dict(told[0])
    others = [(f"rank {rank}", values) for rank, values in enumerate(told)]
    if saved is not None:
        others.append(("the run that is resumed", saved if isinstance(saved, dict) else {}))
    for who, values in others:
        different = [f"{name} {values.get(name)!r}" for name in first if values.get(name) != first[name]]
        if different:
            wanted = ", ".join(f"{name} {value!r}" for name, value in first.items() if values.get(name) != value)
            raise UserError(f"--reproducible: {who} has {', '.join(different)}, not {wanted}")


def use_deterministic_kernels(device: torch.device) -> None:
    """Choose kernels whose sums have one order. On the CPU that takes one thread a rank: threads divide the sums.

    On CUDA this must run before the first matmul: cuBLAS reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.set_num_threads(1)
