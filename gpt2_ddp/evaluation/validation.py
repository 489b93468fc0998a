"""Validation loss over a fixed set of tokens, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.inference import evaluating
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.model.gpt import GPT


def validation_loss(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: DistContext,
    autocast: AbstractContextManager[object],
) -> float:
    """The mean loss in nats of the batches of all ranks, each an (inputs, targets) pair of shape (B, T).

    Changes nothing: the model is left in the mode it was in, and no random number is drawn.
    """
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    with evaluating(model), autocast:
        for ids, targets in batches:
            context.note_progress()
            loss = model(ids.to(context.device), targets.to(context.device))
            total += torch.tensor([float(loss) * targets.numel(), targets.numel()], dtype=torch.float64)
    loss_sum, tokens = context.sum(total).tolist()
    return float(loss_sum / tokens)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation loss during training."""

    name: ClassVar[str] = "val"
    every: int
    data: ValidationData

    def run(self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int) -> Findings:
        batches = self.data.batches(rank=context.rank, world_size=context.world_size)
        loss = validation_loss(model, batches, context, autocast)
        tokens = self.data.tokens
        line = f"step {step} | val loss: {loss:.6f} over {tokens} tokens"
        return Findings(line=line, values={"val_loss": loss, "tokens": tokens})
