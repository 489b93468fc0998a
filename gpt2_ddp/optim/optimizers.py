"""The rules by which parameters are updated. A new one is a class here, a row in `OPTIMIZERS`, its name in config.py.

Any `torch.optim.Optimizer` will do: bad steps are left out for it by `updates.apply_update`, its state travels by the
names of the parameters, and what is checked of a saved state is read from the state that a rule allocates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpt2_ddp.optim.updates import zero_gradients
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerRule(ABC):
    """How to make one optimizer. The fields, and those that a subclass adds, are flags of the same name."""

    state_bytes: ClassVar[int]
    """What the state takes for each number of a parameter, at most."""

    weight_decay: float

    def make(self, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """The optimizer over the parameters of the raw `model`, its state and the gradients allocated."""
        optimizer = self.over(self.groups(model), device)
        self.allocate_state(optimizer)
        return optimizer

    def allocate_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer the state that its first step would, and the parameters their gradients.

        Allocated before a step's temporary tensors they do not lie between these, where they would break up the memory.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = self.first_state(parameter)
            zero_gradients(group["params"])

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters in groups, in the order of the model. A group's `lr_factor`, 1 if it has none, is what the
        schedule's rate is multiplied with for it.
        """
        return parameter_groups(model, self.weight_decay)

    @abstractmethod
    def over(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """The optimizer over `groups`, whose rate is set before each step."""

    @abstractmethod
    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of `parameter` before its first update, by name, as the optimizer itself would begin it."""


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerRule):
    """AdamW (Loshchilov and Hutter 2019), fused where PyTorch has that: it leaves bad steps out on the device."""

    state_bytes: ClassVar[int] = 8

    beta1: float
    beta2: float

    def over(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        fused = device.type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.beta1, self.beta2), eps=1e-8, fused=fused)

    def first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


OPTIMIZERS: dict[str, type[OptimizerRule]] = {"adamw": AdamW}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order of the model's parameters: matrices and embeddings decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `NAME_OF_PARAMETER.NAME_OF_STATE` -> tensor."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the state that `optimizer_tensors` gave out into that of `optimizer`, one tensor after the other.

    Raises:
        UserError: for a name, a shape or a dtype that is not the optimizer's, or where a part of the state is missing;
            nothing is changed then.
    """
    mine = optimizer_tensors(model, optimizer)
    for name, tensor in tensors.items():
        if name not in mine or (tensor.shape, tensor.dtype) != (mine[name].shape, mine[name].dtype):
            found = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"the optimizer state {found} fits no parameter of the model")
    missing = [name for name in mine if name not in tensors]
    if tensors and missing:  # before the first update there may be no state at all
        raise UserError(f"the optimizer state lacks {missing[0]} and {len(missing) - 1} more")
    for state in () if tensors else mine.values():
        state.zero_()
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)
