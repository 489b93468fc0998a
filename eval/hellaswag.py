"""`python -m eval hellaswag`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from eval.model_choice import ModelChoice, open_model
from eval.published import published_for
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.tokenizer import tokenizer_of_model
from gpt2_ddp.evaluation.hellaswag import HellaSwagResult, evaluate, read_examples
from gpt2_ddp.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HellaSwag(ModelChoice):
    """HellaSwag accuracy, beside the published numbers. Under torchrun the ranks share the examples."""

    data: Path = TrainConfig.hellaswag_data
    """The examples as JSON Lines; `python -m data_prep hellaswag` writes them."""
    limit: int | None = None
    """Only the first so many examples; published numbers are of all 10,042."""
    protocol: Literal["completion", "harness"] = "completion"
    """completion is what build-nanogpt and llm.c report, harness what the EleutherAI lm-evaluation-harness does."""

    def run(self) -> None:
        """Print the table, and write the JSON if asked to."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: give 1 or more")
        examples = read_examples(self.data, self.limit)
        with open_model(self) as opened:
            result = evaluate(
                opened.gpt,
                examples,
                protocol=self.protocol,
                tokenizer=tokenizer_of_model(opened.path),
                context=opened.context,
                sequence_length=opened.sequence_length,
                autocast=opened.precision.autocast(),
                progress=True,
            )
            opened.say(table(str(opened.path), result))
            if result.cut:
                opened.warn(
                    f"{result.cut} of {result.examples} examples are longer than {opened.sequence_length} tokens, and "
                    "were read without their beginning; of an answer that is longer itself its end alone is scored"
                )
            numbers = {"protocol": result.protocol} | asdict(result)
            opened.write_json(self.json, {key: value for key, value in numbers.items() if key != "cut"})


def table(name: str, result: HellaSwagResult) -> str:
    """The result as the first row of a table, over the published ones that it compares with."""
    acc = f"{result.acc:.4f} ± {result.acc_stderr:.4f}"
    acc_norm = f"{result.acc_norm:.4f} ± {result.acc_norm_stderr:.4f}"
    speed = f"{result.examples} examples, {result.examples_per_sec:.1f}/s"
    rows = [("", "acc", "acc_norm", ""), (name, acc, acc_norm, speed)]
    for number in published_for(result.protocol):
        acc = "" if number.acc is None else f"{number.acc:.4f}"
        rows.append((number.model, acc, f"{number.acc_norm:.4f}", number.source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"HellaSwag, {result.protocol} protocol", *lines])
