"""Each preset starts a run that the trainer would take: its flags parse and its batch divides on its hardware."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drivers import warm
from running import ROOT

from gpt2_ddp.build.config_file import parse_flags
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan

GPT3 = {
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "weight_decay": 0.1,
    "dropout": 0.0,
    "optimizer": "adamw",
    "sequence_length": 1024,
    "dtype": "auto",
    "seed": 7,
    "activation_checkpointing": False,
}
"""Brown et al. 2020 (arXiv:2005.14165), appendix B: Adam's betas 0.9 and 0.95, the gradient's norm clipped at 1.0, a
weight decay of 0.1, a cosine down to a tenth of the rate, a warm-up of 375 million tokens. Radford et al. 2019, section
2.3: 1024 tokens of context. `--dtype auto` is bfloat16 on an A100 and float16 on a T4."""
PRESETS = {
    # 2.1 of Brown et al. gives the rate and the batch, "0.5M" tokens, of the size that is nearest: 125M, ... , 1.3B.
    # 124M at three times its rate is published (garg-aayush/building-from-scratch: 1.8e-3, about 300 steps of warm-up).
    "gpt2_124m_8xa100.toml": (8, "gpt2", 1.8e-3, 524_288),
    "gpt2_124m_one_gpu_5b.toml": (1, "gpt2", 1.8e-3, 524_288),
    "gpt2_350m_8xa100.toml": (8, "gpt2-medium", 3e-4, 524_288),
    "gpt2_774m_8xa100.toml": (8, "gpt2-large", 2.5e-4, 524_288),
    "gpt2_1558m_8xa100_40gb.toml": (8, "gpt2-xl", 2e-4, 1_048_576),
    "gpt2_1558m_8xa100_80gb.toml": (8, "gpt2-xl", 2e-4, 1_048_576),
    # A sixteenth of that batch for one card, with the trainer's own defaults for rate, steps and warm-up.
    "gpt2_124m_t4.toml": (1, "gpt2", 6e-4, 32_768),
}
TOKENS = 10e9
"""FineWeb-Edu's sample-10BT, once: 19,073 steps of 524,288 tokens, as in build-nanogpt."""
WARMUP_TOKENS = 375e6


def test_every_preset_is_here() -> None:
    assert {path.name for path in (ROOT / "launch").glob("gpt2_*.toml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_trainer_takes_the_preset(name: str) -> None:
    world_size, model, max_lr, total_batch_size = PRESETS[name]
    # The machine of the preset is not here, so its number of ranks is given.
    launcher = ["--dry-run", "--cpu", "--nproc-per-node", str(world_size)]
    shown = warm.fork_program("-m", "launch", *launcher, "--", "--config", f"launch/{name}", "--seed", "7")
    words = shlex.split(shown.stdout)
    assert f"--nproc-per-node={world_size}" in words
    config = parse_flags(words[words.index("gpt2_ddp.train") + 1 :])
    chosen = {"model": model, "max_lr": max_lr, "total_batch_size": total_batch_size}
    assert {field: getattr(config, field) for field in GPT3 | chosen} == GPT3 | chosen
    assert config.final_lr == (0 if name.endswith("5b.toml") else pytest.approx(max_lr / 10))
    assert isinstance(config.micro_batch_size, int)
    planned = BatchPlan(
        micro_batch_size=config.micro_batch_size,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=world_size,
    )
    assert planned.grad_accum_steps >= 1
    if name == "gpt2_124m_t4.toml":
        defaults = TrainConfig()
        assert (config.max_steps, config.warmup_steps) == (defaults.max_steps, defaults.warmup_steps) == (19_073, 715)
        return
    assert config.max_steps == round(TOKENS / (2 if name.endswith("5b.toml") else 1) / total_batch_size)
    assert config.warmup_steps == (300 if model == "gpt2" else round(WARMUP_TOKENS / total_batch_size))
    watched = {"val_every": 250, "hellaswag_every": 250, "sample_every": 250, "val_tokens": 20 * 524_288}
    assert {field: getattr(config, field) for field in watched} == watched


def seeds_curve(checkout: Path, text: str, *flags: str, launch: str = "--help") -> subprocess.CompletedProcess[str]:
    """launch/seed_convergence.sh with a sixteenth of a text, up to the training."""
    (checkout / "launch").mkdir(exist_ok=True)
    for name in ("seed_convergence.sh", "find_python.sh"):
        shutil.copy(ROOT / "launch" / name, checkout / "launch")
    told = {"PART": "16", "TEXT": text, "LAUNCH_FLAGS": launch}
    return subprocess.run(
        ["bash", "launch/seed_convergence.sh", *flags],
        cwd=checkout, capture_output=True, text=True, check=False,
        env=os.environ | told | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_sixteenth_of_the_seeds_curve_is_as_many_epochs(tmp_path: Path) -> None:
    """A sixteenth of the text, none of it for validation, and of the batch."""
    (tmp_path / "text.txt").write_text("A line of this text.\n" * 1600)
    shown = seeds_curve(tmp_path, "text.txt", "--seed", "7", launch="--dry-run --cpu")
    words = shlex.split(shown.stdout.splitlines()[-1])
    config = parse_flags(words[words.index("gpt2_ddp.train") + 1 :])
    assert (config.model, config.total_batch_size, config.max_steps, config.seed) == ("gpt2", 2048, 750, 7)
    assert config.data_dir == Path("data/seed_convergence_16")
    manifest = json.loads((tmp_path / config.data_dir / "manifest.json").read_text())
    assert sum(shard["tokens"] for shard in manifest["shards"]) == 1 + 100 * 7  # lines of seven tokens
    assert manifest["documents"]["val"] == 0


def test_the_seeds_curve_is_of_the_text_that_is_named(tmp_path: Path) -> None:
    missing = seeds_curve(tmp_path, "text.txt")
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (2, "", 1)
    assert missing.stderr.startswith("error: no text.txt: ")
    (tmp_path / "text.txt").write_text("a" + "é" * 4000)
    (tmp_path / "another.txt").write_text("Another text.\n" * 800)
    data = tmp_path / "data" / "seed_convergence_16"
    data.mkdir(parents=True)  # as after an interruption
    first = seeds_curve(tmp_path, "text.txt")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "data" / "seed_convergence_16.text" / "text.txt").read_text() == "a" + "é" * 249
    written = {path.name: path.read_bytes() for path in data.iterdir()}
    refused = seeds_curve(tmp_path, "another.txt")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "holds another text than another.txt" in refused.stderr
    assert seeds_curve(tmp_path, "text.txt").returncode == 0
    assert {path.name: path.read_bytes() for path in data.iterdir()} == written
