"""What is optimized, by which rule, at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gpt2_ddp.system.errors import UserError

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What PyTorch's AdamW keeps of every parameter: a float32 scalar, and two moments of the parameter's shape."""


def learning_rate(step: int, *, max_steps: int, warmup_steps: int, max_lr: float, min_lr: float) -> float:
    """The rate of update `step`, counted from 1: linear to `max_lr` at `warmup_steps`, then a cosine to `min_lr`.

    The last step has exactly `min_lr`, and so has any after it (Loshchilov and Hutter 2017, SGDR, without restarts).
    """
    if step <= warmup_steps:
        return max_lr * step / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups in the order of the model's parameters: matrices and embeddings decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the parameters of the raw `model`, fused where PyTorch has that.

    The fused kernel also skips an update on the device when a gradient is not finite, without telling the host.
    """
    fused = device.type in ("cuda", "cpu", "mps")
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the moments of zero that its first step would, and the parameters their gradients.

    Allocated before a step's temporary tensors they do not lie between these, where they would break up the memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in ADAMW_STATE if key != "step"}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        zero_gradients(group["params"])


def zero_gradients(parameters: Iterable[nn.Parameter], *, in_place: bool = False) -> None:
    """No gradients; with `in_place`, and always on a CPU, zeros where the gradients are.

    On a CPU the allocator may not keep the sizes of tensors apart. Under DDP the gradients are views of its buckets,
    which stay: without these views the micro-steps under `no_sync` would allocate a second set beside them.
    """
    kept: list[Tensor] = []
    for parameter in parameters:
        if in_place or parameter.device.type == "cpu":
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                kept.append(parameter.grad)
        else:
            parameter.grad = None
    if kept:
        torch._foreach_zero_(kept)


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
        UserError: for a name, a shape or a dtype that is not the model's, or where a part of the state is missing;
            nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        shape = None if name not in parameters else torch.Size([]) if key == "step" else parameters[name].shape
        if tensor.shape != shape or key not in ADAMW_STATE or tensor.dtype != torch.float32:
            found = f"{full_name} {tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"the optimizer state {found} fits no parameter of the model")
    missing = [f"{name}.{key}" for name in parameters for key in ADAMW_STATE if f"{name}.{key}" not in tensors]
    if tensors and missing:  # before the first update there may be no state at all
        raise UserError(f"the optimizer state lacks {missing[0]} and {len(missing) - 1} more")
    for moment in () if tensors else optimizer_tensors(model, optimizer).values():
        moment.zero_()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        state = optimizer.state[parameters[name]]
        if key in state:
            state[key].copy_(tensor)
        else:
            state[key] = tensor.to(parameters[name].device, copy=True)


def apply_update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    loss: Tensor,
    grad_clip: float,
    zero_in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Unscale, clip and update, unless `loss` or a gradient is not finite: then nothing changes at all.

    `loss` and the gradients must be the same on every rank, so that every rank skips or none. The host is not waited
    for: fused optimizers leave the update out on the device where `found_inf` is 1, which is how a `GradScaler`
    talks to them. Then the gradients are zeroed, as `zero_gradients` does.

    Returns:
        The norm of the gradient before clipping and whether the update was skipped, 0-dim on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    parameters[0].grad.add_(loss.detach() * 0)  # a loss of inf or nan makes the gradient nan
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    skipped = ~norm.isfinite()
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
    optimizer.step()  # not by `scaler.step`, which knows of bad gradients, but not of a norm past float32
    if scaler.is_enabled():
        scaler.update()
    zero_gradients(parameters, in_place=zero_in_place)
    return norm, skipped


class SkipCount:
    """Counts skipped updates on the device, in all and in a row."""

    def __init__(self, total: int, device: torch.device, in_a_row: int = 0) -> None:
        self._device = device
        self.restore(total, in_a_row)

    def restore(self, total: int, in_a_row: int) -> None:
        """Go on from the counts of a checkpoint."""
        self._total = torch.tensor(total, device=self._device)
        self._in_a_row = torch.tensor(in_a_row, device=self._device)
        self._longest = torch.tensor(0, device=self._device)

    def add(self, skipped: Tensor) -> None:
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def total(self) -> int:
        """Waits for the device."""
        return int(self._total)

    def in_a_row(self) -> int:
        """Waits for the device."""
        return int(self._in_a_row)

    def longest(self) -> int:
        """The most in a row since the start of the process. Waits for the device."""
        return int(self._longest)
