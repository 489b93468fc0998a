"""HellaSwag (Zellers et al. 2019, "Can a Machine Really Finish Your Sentence?"): which of four endings is likeliest.

Two protocols are published under this one name, and their numbers differ; `PROTOCOLS` says how.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gpt2_ddp.data.tokenizer import Tokenizer, load_tokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.interface import Findings
from gpt2_ddp.evaluation.multiple_choice import Accuracies, Question, accuracies
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object

PROTOCOLS = ("completion", "harness")
"""completion: build-nanogpt's and llm.c's, the context as it is, and `acc_norm` by the mean over an ending's tokens.
harness: the EleutherAI lm-evaluation-harness's, the activity before the context, WikiHow's brackets cleaned away, and
`acc_norm` by an ending's length in characters. `acc` goes by the sum over its tokens in both."""

ENDINGS = 4
MAX_LINE_BYTES = 1 << 16  # the longest line of the validation set has about 2,000


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
class HellaSwagResult(Accuracies):
    """By `protocol`, one of `PROTOCOLS`."""

    protocol: str


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


def render(example: Example, protocol: str, encoding: Tokenizer) -> Question:
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
    return Question(context=context or [encoding.eot_token], endings=endings, lengths=lengths, label=example.label)


def _clean(text: str) -> str:
    """`text` without the marks of WikiHow articles, as the harness's task takes them out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def evaluate(
    model: GPT,
    examples: Sequence[Example],
    *,
    protocol: str,
    tokenizer: Tokenizer | None = None,
    context: DistContext,
    sequence_length: int | None = None,
    autocast: AbstractContextManager[object] | None = None,
    progress: bool = False,
) -> HellaSwagResult:
    """HellaSwag by `protocol`, the same for any number of ranks; draws no random number.

    `tokenizer` is the model's, GPT-2's if not given. `sequence_length` is that of the training sequences: positions
    past it mean nothing to the model.

    Raises:
        UserError: for an unknown protocol, or without examples.
    """
    if not examples:
        raise UserError("no HellaSwag examples")
    encoding = tokenizer or load_tokenizer()
    questions = [render(example, protocol, encoding) for example in examples]
    found = accuracies(
        model,
        questions,
        context,
        sequence_length=sequence_length,
        autocast=autocast,
        progress="HellaSwag" if progress else "",
    )
    return HellaSwagResult(protocol=protocol, **vars(found))


@dataclass(frozen=True, kw_only=True)
class HellaSwag:
    """HellaSwag during training."""

    name: ClassVar[str] = "hellaswag"
    every: int
    examples: Sequence[Example]
    protocol: str
    sequence_length: int
    tokenizer: Tokenizer

    def run(self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int) -> Findings:
        found = evaluate(
            model,
            self.examples,
            protocol=self.protocol,
            tokenizer=self.tokenizer,
            context=context,
            sequence_length=self.sequence_length,
            autocast=autocast,
        )
        cut = f", {found.cut} of {found.examples} examples cut on the left" if found.cut else ""
        values = {name: getattr(found, name) for name in ("protocol", "acc", "acc_norm", "examples")}
        line = f"step {step} | HellaSwag acc: {found.acc:.4f} acc_norm: {found.acc_norm:.4f}{cut}"
        return Findings(line=line, values=values)
