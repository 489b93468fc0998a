"""launch/local.sh and launch/setup.sh as a user calls them, for a few steps and in places of their own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from running import ROOT

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.model.gpt import model_config
from gpt2_ddp.system import cli

SHORT = (
    "--model",
    "gpt2-nano",
    "--max-steps",
    "3",
    "--device",
    "cpu",
    "--val-every",
    "3",
    "--val-tokens",
    "256",
    "--total-batch-size",
    "1024",
)


@pytest.mark.skipif(
    not (ROOT / ".venv" / "installed-test").exists(), reason="bash tests/run.sh makes the .venv that local.sh needs"
)
def test_local_goes_from_text_to_a_sample_and_can_be_run_again(tmp_path: Path) -> None:
    environment = {**os.environ, "DATA_DIR": str(tmp_path / "data"), "RUN_DIR": str(tmp_path / "run")}
    command = ["bash", ROOT / "launch" / "local.sh", *SHORT]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 3)
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = tmp_path / "run" / "report.html"
    assert f"wrote {report}: open it in a browser" in first.stdout
    assert "finished at step 3 of 3" in report.read_text()
    assert "The import statement" in first.stdout
    assert "at step 1, " in first.stdout
    weights = tmp_path / "run" / "checkpoints" / "step_00000003" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do" in again.stdout
    assert weights.stat().st_mtime_ns == before


def test_the_first_command_is_less_than_a_minute_of_work_and_fits_eight_ranks() -> None:
    """Of two cores at 0.3 TFLOP/s, which leaves the rest of three minutes to what is no matmul, and to slower ones."""
    script = (ROOT / "launch" / "local.sh").read_text().replace("\\\n", " ")
    line = next(line for line in script.splitlines() if "-m launch -- --model" in line)
    words = [word for word in shlex.split(line.partition(" -- ")[2]) if word != "$@"]
    config = cli.parse(TrainConfig, "", words)
    work = model_config(config.model).flops_per_token(config.sequence_length)
    assert work * config.total_batch_size * config.max_steps < 60 * 0.3e12
    BatchPlan(
        micro_batch_size=1,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=8,
    )


@pytest.mark.parametrize(("version", "said"), [("", "no python3 on PATH"), ("Python 3.8.10", "3.8.10 is too old")])
def test_setup_without_a_fitting_python_says_so(tmp_path: Path, version: str, said: str) -> None:
    for name in ("bash", "dirname", "cat", "cksum"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    if version:
        python = tmp_path / "python3"
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit 0\nexit 1\n')
        python.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    script = ROOT / "launch" / "setup.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
