"""Which of some endings of a text a model finds likeliest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.inference import evaluating
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.system.errors import UserError

PADDING = -1
BATCH_TOKENS = 4096
"""Tokens read at once, padding included."""
HEAD_POSITIONS = 1024
"""How many positions' logits exist at once: 1024 x 50304 in float32 are 0.2 GB."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """An example as a model reads it: token ids, and what each ending's log-likelihood is divided by for acc_norm."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Fractions of `examples`, of which `cut` were too long and read without their beginning.

    `acc` goes by the likelihood of an ending, `acc_norm` by its mean over what `Question.lengths` counts. The standard
    errors are those of a mean of zeros and ones.
    """

    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    examples: int
    cut: int
    examples_per_sec: float


def accuracies(
    model: GPT,
    questions: Sequence[Question],
    context: DistContext,
    *,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    progress: str = "",
) -> Accuracies:
    """How often the likeliest ending is the true one; arguments as `score`.

    Raises:
        UserError: where there are no questions.
    """
    if not questions:
        raise UserError("no examples to score")
    start = time.perf_counter()
    length = sequence_length or model.config.block_size
    scores = score(model, questions, context, sequence_length=length, autocast=autocast, progress=progress)
    n, labels = len(questions), torch.tensor([question.label for question in questions])
    acc, acc_norm = (int((chosen == labels).sum()) / n for chosen in predictions(questions, scores))
    return Accuracies(
        acc=acc,
        acc_norm=acc_norm,
        acc_stderr=math.sqrt(acc * (1 - acc) / max(1, n - 1)),
        acc_norm_stderr=math.sqrt(acc_norm * (1 - acc_norm) / max(1, n - 1)),
        examples=n,
        cut=sum(len(each.context) + max(map(len, each.endings)) > length + 1 for each in questions),
        examples_per_sec=n / (time.perf_counter() - start),
    )


def score(
    model: GPT,
    questions: Sequence[Question],
    context: DistContext,
    *,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: str = "",
) -> Tensor:
    """The log-likelihood in nats of every ending of every question, (questions, endings) float64 on the CPU.

    All questions have as many endings. What is longer than `sequence_length`, `block_size` if not given, loses tokens
    on the left. The ranks share the batches, which do not depend on how many ranks there are, and all get the whole
    answer. `progress` is the name of a progress bar, "" for none.
    """
    endings = len(questions[0].endings)
    batches = list(_batches(_trees(questions, sequence_length or model.config.block_size), batch_tokens))
    scores = torch.zeros(len(questions) * endings, dtype=torch.float64)
    with evaluating(model), autocast or nullcontext():
        mine = batches[context.rank :: context.world_size]
        for batch in tqdm(mine, desc=progress, unit="batch", disable=not (progress and context.is_main)):
            context.note_progress()
            _score_batch(model, batch, scores)
    return context.sum(scores).view(-1, endings)


def predictions(questions: Sequence[Question], scores: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen endings (questions,) int64 by `acc` and by `acc_norm`, of the scores (questions, endings)."""
    lengths = torch.tensor([question.lengths for question in questions], dtype=torch.float64)
    return scores.argmax(1), (scores / lengths).argmax(1)


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A context with the endings that follow it; `slots` are where their scores go."""

    context: list[int]
    endings: list[list[int]]
    slots: list[int]

    @property
    def length(self) -> int:
        """Tokens that are read: the last of an ending predicts nothing that is scored."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def _trees(questions: Sequence[Question], sequence_length: int) -> list[_Tree]:
    """The questions with what does not fit in `sequence_length` cut off on the left, the longest first."""
    trees = []
    for index, question in enumerate(questions):
        slots = list(range(index * len(question.endings), (index + 1) * len(question.endings)))
        if len(question.context) + max(map(len, question.endings)) <= sequence_length + 1:
            trees.append(_Tree(context=question.context, endings=question.endings, slots=slots))
            continue
        for slot, ending in zip(slots, question.endings, strict=True):  # each is cut at a place of its own
            tokens = (question.context + ending)[-(sequence_length + 1) :]
            split = max(1, len(tokens) - len(ending))
            trees.append(_Tree(context=tokens[:split], endings=[tokens[split:]], slots=[slot]))
    return sorted(trees, key=lambda tree: -tree.length)


def _batches(trees: Sequence[_Tree], batch_tokens: int) -> Iterator[list[_Tree]]:
    """Neighbours of `trees`, as many as fit in `batch_tokens` with the padding to the first one's length."""
    start = 0
    while start < len(trees):
        count = max(1, batch_tokens // trees[start].length)
        yield list(trees[start : start + count])
        start += count


def _score_batch(model: GPT, batch: Sequence[_Tree], scores: Tensor) -> None:
    """Add to `scores` (float64, CPU) at each tree's slots the log-likelihoods of its endings.

    A tree is one row: the context once, then the endings, each of which sees the context and itself.
    """
    width = batch[0].length
    rows: list[tuple[list[int], list[int], list[int]]] = []
    scored: list[tuple[int, int, int]] = []  # the place that is read, the token that should follow, its slot
    for row, tree in enumerate(batch):
        n = len(tree.context)
        tokens, positions, parts = list(tree.context), list(range(n)), [0] * n
        for part, (ending, slot) in enumerate(zip(tree.endings, tree.slots, strict=True), start=1):
            first, more = row * width + len(tokens), len(ending) - 1
            scored += zip((row * width + n - 1, *range(first, first + more)), ending, [slot] * (more + 1), strict=True)
            tokens += ending[:-1]
            positions += range(n, n + more)
            parts += [part] * more
        padding = width - len(tokens)
        rows.append((tokens + [0] * padding, positions + [0] * padding, parts + [PADDING] * padding))
    device = model.wte.weight.device
    ids, places, part_of = torch.tensor(rows, device=device).unbind(1)  # each (B, T)
    seen = ((part_of[:, None, :] == 0) | (part_of[:, None, :] == part_of[:, :, None])).tril()
    features = model.features(ids, positions=places, mask=seen[:, None]).flatten(0, 1)
    read, answers, slots = torch.tensor(scored, device=device).unbind(1)
    losses = [
        F.cross_entropy(model.logits(features[at]).float(), answer, reduction="none")
        for at, answer in zip(torch.split(read, HEAD_POSITIONS), torch.split(answers, HEAD_POSITIONS), strict=True)
    ]
    scores.index_add_(0, slots.cpu(), -torch.cat(losses).cpu().double())  # Apple's GPUs have no float64
