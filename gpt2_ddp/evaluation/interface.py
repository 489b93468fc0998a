"""What an evaluation of a running training is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation found: what the console says of it, and the values of its event in metrics.jsonl.

    That also tells the `seconds` that the evaluation took.
    """

    line: str
    values: Mapping[str, object]


class Evaluation(Protocol):
    """Something asked of the model every so many steps, and after the last."""

    @property
    def name(self) -> str:
        """Of its event in metrics.jsonl."""

    @property
    def every(self) -> int:
        """Steps between two."""

    def run(
        self, model: GPT, context: DistContext, autocast: AbstractContextManager[object], *, step: int
    ) -> Findings | None:
        """Ask the raw `model` after `step`; collective. Rank 0 is told what was found, the others may be.

        Changes nothing that training goes on with: no weight, no mode, no random number of the process.
        """
