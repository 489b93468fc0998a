"""The gradient noise scale: up to how many tokens in a step more of them pay.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), section 2.2 and appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.windows import Windows
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.system.files import json_object

DECAY = 0.9
"""A measurement's weight in the average, as a share of the next one's: the last ten or so count."""


class Measured(NamedTuple):
    """Unbiased estimates, of which the first can come out negative: |G|^2, the squared norm of the true gradient, and
    S, the trace of the covariance of one token's gradient."""

    squared_norm: float
    variance: float


def unbiased(small: float, big: float, *, small_tokens: int, big_tokens: int) -> Measured:
    """From the squared norms of gradients of two sizes of batch: appendix A.1 of the paper."""
    return Measured(
        squared_norm=(big_tokens * big - small_tokens * small) / (big_tokens - small_tokens),
        variance=(small - big) / (1 / small_tokens - 1 / big_tokens),
    )


def noise_scale(measured: Iterable[Measured]) -> float:
    """B_simple = S / |G|^2 in tokens, each averaged over the measurements, the newest last; those that are not finite
    are left out. NaN where no gradient stands out of the noise."""
    squared_norm = variance = 0.0
    for parts in measured:
        if all(map(math.isfinite, parts)):
            squared_norm = DECAY * squared_norm + parts.squared_norm
            variance = DECAY * variance + parts.variance
    return variance / squared_norm if squared_norm > 0 else math.nan


def measured_before(metrics: Path) -> list[Measured]:
    """The measurements in a run's metrics.jsonl, which a resume cuts to its step: the average has no other state."""
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError:  # no reason to end a run
        return []
    found = []
    for line in lines:
        try:
            event = json_object(line) if NoiseScale.name.encode() in line else {}
            found.append(Measured(*(float(event[name]) for name in Measured._fields)))
        except (ValueError, KeyError, TypeError):  # another event, a value that is null, a line that is damaged
            continue
    return found


def squared_norms(
    model: GPT, tokens: Tensor, context: DistContext, autocast: AbstractContextManager[object], *, sequences: int
) -> tuple[float, float]:
    """Of the gradients of single sequences, in the mean, and of the mean gradient, over the `sequences` of all ranks.

    `tokens` (n, sequence_length + 1) int64 are this rank's. Dropout is off. The model is not touched: another one that
    shares its weights has gradients of its own. While that lives, memory holds what a training step of one sequence
    does and, where training keeps its gradients between steps, those besides (4 bytes a parameter). The backward passes
    are of the loss's sum over tokens: gradients of its mean come close to the smallest numbers of float16.
    """
    twin = GPT(model.config, device="meta").eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.activation_checkpointing = model.activation_checkpointing
    squares: list[Tensor] = []

    def note(gradient: Tensor) -> None:  # by rows: the sum of millions of squares is inexact in float32 on a CPU
        squares.append(torch.linalg.vector_norm(gradient, dim=-1).square().sum())

    for parameter in twin.parameters():
        parameter.register_hook(note)  # type: ignore[no-untyped-call]
    small, length = torch.zeros((), dtype=torch.float64), tokens.shape[1] - 1
    for sequence in torch.split(tokens.to(context.device), 1):
        context.note_progress()
        with autocast:
            loss = twin(sequence[:, :-1], sequence[:, 1:])
        (loss * length).backward()
        small += torch.stack(squares).cpu().double().sum()
        squares.clear()
    for parameter in twin.parameters():
        assert parameter.grad is not None
        note(context.sum(parameter.grad))
    big = float(torch.stack(squares).cpu().double().sum())
    return float(context.sum(small)) / length**2 / sequences, big / (length * sequences) ** 2


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """The gradient noise scale during training.

    The small batch is one sequence and the large one a step, so that the same is measured on any number of ranks with
    any micro-batch, and at the least memory. They are those that the order of the data gives the next step: to the
    ones before, the weights are fitted. `metrics` is the run's metrics.jsonl on rank 0's disk; `guard` knows the data
    that the run has passed over.
    """

    name: ClassVar[str] = "noise_scale"
    every: int
    windows: Windows
    plan: BatchPlan
    seed: int
    metrics: Path
    guard: SpikeGuard | None = None

    def run(
        self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int
    ) -> Findings | None:
        sequences, length = self.plan.sequences_per_step, self.plan.sequence_length
        passed_over = self.guard.passed_over if self.guard else 0
        windows = self.windows.of_step(step + passed_over + 1, count=sequences, seed=self.seed)
        tokens = self.windows.read(windows[self.plan.rank_sequences(context.rank)])
        small, big = squared_norms(model, tokens, context, autocast, sequences=sequences)
        if not context.is_main:
            return None
        measured = unbiased(small, big, small_tokens=length, big_tokens=sequences * length)
        all_measured = [*measured_before(self.metrics), measured]
        tokens_simple = noise_scale(all_measured)
        unknown = math.isnan(tokens_simple)
        told = f"unknown after {len(all_measured)} measurements" if unknown else f"{tokens_simple:,.0f} tokens"
        line = f"step {step} | gradient noise scale: {told}; a step has {sequences * length:,}"
        return Findings(line=line, values={"tokens": tokens_simple, **measured._asdict()})
