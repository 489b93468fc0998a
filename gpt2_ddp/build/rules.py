"""The optimizer and the schedule that the flags name, their values from the flags of the same names.

So a new one, and its own flags, need no change here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.optim.optimizers import OPTIMIZERS
from gpt2_ddp.optim.rule import OptimizerRule
from gpt2_ddp.optim.schedules import SCHEDULES, Schedule


def optimizer_rule(config: TrainConfig) -> OptimizerRule:
    """How `config` has the parameters updated."""
    kind = OPTIMIZERS[config.optimizer]
    return kind(**_values(kind, config))


def learning_rates(config: TrainConfig) -> Schedule:
    """The learning rate that `config` gives each step."""
    kind = SCHEDULES[config.schedule]
    return kind(**_values(kind, config))


def _values(kind: type[OptimizerRule] | type[Schedule], config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(kind)}
