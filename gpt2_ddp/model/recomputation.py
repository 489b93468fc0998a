"""What the backward pass of a block is not given, since it computes it again.

Kept are the inputs of its norms, q, k, v, what attention gives, and GELU's input. What its norms and GELU give would be
half as much again, and is cheap to compute: `run_block` leaves it out in eager mode, and the compiler does so where
`Recomputed` marks it.

PyTorch's own policies (`create_selective_checkpoint_contexts`, saving what matmuls and attention give) keep the same
where they are compiled, but in eager mode 6 layers of n_embd 384 took 1.15 s of CPU time a step and 166.0 MiB at the
peak instead of 1.07 s and 154.1 MiB (`python -m drivers.selective` in tests, on one core of an AMD EPYC with AVX2):
every operation passes through Python, and a block's last matmul is saved, which nothing reads. Attention in blocks
would have to be an operator into which no compiler sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpt2_ddp.system.errors import UserError


class Recomputed(nn.Module):
    """A layer whose output is not kept for the backward pass of a block, but computed again from its input.

    It draws no random number. Before another class of layer among the bases it takes that one's place.
    """

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            y: Tensor = checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=False)
            return y
        return self.compute(x)


def run_block(block: nn.Module, x: Tensor, *more: Any, again: bool = False, random: bool = False) -> Tensor:
    """block(x, *more), (B, T, n_embd) -> the same, which keeps for its backward pass what the module's docstring says.

    With `again` it keeps `x` alone, and all is computed again up to the input of the last matmul (Chen et al. 2016,
    arXiv:1604.06174), with the same random numbers where `random` says that some are drawn.

    Raises:
        UserError: for random numbers on Apple's GPUs, of which PyTorch would draw others (its issue 127676).
    """
    if again and torch.is_grad_enabled():
        if random and x.device.type == "mps":
            raise UserError("--activation-checkpointing with --dropout is not right on Apple's GPUs: leave one out")
        y: Tensor = checkpoint(block, x, *more, use_reentrant=False, preserve_rng_state=random)
        return y
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return block(x, *more)
    with _outputs_left_out([layer for layer in block.modules() if isinstance(layer, Recomputed)]):
        return block(x, *more)


@contextmanager
def _outputs_left_out(layers: list[Recomputed]) -> Iterator[None]:
    """Within it autograd keeps, in place of an output of `layers`, how to compute it again."""
    outputs: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}

    def note(layer: Recomputed, inputs: tuple[Tensor], output: Tensor) -> None:
        x, dtype = inputs[0].detach(), output.dtype  # the backward pass is outside of autocast
        outputs[output.untyped_storage()._cdata] = output, lambda: layer.compute(x).to(dtype)

    def pack(kept: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
        output, compute = outputs.get(kept.untyped_storage()._cdata, (None, None))
        whole = output is not None and output.numel() == kept.numel()
        return (compute, kept.shape) if compute and whole else kept  # a linear layer sees it as a matrix

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with saved_tensors_hooks(pack, _unpacked):
            yield
    finally:
        outputs.clear()  # autograd keeps `pack`
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _unpacked(kept: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    compute, shape = kept
    return compute().view(shape)
