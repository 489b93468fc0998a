"""A run that goes on under other rates: one that is prolonged from before its cool-down, and rates that jump."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpt2_ddp.build.rules import learning_rates
from gpt2_ddp.checkpoint.choice import FINISHED, set_aside
from gpt2_ddp.checkpoint.files import faults, step_name
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig, flag
from gpt2_ddp.optim.schedules import SCHEDULES, Schedule

RATE_JUMP = 0.01
"""A change of the learning rate by this fraction is told."""


def branch_to_prolong(config: TrainConfig, state: Mapping[str, Any], directory: Path) -> Path | None:
    """The checkpoint before the cool-down that the run in `state` was in, where `config` has it go on for longer."""
    before, now = saved_rates(config, state["config"]), learning_rates(config)
    if before is None or before.branch_step is None or now.branch_step is None:
        return None
    cooling, longer = before.branch_step < state["step"], now.max_steps > before.max_steps
    branch = directory / step_name(before.branch_step)
    good = cooling and longer and now.branch_step > before.branch_step and branch.exists() and not faults(branch)
    return branch if good else None


def put_aside(out_dir: Path, found: Found) -> None:
    """Set aside the checkpoints that `found` says, when nothing can refuse the start any more.

    Of a run that is prolonged from before its end, the log is kept as well.
    """
    for path, why in found.aside:
        if why == FINISHED and (out_dir / "metrics.jsonl").exists():
            shutil.copyfile(out_dir / "metrics.jsonl", kept_log(out_dir, path))
        set_aside(path, why)


def kept_log(out_dir: Path, finished: Path) -> Path:
    """Where the log stays of a run that is prolonged, and whose last checkpoint was `finished`."""
    return out_dir / f"metrics.{finished.name}.jsonl"


def saved_rates(config: TrainConfig, saved: Mapping[str, Any]) -> Schedule | None:
    """The learning rates by the `saved` flags; None where the configuration is not one of ours."""
    try:
        schedule = learning_rates(replace(config, **saved_rate_flags(saved)))
        schedule.rate(1)
    except (TypeError, ValueError, KeyError):
        return None
    return schedule


def rate_jump(config: TrainConfig, saved: Mapping[str, Any], step: int) -> list[str]:
    """A line each where flags that differ from the `saved` ones make the rate, or Muon's own, jump after `step`."""
    before = saved_rate_flags(saved)
    changed = [name for name, value in before.items() if value != getattr(config, name)]
    saved_schedule = saved_rates(config, saved)
    if saved_schedule is None:
        return []
    old, new = (schedule.rate(step + 1) for schedule in (saved_schedule, learning_rates(config)))
    last = saved_schedule.rate(max(step, 1))
    if step >= config.max_steps:
        return []
    said = []
    if all(abs(new - other) > RATE_JUMP * max(new, other) for other in (old, last)):
        flags = ", ".join(f"{flag(name)} {before[name]} is now {getattr(config, name)}" for name in changed)
        said.append(f"the learning rate jumps from {old:.4e} to {new:.4e} at step {step + 1}: {flags}")
    own = saved.get("muon_lr")
    if config.optimizer == "muon" and own not in (None, config.muon_lr):
        said.append(f"Muon's learning rate jumps at step {step + 1}: --muon-lr {own} is now {config.muon_lr}")
    return said


def saved_rate_flags(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Of the `saved` flags, those that decide the learning rate of a step, and may change within a run."""
    decisive = {"schedule", "min_lr"} | {field.name for kind in SCHEDULES.values() for field in fields(kind)}
    flags = {"schedule": "cosine", **saved}  # which it was before there was a choice
    return {field.name: flags[field.name] for field in fields(TrainConfig) if field.name in decisive & flags.keys()}
