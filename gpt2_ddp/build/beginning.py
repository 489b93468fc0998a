"""What a run begins with: a directory of its own with room in it, and a checkpoint or the weights of --init-from."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from gpt2_ddp.build.resume import find_resume
from gpt2_ddp.build.rules import optimizer_rule
from gpt2_ddp.checkpoint.choice import require_whole_weights
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.tokenizer import require_same_tokenizer
from gpt2_ddp.model.huggingface import find_model, loadable_config
from gpt2_ddp.model.shapes import parameter_count
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import sole_use

ENDING_SECONDS = 10.0
"""A trainer that is just ending, or notices that its torchrun is gone, needs a moment to leave the run directory."""


def find_start(config: TrainConfig, data_fingerprint: str, held: ExitStack) -> Found:
    """What the run goes on from, its directory held; where it begins anew, the disk is large enough for it.

    Raises:
        UserError: as `hold_directory`, `find_resume` and `require_room`.
    """
    hold_directory(config.out_dir, held)
    found = find_resume(config, data_fingerprint)
    for unfinished in (config.out_dir / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was cut off: it would keep its room for ever
    if found.path is None:
        require_room(config)
    return found


def find_weights(config: TrainConfig, found: Found) -> Path | None:
    """Where the weights of `--init-from` lie on rank 0's disk, if the run begins with them.

    Raises:
        UserError: where they are not there, not whole, or of another model.
    """
    if found.path is not None or config.init_from is None:
        return None
    wanted, source = config.shape, find_model(config.init_from)
    require_whole_weights(source)
    require_same_tokenizer(source, config.data_dir)
    there = loadable_config(source, vocab_size=wanted.vocab_size, dropout=config.dropout)
    if there != wanted:
        raise UserError(f"{source} is no {config.model}: it has {there}")
    return source


def hold_directory(out_dir: Path, held: ExitStack) -> None:
    """Make the run directory and keep other trainers out of it.

    Raises:
        UserError: where another one is at work there.
    """
    (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    refusal = f"{out_dir} is in use by another trainer: end it, or choose another --out-dir"
    held.enter_context(sole_use(out_dir, refusal, patience=ENDING_SECONDS))


def require_room(config: TrainConfig) -> None:
    """
    Raises:
        UserError: where not even one checkpoint fits on the disk of the run directory.
    """
    shape = config.shape
    needed = torch.float32.itemsize * parameter_count(shape) + optimizer_rule(config).state_bytes(shape)
    disk = shutil.disk_usage(config.out_dir)
    if disk.total and disk.free < needed:  # some file systems do not tell, and answer zeros
        raise UserError(
            f"{config.out_dir}: no space for a checkpoint of {config.model}, which takes {needed >> 20} MiB; "
            f"{disk.free >> 20} MiB are free: make room, or choose another --out-dir"
        )
