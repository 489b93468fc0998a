"""The flags that every command with a model has, and the model that they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.run_state import died
from gpt2_ddp.checkpoint.choice import require_whole_weights
from gpt2_ddp.distributed.context import DistContext, open_context
from gpt2_ddp.metrics.log import warn
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import find_model, load_model
from gpt2_ddp.system.allocator import keep_freed_memory
from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json, replace_file, require_writable
from gpt2_ddp.system.hardware import found_hardware
from gpt2_ddp.system.precision import Precision, allow_tf32, choose_dtype
from gpt2_ddp.system.speed import measure_speed

TRAINED_LENGTH = "trained_sequence_length"
"""The field of a converted model's config.json; other programs leave it alone."""


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how precisely to compute with a model."""

    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of matmuls; auto takes what the GPU has, and on a CPU the one of float32 and bfloat16 that is
    measured to be faster."""
    sequence_length: int | None = None
    """Tokens that the model reads at once; by default as many as its run was trained with, or else as it can take."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def __post_init__(self) -> None:
        if self.sequence_length is not None and self.sequence_length < 1:
            raise UserError(f"--sequence-length {self.sequence_length}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Computing):
    """A model, and where and how precisely to compute with it."""

    model: str
    """A run, a checkpoint, a Hugging Face directory, or a published name: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    distilgpt2."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A loaded model on its device, and how many tokens it is to read at once."""

    gpt: GPT
    path: Path
    sequence_length: int
    context: DistContext
    precision: Precision

    def say(self, text: str) -> None:
        """Print on the first rank."""
        if self.context.is_main:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A warning from the first rank."""
        if self.context.is_main:
            warn(text)

    def write_json(self, path: Path | None, numbers: Mapping[str, object]) -> None:
        """Write on the first rank, if there is a path."""
        if self.context.is_main and path:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(numbers, indent=2) + "\n")


@contextmanager
def open_model(choice: ModelChoice) -> Iterator[OpenModel]:
    """The chosen model on every rank.

    Raises:
        UserError: on every rank, where any of them cannot load it.
    """
    with open_context(choice.device) as context:
        yield load_choice(choice, choice.model, context)


def load_choice(choice: Computing, model: str, context: DistContext) -> OpenModel:
    """The model called `model` on every rank of `context`, computing as `choice` says; the rest is as `open_model`."""
    if context.device.type == "cpu":
        keep_freed_memory()
    if choice.json and context.is_main:
        require_writable(choice.json.parent)
    path = context.run_on_all(lambda: find_model(model))
    context.run_on_main(lambda: require_whole_weights(path))
    gpt = context.run_on_all(lambda: load_model(path))
    length, warning = context.run_on_all(lambda: choose_length(choice.sequence_length, path, gpt.config.block_size))
    allow_tf32()
    hardware = found_hardware(context.device)
    speed = context.run_on_main(lambda: measure_speed(choice.dtype, hardware, gpt.config.n_embd))
    dtype, note = choose_dtype(choice.dtype, hardware, speed)
    precision = Precision.of(dtype, context.device)
    opened = OpenModel(
        gpt=gpt.to(context.device), path=path, sequence_length=length, context=context, precision=precision
    )
    if context.is_main and (line := died(Path(model))):
        tell(f"warning: {line}")
    if warning:
        opened.warn(warning)
    if note and context.is_main:
        tell(note)
    return opened


def choose_length(asked: int | None, path: Path, block_size: int) -> tuple[int, str | None]:
    """How many tokens the model in `path` reads at once, and a warning or None.

    A model knows the positions that it was trained at. The embeddings of later ones are as they were drawn, although
    every model has as many as its `block_size`.

    Raises:
        UserError: for more than the model takes, or a checkpoint that tells no such length.
    """
    if asked is not None and asked > block_size:
        raise UserError(f"--sequence-length {asked} is past the model's {block_size}")
    trained = trained_length(path, block_size)
    if asked is None or trained is None or asked <= trained:
        return asked or trained or block_size, None
    return asked, f"--sequence-length {asked}: the run was trained with {trained}, and knows nothing of later positions"


def trained_length(path: Path, block_size: int) -> int | None:
    """The length of the sequences that a run was trained with, of its checkpoint or what that was converted to; None
    for a model from elsewhere.

    Raises:
        UserError: where the checkpoint says something else than a length up to `block_size`.
    """
    file, name = path / "trainer_state.json", "config.sequence_length"
    if file.is_file():
        config = read_json(file).get("config")
        length = config.get("sequence_length") if isinstance(config, dict) else None
    else:
        file, name = path / "config.json", TRAINED_LENGTH
        config = read_json(file) if file.is_file() else {}
        if TRAINED_LENGTH not in config:
            return None
        length = config[TRAINED_LENGTH]
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= block_size:
        raise UserError(f"{file}: {name} cannot be {str(length)[:40]!r}")
    return length
