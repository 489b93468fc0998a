"""Each preset starts a run that the trainer would take: its flags parse and its batch divides on its hardware."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from gpt2_ddp import cli
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data import BatchPlan
from gpt2_ddp.model import model_config

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {
    "gpt2_124m_t4.sh": (1, "gpt2", 32_768),
    "gpt2_124m_8xa100.sh": (8, "gpt2", 524_288),
    "gpt2_350m_8xa100.sh": (8, "gpt2-medium", 524_288),
    "gpt2_774m_8xa100.sh": (8, "gpt2-large", 524_288),
    "gpt2_1558m_8xa100_40gb.sh": (8, "gpt2-xl", 1_048_576),
    "gpt2_1558m_8xa100_80gb.sh": (8, "gpt2-xl", 1_048_576),
}
HEADLINE = {"gpt2_124m_8xa100.sh": 19_073}


def test_every_preset_is_here() -> None:
    assert {path.name for path in (ROOT / "launch").glob("gpt2_*.sh")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_trainer_takes_the_preset(name: str) -> None:
    world_size, model, total_batch_size = PRESETS[name]
    # The machine of the preset is not here, so its number of ranks is given.
    environment = {**os.environ, "LAUNCH_FLAGS": f"--dry-run --cpu --nproc-per-node {world_size}"}
    shown = subprocess.run(
        ["bash", ROOT / "launch" / name, "--seed", "7"], env=environment, capture_output=True, text=True, check=True
    )
    words = shlex.split(shown.stdout)
    assert f"--nproc-per-node={world_size}" in words
    config = cli.parse(TrainConfig, "", words[words.index("gpt2_ddp.train") + 1 :])
    assert (config.model, config.total_batch_size, config.seed) == (model, total_batch_size, 7)
    assert config.sequence_length == model_config(config.model).block_size
    assert isinstance(config.micro_batch_size, int)
    planned = BatchPlan(
        micro_batch_size=config.micro_batch_size,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=world_size,
    )
    assert planned.grad_accum_steps >= 1
    tokens = config.max_steps * config.total_batch_size
    assert config.max_steps == HEADLINE.get(name, config.max_steps)
    if world_size == 8:
        assert 9.99e9 < tokens < 1.001e10
        assert config.val_every == config.hellaswag_every == 250
    assert 0.3e9 < config.warmup_steps * config.total_batch_size < 0.4e9 or world_size == 1
