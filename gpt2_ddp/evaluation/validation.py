"""Validation loss over a fixed set of tokens, in nats a token and in bits a byte, the same for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2_ddp.data.loader import ValidationData
from gpt2_ddp.data.sources import DataDir
from gpt2_ddp.data.tokenizer import token_bytes, tokenizer_of_data
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.inference import evaluating
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.evaluation.reference import OnTrack
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.head import head_loss
from gpt2_ddp.system.errors import UserError

ByteCounts = npt.NDArray[np.int32]
"""How many bytes of text each token id stands for, (vocab_size,); 0 for special tokens."""


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """What a model loses on text that it was not trained on.

    `val_loss` is the mean over all predicted tokens, in nats a token. `bits_per_byte` is the sum of their losses, in
    bits (nats / ln 2), over the bytes of text that they decode to. A special token counts as nothing: its loss is left
    out, and it has no bytes. So the number does not depend on how a tokenizer cuts the text, and over the same text
    models with other vocabularies can be compared by it. None where the bytes are not known, or there are none.
    """

    val_loss: float
    bits_per_byte: float | None


def validation_loss(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: DistContext,
    autocast: AbstractContextManager[object],
    byte_counts: ByteCounts | None = None,
) -> ValidationLoss:
    """The loss of the batches of all ranks, each an (inputs, targets) pair of shape (B, T) on the CPU.

    Changes nothing: the model is left in the mode it was in, and no random number is drawn.
    """
    return loss_of([validation_sums(model, batches, context, autocast, byte_counts)])


def validation_sums(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: DistContext,
    autocast: AbstractContextManager[object],
    byte_counts: ByteCounts | None = None,
) -> Tensor:
    """What `loss_of` takes, (4,) float64: the loss and the tokens that it is of, both of all ranks, and of these the
    loss of special tokens and the bytes of the others.
    """
    everything = torch.zeros(2, dtype=torch.float64)  # the loss, and the tokens that it is of
    special = torch.zeros(2, dtype=torch.float64)  # the loss of tokens that are no text, and the bytes of the others
    counts = None if byte_counts is None else torch.from_numpy(byte_counts)
    with evaluating(model), autocast:
        for ids, targets in batches:
            context.note_progress()
            features = model.features(ids.to(context.device)).flatten(0, 1)
            answers = targets.to(context.device).flatten()
            loss = head_loss(features, model.wte.weight, answers)
            everything += torch.tensor([float(loss) * targets.numel(), targets.numel()], dtype=torch.float64)
            if counts is not None:
                lengths = counts[targets.flatten()]
                places = (lengths == 0).nonzero().flatten().to(context.device)
                left_out = head_loss(features[places], model.wte.weight, answers[places]) if len(places) else 0.0
                special += torch.tensor([float(left_out) * len(places), int(lengths.sum())], dtype=torch.float64)
    return torch.cat([context.sum(everything), context.sum(special)])  # a larger sum may be added in another order


def loss_of(sums: Iterable[Tensor]) -> ValidationLoss:
    """The loss over all tokens of several `validation_sums`."""
    loss_sum, tokens, special_sum, text_bytes = torch.stack(list(sums)).sum(0).tolist()
    bits = (loss_sum - special_sum) / math.log(2)
    return ValidationLoss(val_loss=loss_sum / tokens, bits_per_byte=bits / text_bytes if text_bytes else None)


def loss_by_source(
    model: GPT,
    parts: Mapping[str, ValidationData],
    context: DistContext,
    autocast: AbstractContextManager[object],
    byte_counts: ByteCounts | None,
) -> tuple[ValidationLoss, dict[str, ValidationLoss]]:
    """The loss over the validation data of all sources together, and by their names over that of each."""
    sums = {
        name: validation_sums(
            model, data.batches(rank=context.rank, world_size=context.world_size), context, autocast, byte_counts
        )
        for name, data in parts.items()
    }
    return loss_of(sums.values()), {name: loss_of([own]) for name, own in sums.items()}


def event_values(
    found: ValidationLoss, parts: Mapping[str, ValidationData], by_source: Mapping[str, ValidationLoss]
) -> dict[str, object]:
    """What was found as an event has it; the losses of single sources where there are several."""
    values = asdict(found) | {"tokens": sum(data.tokens for data in parts.values())}
    each = [{"data_dir": name} | asdict(by_source[name]) | {"tokens": data.tokens} for name, data in parts.items()]
    return values | ({"sources": each} if len(each) > 1 else {})


def find_byte_counts(data_dir: DataDir, vocab_size: int) -> tuple[ByteCounts | None, list[str]]:
    """The `ByteCounts` of the tokens in the data, by their tokenizer; or None, and one line that says why."""
    try:
        return token_bytes(tokenizer_of_data(data_dir), vocab_size), []
    except UserError as error:
        return None, [f"no bits per byte: {error}"]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation loss during training; of a mixture that of all its sources together, and of each.

    `parts` are the validation data of the sources, by their names.
    """

    name: ClassVar[str] = "val"
    every: int
    parts: Mapping[str, ValidationData]
    byte_counts: ByteCounts | None
    track: OnTrack

    def run(self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int) -> Findings:
        found, by_source = loss_by_source(model, self.parts, context, autocast, self.byte_counts)
        values = event_values(found, self.parts, by_source)
        bits = "" if found.bits_per_byte is None else f" ({found.bits_per_byte:.4f} bits per byte)"
        beside = self.track.beside(step, found.val_loss)
        of_each = "".join(f" | {name}: {own.val_loss:.6f}" for name, own in by_source.items() if len(by_source) > 1)
        line = f"step {step} | val loss: {found.val_loss:.6f}{bits} over {values['tokens']} tokens{of_each}{beside}"
        return Findings(line=line, values=values)
