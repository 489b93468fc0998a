"""The rules by which parameters can be updated. A new one is a class, here or in a file of its own, a row in
`OPTIMIZERS`, its name and its flags in config.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gpt2_ddp.optim.muon import MuonAndAdamW
from gpt2_ddp.optim.rule import AdamW, OptimizerRule
from gpt2_ddp.system.errors import UserError

OPTIMIZERS: dict[str, type[OptimizerRule]] = {"adamw": AdamW, "muon": MuonAndAdamW}


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
