"""The training step compiled: each block by itself, and the loss of a chunk of the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.head import chunk_loss_and_gradient, head_loss
from gpt2_ddp.model.recomputation import run_block
from gpt2_ddp.system.precision import matmul_dtype


class CompiledGPT(nn.Module):
    """A `GPT` as it is trained, its blocks compiled one by one; evaluation, sampling and checkpoints have the raw one.

    All blocks are of one shape, so that one compilation serves them all. Compiled as a whole, the model would take as
    many times longer to compile, its backward pass would hand over all gradients at once, a second set of them beside
    the sum, and DDP could not reduce any before the last was there.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        torch._dynamo.config.optimize_ddp = False  # it cuts graphs where DDP's buckets end; a block is small enough
        # Static shapes: the compiler would answer the head's shorter last chunk by kernels for any number of rows.
        self._run_block = torch.compile(run_block, dynamic=False)
        self._loss_and_gradient = torch.compile(chunk_loss_and_gradient, dynamic=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats of ids and targets (B, T), a float32 scalar."""
        features = self.model.features(ids, run=self._run_block).flatten(0, 1)
        # In float32 on a CPU the operations one by one are faster, since they turn the logits into their gradient.
        in_place = features.device.type == "cpu" and matmul_dtype(features) == torch.float32
        chosen = chunk_loss_and_gradient if in_place else self._loss_and_gradient
        return head_loss(features, self.model.wte.weight, targets.flatten(), loss_and_gradient=chosen)
