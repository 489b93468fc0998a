"""One update of the parameters, and those that are left out because a loss or a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_ddp.system.fields import count


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each parameter group the schedule's `rate`, times its own factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("lr_factor", 1.0) * rate


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


def apply_update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    loss: Tensor,
    grad_clip: float,
    zero_in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Unscale, clip and update, unless `loss` or a gradient is not finite: then nothing changes at all.

    `loss` and the gradients must be the same on every rank, so that every rank skips or none. Then the gradients are
    zeroed, as `zero_gradients` does.

    Returns:
        The norm of the gradient before clipping and whether the update was skipped, 0-dim on the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    parameters[0].grad.add_(loss.detach() * 0)  # a loss of inf or nan makes the gradient nan
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    skipped = ~norm.isfinite()
    # Not by `scaler.step`, which knows of bad gradients, but not of a norm past float32.
    step_unless(skipped, optimizer)
    if scaler.is_enabled():
        scaler.update()
    zero_gradients(parameters, in_place=zero_in_place)
    return norm, skipped


def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, or nothing where `skipped` (0-dim) is true.

    PyTorch's fused optimizers leave the step out on the device where `found_inf` is 1, which is how a `GradScaler`
    talks to them, so the host is not waited for. (On Apple's GPUs they did not look at it before PyTorch's pull request
    186360, of June 2026.) For any other optimizer the host reads `skipped`, which waits for the device once a step: to
    compute the step and take it back would hold a second set of weights and state.
    """
    looks = getattr(optimizer, "_step_supports_amp_scaling", False)  # PyTorch's mark, which `GradScaler` goes by
    if looks and skipped.device.type != "mps":
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped:
        optimizer.step()


class SkipCount:
    """Counts skipped updates on the device, in all and in a row."""

    def __init__(self, device: torch.device) -> None:
        self._total, self._in_a_row, self._longest = (torch.tensor(0, device=device) for _ in range(3))

    def add(self, skipped: Tensor) -> None:
        self._total += skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def total(self) -> int:
        """Waits for the device."""
        return int(self._total)

    def longest(self) -> int:
        """The most in a row since the start of the process, or since a state was loaded. Waits for the device."""
        return int(self._longest)

    def state_dict(self) -> dict[str, Any]:
        """Waits for the device."""
        return {"skipped": int(self._total), "skipped_in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: where a count is none.
        """
        total, in_a_row = count(state, "skipped"), count(state, "skipped_in_a_row")
        self._total.fill_(total)
        self._in_a_row.fill_(in_a_row)
        self._longest.fill_(0)
