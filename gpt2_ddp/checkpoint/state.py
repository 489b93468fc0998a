"""What a checkpoint holds of a run: gathered into its files, and put back into the parts of a run on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_ddp.checkpoint.choice import newest_good
from gpt2_ddp.checkpoint.files import Content, read_tensors
from gpt2_ddp.data.tokenizer import SavedTokenizer
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import hf_config, load_weights, to_hf
from gpt2_ddp.model.vocabulary import EOT
from gpt2_ddp.optim.optimizers import load_optimizer_tensors, optimizer_tensors
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.optim.updates import SkipCount
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.fields import count, is_finite, json_object_in, text
from gpt2_ddp.system.files import read_json

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
"""What `torch.amp.GradScaler.state_dict` gives, where it is enabled; else it gives nothing."""


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands after `step` updates, by what was consumed, never by what was prefetched."""

    step: int = 0
    tokens_seen: int = 0
    data_hash: str = ""
    skips: SkipCount
    guard: SpikeGuard
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]:
        """As JSON carries it. Waits for the device."""
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "data_hash": self.data_hash,
            **self.skips.state_dict(),
            "spike_guard": self.guard.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: where a field is missing or cannot be what it should be.
        """
        self.step, self.tokens_seen = count(state, "step"), count(state, "tokens_seen")
        self.data_hash = text(state, "data_hash")
        self.skips.load_state_dict(state)
        self.guard.load_state_dict(json_object_in(state, "spike_guard"))
        scaler = json_object_in(state, "scaler")
        if scaler and not (scaler.keys() == SCALER and all(map(is_finite, scaler.values()))):
            raise UserError(f"scaler cannot be {str(scaler)[:60]}")
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What rank 0 found on its disk: a checkpoint to go on from, or none."""

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    """What its trainer_state.json holds."""
    said: list[str] = field(default_factory=list)
    aside: list[tuple[Path, str]] = field(default_factory=list)
    """Checkpoints that the run sets aside as it begins, and why."""


def read_state(path: Path) -> dict[str, Any]:
    """The trainer_state.json of a checkpoint, which a `TrainState` has taken up on trial: an error comes before
    anything of a run is changed.

    Raises:
        UserError: where it cannot be taken up.
    """
    file = path / STATE_FILE
    state = read_json(file)
    trial = TrainState(
        skips=SkipCount(torch.device("cpu")),
        guard=SpikeGuard(deviations=0, limit=0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    try:
        trial.load_state_dict(state)
        json_object_in(state, "config")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return state


def newest_checkpoint(directory: Path) -> Found:
    """The newest good checkpoint of a run that goes back to it.

    Raises:
        UserError: where there is none.
    """
    path, said = newest_good(directory)
    if path is None:
        raise UserError(f"{directory} holds no checkpoint to go back to")
    return Found(path=path, state=read_state(path), said=said)


def weights_and_moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run that must be the same on every rank, by name."""
    return {**dict(model.named_parameters()), **optimizer_tensors(model, optimizer)}


def checkpoint_files(
    state: TrainState,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    *,
    facts: Mapping[str, object],
    tokenizer: SavedTokenizer | None = None,
) -> dict[str, Content]:
    """The files of a checkpoint: a Hugging Face GPT-2 directory, the optimizer's state and the run's.

    `facts` are what is told of the run beside its state, as JSON carries it, and is never put back.
    """
    return {
        "config.json": hf_config(model.config, tokenizer.eot if tokenizer else EOT),
        **(tokenizer.files if tokenizer else {}),
        "model.safetensors": to_hf(model.state_dict()),
        OPTIMIZER_FILE: optimizer_tensors(model, optimizer),
        STATE_FILE: {**state.state_dict(), **facts},
    }


def restore(
    found: Found, context: DistContext, state: TrainState, model: GPT, optimizer: torch.optim.Optimizer
) -> None:
    """Put what a checkpoint holds into the parts of a run on every rank, whose tensors stay; rank 0 reads it.

    Where there is no checkpoint the parts stay as they are.

    Raises:
        UserError: on every rank, where the checkpoint is not of these parts.
    """
    path = found.path
    if path is None:
        return

    def load() -> None:
        if context.is_main:
            load_weights(path, model)
            load_optimizer_tensors(model, optimizer, read_tensors(path / OPTIMIZER_FILE))

    context.run_on_all(load)  # whole, before the first is sent: an error of rank 0 leaves nobody waiting
    context.broadcast_tensors(weights_and_moments(model, optimizer))
    state.load_state_dict(found.state)
