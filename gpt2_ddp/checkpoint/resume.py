"""Where a run goes on: what a checkpoint holds of it, which one to take up, and what must not have changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2_ddp.checkpoint import files as checkpoint
from gpt2_ddp.config import TrainConfig, differences, flag
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model import huggingface as pretrained
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.optim import optimizer as optim
from gpt2_ddp.optim.spikes import SpikeGuard
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import read_json
from gpt2_ddp.system.precision import DTYPES

COUNTS = ("step", "tokens_seen", "skipped", "skipped_in_a_row")
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
"""What `torch.amp.GradScaler.state_dict` gives."""
SCHEDULE = ("max_steps", "warmup_steps", "max_lr", "min_lr")
"""What decides the learning rate of a step, and may change within a run."""
RATE_JUMP = 0.01
"""A change of the learning rate by this fraction is told."""
MAX_COUNT = 1 << 62
"""What a checkpoint counts fits in 64 bits."""


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands after `step` updates, by what was consumed, never by what was prefetched."""

    step: int = 0
    tokens_seen: int = 0
    data_hash: str = ""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What rank 0 found in the run directory: a checkpoint to go on from, or none."""

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def checkpoint_files(
    *,
    config: TrainConfig,
    plan: BatchPlan,
    data_fingerprint: str,
    state: TrainState,
    skips: optim.SkipCount,
    guard: SpikeGuard,
    numerics: Mapping[str, object] | None,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    tokenizer: Mapping[str, bytes],
) -> dict[str, checkpoint.Content]:
    """The files of a checkpoint: a Hugging Face GPT-2 directory, the optimizer's state and the run's."""
    trainer_state = {
        **asdict(state),
        "skipped": skips.total(),
        "skipped_in_a_row": skips.in_a_row(),
        "spike_guard": guard.state(),
        "numerics": numerics,
        "batch": asdict(plan),
        "data_fingerprint": data_fingerprint,
        "scaler": scaler.state_dict(),
        "config": config.to_json(),
    }
    return {
        "config.json": pretrained.hf_config(model.config),
        **tokenizer,
        "model.safetensors": pretrained.to_hf(model.state_dict()),
        "optimizer.safetensors": optim.optimizer_tensors(model, optimizer),
        "trainer_state.json": trainer_state,
    }


def find_resume(config: TrainConfig, data_fingerprint: str) -> Resume:
    """What `--resume` means in this run directory. Runs on rank 0, whose disk alone has to have the checkpoints.

    Raises:
        UserError: where the run there has another model, seed, batch or data, or nothing good is left of it.
    """
    directory, config_file = config.out_dir / "checkpoints", config.out_dir / "config.json"
    (config.out_dir / ".writable").touch()
    (config.out_dir / ".writable").unlink()
    if config.resume == "never":
        if config_file.exists() or checkpoint.checkpoints(directory):
            raise UserError(f"{config.out_dir} holds a run and --resume is never: choose another --out-dir")
        return Resume()
    said: list[str] = []
    path: Path | None
    if config.resume == "auto":
        path, said = checkpoint.newest_good(directory)
    else:
        path, said = checkpoint.named(Path(config.resume))
    if path is None:
        if config_file.exists():
            require_same_run(config, read_json(config_file), data_fingerprint)
            said.append(f"{config.out_dir} holds a run without a checkpoint: starting it again from step 0")
        return Resume(said=said)
    state = read_state(path)
    require_same_run(config, state, data_fingerprint)
    for newer in checkpoint.checkpoints(directory):
        if newer.name > checkpoint.step_name(state["step"]):
            said.append(f"{newer.name} is newer; set aside as {checkpoint.set_aside(newer, 'superseded').name}")
    said.append(f"resuming {config.out_dir} from {path} at step {state['step']}")
    said += rate_jump(config, state["config"], state["step"])
    return Resume(path=path, state=state, said=said)


def rate_jump(config: TrainConfig, saved: Mapping[str, Any], step: int) -> list[str]:
    """One line where flags that differ from the `saved` ones make the learning rate jump after `step`."""
    before: dict[str, Any] = {name: saved.get(name) for name in SCHEDULE}
    changed = [name for name in SCHEDULE if before[name] != getattr(config, name)]
    try:
        old = rate_after(replace(config, **before), step)
    except (TypeError, ValueError):  # a checkpoint from elsewhere, whose configuration is not one of ours
        return []
    new = rate_after(config, step)
    if step >= config.max_steps or abs(new - old) <= RATE_JUMP * max(new, old):
        return []
    flags = ", ".join(f"{flag(name)} {before[name]} is now {getattr(config, name)}" for name in changed)
    return [f"the learning rate jumps from {old:.4e} to {new:.4e} at step {step + 1}: {flags}"]


def rate_after(config: TrainConfig, step: int) -> float:
    """The learning rate of the update after `step`."""
    return optim.learning_rate(
        step + 1,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        max_lr=config.max_lr,
        min_lr=config.final_lr,
    )


def saved_micro_batch(config: TrainConfig, world_size: int) -> int | None:
    """The micro-batch of the run in --out-dir, which a resume should keep; None where there is none that divides."""
    file = config.out_dir / "config.json"
    saved = read_json(file).get("config") if config.resume == "auto" and file.exists() else None
    size = saved.get("micro_batch_size") if isinstance(saved, dict) else None
    if not isinstance(size, int) or size < 1 or config.total_batch_size % (size * config.sequence_length * world_size):
        return None
    return size


def saved_dtype(config: TrainConfig, device_type: str) -> str | None:
    """The number format, as `--dtype` takes it, of the last start of the run that `--resume` continues.

    None where there is no such run, or where it computed on another kind of device: what is fast there says nothing.
    Nor where its config.json cannot be read, which for another run's is no reason to refuse its checkpoint.
    """
    run_dir = config.out_dir if config.resume == "auto" else Path(config.resume).resolve().parent.parent
    file = run_dir / "config.json"
    try:
        starts = read_json(file).get("starts") if config.resume != "never" and file.exists() else None
    except ValueError:
        return None
    last = starts[-1] if isinstance(starts, list) and starts else None
    if not isinstance(last, dict) or str(last.get("device")).split(":")[0] != device_type:
        return None
    name = str(last.get("dtype")).removeprefix("torch.")
    return name if name in DTYPES else None


def read_state(path: Path) -> dict[str, Any]:
    """The trainer_state.json of a checkpoint.

    Raises:
        UserError: where a field that training goes on from is missing or cannot be what it should be.
    """
    file = path / "trainer_state.json"
    state = read_json(file)
    guard, scaler = state.get("spike_guard"), state.get("scaler")
    good = {
        **{name: _is_count(state.get(name)) for name in COUNTS},
        "data_hash": isinstance(state.get("data_hash"), str),
        "config": isinstance(state.get("config"), dict),
        "spike_guard": isinstance(guard, dict)
        and _is_count(guard.get("passed_over"))
        and _is_count(guard.get("rollbacks"))
        and isinstance(guard.get("recent"), list)
        and all(map(_is_finite, guard["recent"])),
        "scaler": scaler == {}
        or (isinstance(scaler, dict) and scaler.keys() == SCALER and all(map(_is_finite, scaler.values()))),
    }
    for name, is_good in good.items():
        if not is_good:
            raise UserError(f"{file}: {name} cannot be {json.dumps(state.get(name))[:60]}")
    return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < MAX_COUNT


def require_same_run(config: TrainConfig, saved: dict[str, Any], data_fingerprint: str) -> None:
    """
    Raises:
        UserError: naming each field that must not change within a run and did.
    """
    saved_config = saved.get("config")
    found = differences(saved_config if isinstance(saved_config, dict) else {}, config)
    if saved.get("data_fingerprint") != data_fingerprint:
        found.append(f"the tokens in --data-dir {config.data_dir} are not those the run was trained on")
    if found:
        raise UserError(f"{config.out_dir} is another run: {'; '.join(found)}. Choose another --out-dir")


def find_checkpoint(directory: Path) -> Resume:
    """The newest good checkpoint of a run that goes back to it.

    Raises:
        UserError: where there is none.
    """
    path, said = checkpoint.newest_good(directory)
    if path is None:
        raise UserError(f"{directory} holds no checkpoint to go back to")
    return Resume(path=path, state=read_state(path), said=said)


def weights_and_moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that must be the same on every rank, by name."""
    return {**dict(model.named_parameters()), **optim.optimizer_tensors(model, optimizer)}


def restore_weights(found: Resume, context: DistContext, model: GPT) -> None:
    """Put the weights of the checkpoint into `model` on every rank; rank 0 reads them."""
    path = found.path
    assert path is not None  # `find_checkpoint` raises where there is none
    context.run_on_all(lambda: pretrained.load_weights(path, model) if context.is_main else None)
    context.broadcast_tensors(dict(model.named_parameters()))


def restore(
    resume: Resume, context: DistContext, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> TrainState:
    """Put what the checkpoint holds for the optimizer and the scaler into them on every rank; rank 0 reads it.

    The optimizer's state is that of `optim.allocate_state`, whose tensors stay.
    """
    if resume.path is None:
        return TrainState()
    file = resume.path / "optimizer.safetensors"

    def load() -> None:
        if context.is_main:
            optim.load_optimizer_tensors(model, optimizer, checkpoint.read_tensors(file))

    context.run_on_all(load)  # whole, before the first is sent: an error of rank 0 leaves nobody waiting
    context.broadcast_tensors(optim.optimizer_tensors(model, optimizer))
    if scaler.is_enabled() and resume.state["scaler"]:
        scaler.load_state_dict(resume.state["scaler"])
    return TrainState(**{name: resume.state[name] for name in ("step", "tokens_seen", "data_hash")})
