"""A model's forward passes outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_backends(device: torch.device) -> list[SDPBackend] | None:
    """What attention outside of training may be computed by; None where PyTorch's own choice is right.

    From torch 2.11 on PyTorch prefers cuDNN on Hopper and later, which plans anew for each shape it meets, and a sample
    has another length at every token.
    """
    if device.type != "cuda":
        return None
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The context of a model's forward passes outside of training: no dropout, no gradients, and shapes that change
    from call to call. The model is left in the mode it was in."""
    backends = attention_backends(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if backends is None else sdpa_kernel(backends):
            yield
    finally:
        model.train(training)
