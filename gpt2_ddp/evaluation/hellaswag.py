"""HellaSwag (Zellers et al. 2019, "Can a Machine Really Finish Your Sentence?"): which of four endings is likeliest.

Two protocols are published under this one name, and their numbers differ; `PROTOCOLS` says how.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tiktoken import Encoding
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.vocabulary import EOT
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object
from gpt2_ddp.system.precision import evaluating

PROTOCOLS = ("completion", "harness")
"""completion: build-nanogpt's and llm.c's, the context as it is, and `acc_norm` by the mean over an ending's tokens.
harness: the EleutherAI lm-evaluation-harness's, the activity before the context, WikiHow's brackets cleaned away, and
`acc_norm` by an ending's length in characters. `acc` goes by the sum over its tokens in both."""

ENDINGS = 4
MAX_LINE_BYTES = 1 << 16  # the longest line of the validation set has about 2,000
PADDING = -1
BATCH_TOKENS = 4096
"""Tokens read at once, padding included."""
HEAD_POSITIONS = 1024
"""How many positions' logits exist at once: 1024 x 50304 in float32 are 0.2 GB."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A line of the data set. `ctx` is `ctx_a` and `ctx_b` joined; `label` is the index of the true ending."""

    activity_label: str
    ctx: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """An example as a model reads it: token ids, and what each ending's log-likelihood is divided by for acc_norm."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class HellaSwagResult:
    """Accuracies are fractions of `examples`, of which `cut` were too long and read without their beginning; the
    standard errors are those of a mean of zeros and ones."""

    protocol: str
    acc: float
    acc_norm: float
    acc_stderr: float
    acc_norm_stderr: float
    examples: int
    cut: int
    examples_per_sec: float


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a JSON Lines file, all of them by default.

    Raises:
        UserError: naming the file and the line, and what is wrong with it; or for a file without examples.
    """
    fetch = "python -m data_prep hellaswag fetches the validation set"
    if not path.is_file():
        raise UserError(f"no HellaSwag examples at {path}: {fetch}")
    examples: list[Example] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if limit is not None and len(examples) >= limit:
                break
            try:
                if line.strip():
                    examples.append(_example(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise UserError(f"{path} has no examples: {fetch}")
    return examples


def _example(line: bytes) -> Example:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"longer than {MAX_LINE_BYTES} bytes, which no HellaSwag example is")
    value = json_object(line)
    texts: dict[str, Any] = {key: value.get(key) for key in ("activity_label", "ctx", "ctx_a", "ctx_b")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{key!r} is {'not a text' if key in value else 'missing'}")
    endings, label = value.get("endings"), value.get("label")
    if not isinstance(endings, list) or len(endings) != ENDINGS or not all(isinstance(end, str) for end in endings):
        raise UserError(f"'endings' is not a list of {ENDINGS} texts")
    if not isinstance(label, int | str) or str(label) not in ("0", "1", "2", "3"):  # the hub's copy has texts
        raise UserError(f"'label' is {str(label)[:40]!r}, and must be a whole number from 0 to {ENDINGS - 1}")
    return Example(endings=tuple(endings), label=int(label), **texts)


def render(example: Example, protocol: str, encoding: Encoding) -> Question:
    """The example as token ids, by `protocol`.

    Raises:
        UserError: for an unknown protocol.
    """
    if protocol == "completion":
        context = encoding.encode_ordinary(example.ctx)
        endings = [encoding.encode_ordinary(f" {ending}") for ending in example.endings]
        lengths = [len(ending) for ending in endings]
    elif protocol == "harness":
        text = _clean(f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}")
        choices = [_clean(ending) for ending in example.endings]
        # The harness lets blanks at the context's end go to the ending, and splits the tokens of both together.
        context = encoding.encode_ordinary(text.rstrip())
        endings = [encoding.encode_ordinary(f"{text} {choice}")[len(context) :] for choice in choices]
        lengths = [len(choice) for choice in choices]
    else:
        raise UserError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    return Question(context=context or [EOT], endings=endings, lengths=lengths, label=example.label)


def _clean(text: str) -> str:
    """`text` without the marks of WikiHow articles, as the harness's task takes them out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def score(
    model: GPT,
    questions: Sequence[Question],
    context: DistContext,
    *,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> Tensor:
    """The log-likelihood in nats of every ending of every question, (questions, 4) float64 on the CPU.

    What is longer than `sequence_length`, `block_size` if not given, loses tokens on the left. The ranks share the
    batches, which do not depend on how many ranks there are, and all get the whole answer.
    """
    batches = list(_batches(_trees(questions, sequence_length or model.config.block_size), batch_tokens))
    scores = torch.zeros(len(questions) * ENDINGS, dtype=torch.float64)
    with evaluating(model), autocast or nullcontext():
        mine = batches[context.rank :: context.world_size]
        for batch in tqdm(mine, desc="HellaSwag", unit="batch", disable=not (progress and context.is_main)):
            context.note_progress()
            _score_batch(model, batch, scores)
    return context.sum(scores).view(-1, ENDINGS)


def evaluate(
    model: GPT,
    examples: Sequence[Example],
    *,
    protocol: str,
    context: DistContext,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    progress: bool = False,
) -> HellaSwagResult:
    """HellaSwag by `protocol`, the same for any number of ranks; draws no random number.

    `sequence_length` is that of the training sequences: positions past it mean nothing to the model.

    Raises:
        UserError: for an unknown protocol, or without examples.
    """
    if not examples:
        raise UserError("no HellaSwag examples")
    start = time.perf_counter()
    encoding = load_tokenizer()
    questions = [render(example, protocol, encoding) for example in examples]
    length = sequence_length or model.config.block_size
    scores = score(model, questions, context, sequence_length=length, autocast=autocast, progress=progress)
    n, labels = len(questions), torch.tensor([question.label for question in questions])
    acc, acc_norm = (int((chosen == labels).sum()) / n for chosen in predictions(questions, scores))
    return HellaSwagResult(
        protocol=protocol,
        acc=acc,
        acc_norm=acc_norm,
        acc_stderr=math.sqrt(acc * (1 - acc) / max(1, n - 1)),
        acc_norm_stderr=math.sqrt(acc_norm * (1 - acc_norm) / max(1, n - 1)),
        examples=n,
        cut=sum(len(each.context) + max(map(len, each.endings)) > length + 1 for each in questions),
        examples_per_sec=n / (time.perf_counter() - start),
    )


@dataclass(frozen=True, kw_only=True)
class HellaSwag:
    """HellaSwag during training."""

    name: ClassVar[str] = "hellaswag"
    every: int
    examples: Sequence[Example]
    protocol: str
    sequence_length: int

    def run(self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int) -> Findings:
        found = evaluate(
            model,
            self.examples,
            protocol=self.protocol,
            context=context,
            sequence_length=self.sequence_length,
            autocast=autocast,
        )
        cut = f", {found.cut} of {found.examples} examples cut on the left" if found.cut else ""
        values = {name: getattr(found, name) for name in ("protocol", "acc", "acc_norm", "examples")}
        line = f"step {step} | HellaSwag acc: {found.acc:.4f} acc_norm: {found.acc_norm:.4f}{cut}"
        return Findings(line=line, values=values)


def predictions(questions: Sequence[Question], scores: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen endings (questions,) int64 by `acc` and by `acc_norm`, of the scores (questions, 4)."""
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
        slots = list(range(index * ENDINGS, (index + 1) * ENDINGS))
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
    scores.index_add_(0, slots.cpu(), -torch.cat(losses).double().cpu())
