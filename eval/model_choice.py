"""The flags that every command with a model has, and the model that they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.run_state import died
from gpt2_ddp.allocator import keep_freed_memory
from gpt2_ddp.cli import tell
from gpt2_ddp.distributed import DistContext, open_context
from gpt2_ddp.model import GPT
from gpt2_ddp.precision import Precision, allow_tf32, choose_dtype, found_hardware
from gpt2_ddp.pretrained import find_model, load_model


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """A model, and where and how precisely to compute with it."""

    model: str
    """A run, a checkpoint, a Hugging Face directory, or a published name: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of matmuls; auto takes bfloat16 where the hardware has it, float16 on older tensor cores."""
    json: Path | None = None
    """Also write the numbers to this file."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A loaded model on its device."""

    gpt: GPT
    path: Path
    context: DistContext
    precision: Precision

    def say(self, text: str) -> None:
        """Print on the first rank."""
        if self.context.is_main:
            print(text, flush=True)

    def write_json(self, path: Path | None, numbers: Mapping[str, object]) -> None:
        """Write on the first rank, if there is a path."""
        if self.context.is_main and path:
            path.write_text(json.dumps(numbers, indent=2) + "\n")


@contextmanager
def open_model(choice: ModelChoice) -> Iterator[OpenModel]:
    """The chosen model on every rank.

    Raises:
        ValueError: on every rank, where any of them cannot load it.
    """
    with open_context(choice.device) as context:
        if context.device.type == "cpu":
            keep_freed_memory()
        path = context.together(lambda: find_model(choice.model))
        gpt = context.together(lambda: load_model(path))
        allow_tf32()
        dtype, warning = choose_dtype(choice.dtype, found_hardware(context.device))
        precision = Precision.of(dtype, context.device)
        opened = OpenModel(gpt=gpt.to(context.device), path=path, context=context, precision=precision)
        if context.is_main and (line := died(Path(choice.model))):
            tell(f"warning: {line}")
        if warning:
            opened.say(f"warning: {warning}")
        yield opened
