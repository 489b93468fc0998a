"""What a rule for updating parameters is, and the usual one, AdamW.

Any `torch.optim.Optimizer` will do: bad steps are left out for it by `updates.apply_update`, its state travels by the
names of the parameters, and what is checked of a saved state is read from the state that a rule allocates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.optim.updates import zero_gradients


@dataclass(frozen=True, kw_only=True)
class OptimizerRule(ABC):
    """How to make one optimizer. The fields, and those that a subclass adds, are flags of the same name."""

    weight_decay: float

    def make(self, model: nn.Module, context: DistContext, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        """The optimizer over the parameters of the raw `model`, its state and the gradients allocated.

        `dtype` is that of the run's matmuls.
        """
        optimizer = self.over(self.groups(model), context, dtype)
        self.allocate_state(optimizer)
        return optimizer

    def state_bytes(self, config: GPTConfig) -> int:
        """What the state of a model of this shape takes, asked of a model without memory."""
        groups = self.groups(GPT(config, device="meta"))
        states = (self.first_state(parameter, group) for group in groups for parameter in group["params"])
        return sum(tensor.nbytes for state in states for tensor in state.values())

    def allocate_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer the state that its first step would, and the parameters their gradients.

        Allocated before a step's temporary tensors they do not lie between these, where they would break up the memory.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = self.first_state(parameter, group)
            zero_gradients(group["params"])

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters in groups, in the order of the model. A group's `lr_factor`, 1 if it has none, is what the
        schedule's rate is multiplied with for it.
        """
        return parameter_groups(model, self.weight_decay)

    @abstractmethod
    def over(self, groups: list[dict[str, Any]], context: DistContext, dtype: torch.dtype) -> torch.optim.Optimizer:
        """The optimizer over `groups`, whose rate is set before each step; matmuls of its own may be in `dtype`."""

    @abstractmethod
    def first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter of `group` before its first update, by name, as the optimizer would begin it."""


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerRule):
    """AdamW (Loshchilov and Hutter 2019), fused where PyTorch has that: it leaves bad steps out on the device."""

    beta1: float
    beta2: float

    def over(self, groups: list[dict[str, Any]], context: DistContext, dtype: torch.dtype) -> torch.optim.Optimizer:  # noqa: ARG002
        fused = context.device.type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=1e-8, fused=fused)

    def first_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order of the model's parameters: matrices and embeddings decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
