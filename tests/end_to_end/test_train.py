"""Whole runs, as processes: the same on any number of ranks, wherever they stop, whatever is watched."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from drivers import warm
from recomputed import loss_of
from running import (
    ROOT,
    checkpoint,
    copy_until,
    end,
    final_hashes,
    metrics,
    python,
    run,
    start,
    status,
    steps,
    tree,
    wait_until,
)
from safetensors.torch import load_file

from gpt2_ddp.build.making import start_model
from gpt2_ddp.checkpoint.files import faults
from gpt2_ddp.checkpoint.state import Found
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.model.recomputation import run_block
from gpt2_ddp.system.errors import UserError

CleanRun = Callable[..., Path]
LINE = re.compile(
    r"step (\d+) \| loss: (\d+\.\d{6}) \| lr (\d\.\d{4}e-\d\d) \| norm: (\d+\.\d{4}) \| dt: (\d+\.\d\d)ms "
    r"\| tok/sec: (\d+\.\d\d)"
)
"""Design section 6."""


def column(out_dir: Path, name: str) -> list[object]:
    return [entry[name] for entry in metrics(out_dir)]


def assert_same_run(found: Path, clean: Path) -> None:
    """The same weights and moments to the bit, and metrics that tell the same, each step once."""
    assert final_hashes(found) == final_hashes(clean)
    assert column(found, "step") == list(range(1, 21))
    for name in ("data_hash", "loss", "grad_norm", "lr", "tokens_seen"):
        assert column(found, name) == column(clean, name), name
    assert (status(found)["state"], status(found)["step"]) == ("finished", 20)


@pytest.mark.parametrize(
    ("nproc", "flags"),
    [(1, []), (2, []), (4, []), (0, ["--micro-batch-size=8"])],
    ids=["1-rank", "2-ranks", "4-ranks", "1-rank-a-quarter-of-the-micro-steps"],
)
def test_any_number_of_ranks_is_the_same_run(clean_run: CleanRun, nproc: int, flags: list[str]) -> None:
    alone, other = clean_run(), clean_run(*flags, nproc=nproc)
    assert column(other, "step") == list(range(1, 21))
    assert column(other, "data_hash") == column(alone, "data_hash")
    assert len(set(column(alone, "data_hash"))) == 20
    assert column(other, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
    assert column(other, "grad_norm") == pytest.approx(column(alone, "grad_norm"), rel=1e-3)  # of all ranks
    assert column(other, "tokens_seen") == [128 * step for step in range(1, 21)]
    assert column(alone, "loss")[-1] < column(alone, "loss")[0] - 1  # it learns
    plan = json.loads((checkpoint(other) / "trainer_state.json").read_text())["batch"]
    assert plan["world_size"] == max(nproc, 1)


def test_torchrun_with_one_rank_is_plain_python(clean_run: CleanRun) -> None:
    assert final_hashes(clean_run(nproc=1)) == final_hashes(clean_run())


@pytest.mark.parametrize("nproc", [0, 2, 4])
def test_the_console_says_a_line_a_step_from_one_rank(clean_run: CleanRun, nproc: int) -> None:
    out_dir = clean_run(nproc=nproc)
    lines = (out_dir / "stdout").read_text().splitlines()
    said = [match.groups() for line in lines if (match := LINE.fullmatch(line))]
    entries = metrics(out_dir)
    assert [(s, loss, lr, norm) for s, loss, lr, norm, _, _ in said] == [
        (str(e["step"]), f"{e['loss']:.6f}", f"{e['lr']:.4e}", f"{e['grad_norm']:.4f}") for e in entries
    ]
    for (*_, milliseconds, tokens_per_sec), entry in zip(said, entries, strict=True):
        assert float(milliseconds) == pytest.approx(entry["step_ms"], abs=0.01)
        assert float(tokens_per_sec) == pytest.approx(128 / float(milliseconds) * 1000, rel=0.01)
    assert lines[-1] == f"finished at step 20 of 20; checkpoint in {checkpoint(out_dir)}"
    assert [line for line in lines if not line.startswith("step ")] == [lines[0], lines[-1]]
    assert len(lines) == 23  # what runs where, how long it takes, 20 steps, and the end
    assert "Traceback" not in (out_dir / "stderr").read_text()


def test_sigterm_stops_with_a_checkpoint_and_the_run_goes_on(
    clean_run: CleanRun, data_dir: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    process = start(out_dir, data_dir)
    try:
        wait_until(lambda: steps(out_dir) >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        end(process)
    assert process.returncode == 75
    stopped = status(out_dir)
    assert stopped["state"] == "stopped"
    assert 2 <= stopped["step"] < 20
    assert checkpoint(out_dir) == checkpoint(out_dir, stopped["step"])
    assert faults(checkpoint(out_dir)) == []
    assert steps(out_dir) == stopped["step"]
    assert metrics(out_dir, "stop")[-1]["reason"] == "SIGTERM"
    assert said.splitlines()[-1].startswith(f"stopped at step {stopped['step']} of 20")

    again = warm.fork_small(out_dir, data_dir)
    assert f"from {checkpoint(out_dir, stopped['step'])} at step {stopped['step']}" in again.stdout
    assert_same_run(out_dir, clean_run())
    starts = json.loads((out_dir / "config.json").read_text())["starts"]
    assert [begun["step"] for begun in starts] == [0, stopped["step"]]


def test_four_ranks_killed_at_step_10_end_at_the_same_weights(
    clean_run: CleanRun, data_dir: Path, tmp_path: Path
) -> None:
    out_dir = copy_until(clean_run(nproc=4), tmp_path / "run", 10)
    warm.fork_small(out_dir, data_dir, nproc=4)
    assert_same_run(out_dir, clean_run(nproc=4))


def test_stopped_on_four_ranks_resumed_on_one(clean_run: CleanRun, data_dir: Path, tmp_path: Path) -> None:
    clean = clean_run(nproc=4)
    out_dir = copy_until(clean, tmp_path / "run", 10)
    warm.fork_small(out_dir, data_dir)
    assert column(out_dir, "step") == list(range(1, 21))
    assert column(out_dir, "data_hash") == column(clean, "data_hash")
    assert column(out_dir, "loss") == pytest.approx(column(clean, "loss"), abs=1e-4)
    states = [json.loads((checkpoint(path) / "trainer_state.json").read_text()) for path in (out_dir, clean)]
    assert states[0]["data_hash"] == states[1]["data_hash"]


@pytest.fixture(scope="module")
def tiny(shared_folder: Path, data_dir: Path) -> Path:
    """A finished run of 12 steps in a forked process, which costs no start-up."""
    return warm.clean_run(shared_folder, data_dir)


def test_resume_from_a_named_checkpoint(tiny: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(tiny, tmp_path / "run")
    done = warm.train(out_dir, data_dir, f"--resume={checkpoint(out_dir, 4)}")
    for step in ("08", "12"):
        assert f"step_000000{step} is newer; set aside as step_000000{step}.superseded" in done.stdout
        assert (out_dir / "checkpoints" / f"step_000000{step}.superseded" / "model.safetensors").exists()
    assert final_hashes(out_dir) == final_hashes(tiny)
    assert column(out_dir, "data_hash") == column(tiny, "data_hash")


def test_a_finished_run_is_left_alone(tiny: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(tiny, tmp_path / "run")
    before = tree(out_dir)
    done = warm.train(out_dir, data_dir)
    assert done.stdout.splitlines()[-1] == f"{out_dir} is already at step 12 of 12: nothing to do"
    assert tree(out_dir) == before


def test_validation_loss_is_what_the_checkpoint_has(tiny: Path, data_dir: Path, tmp_path: Path) -> None:
    """No activation is dropped in it."""
    more = ["--seed=1", "--sequence-length=16", "--max-steps=1", "--val-every=1", "--val-tokens=10000"]
    more += ["--dropout=0.5"]
    warm.train(tmp_path / "run", data_dir, *more)
    [val] = metrics(tmp_path / "run", "val")
    assert val["tokens"] == 43 * 16
    assert val["val_loss"] == pytest.approx(loss_of(checkpoint(tmp_path / "run"), data_dir, 43), abs=1e-4)
    for name in ("data_hash", "loss"):  # of another seed
        assert not set(column(tmp_path / "run", name)) & set(column(tiny, name))


def test_starting_from_another_runs_weights(tiny: Path, data_dir: Path, tmp_path: Path) -> None:
    for number, source in enumerate((tiny, checkpoint(tiny, 8))):
        out_dir = tmp_path / f"run{number}"
        warm.train(out_dir, data_dir, f"--init-from={source}", "--max-lr=0", "--max-steps=1")
        expected = final_hashes(tiny, None if source == tiny else 8)
        assert final_hashes(out_dir)["model.safetensors"] == expected["model.safetensors"]
        moments = load_file(checkpoint(out_dir) / "optimizer.safetensors")
        assert float(moments["wte.weight.step"]) == 1  # a new optimizer, a new schedule
        assert column(out_dir, "step") == [1]


@pytest.mark.parametrize(
    ("nproc", "faster", "tolerance"),
    [(0, "--dtype=bfloat16", 0.02), (2, "--compile=on", 1e-4)],
    ids=["bfloat16", "compiled"],
)
def test_faster_ways_to_the_same_losses(
    clean_run: CleanRun, data_dir: Path, tmp_path: Path, nproc: int, faster: str, tolerance: float
) -> None:
    flags = ["--max-steps=3", "--val-every=2", "--val-tokens=160", "--sample-every=3", "--total-batch-size=64"]
    plain, fast = clean_run(*flags), tmp_path / "run"
    done = warm.fork_small(fast, data_dir, *flags, faster, nproc=nproc)
    assert "torch.compile failed" not in done.stderr
    for event, name in (("train", "loss"), ("val", "val_loss")):
        expected, found = ([entry[name] for entry in metrics(path, event)] for path in (plain, fast))
        assert found == pytest.approx(expected, abs=tolerance)
    expected, found = (load_file(checkpoint(path) / "model.safetensors") for path in (plain, fast))
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    load_model(checkpoint(fast))


@pytest.mark.parametrize("flags", [[], ["--dropout=0.2"]], ids=["plain", "dropout"])
def test_activation_checkpointing_is_the_same_run(clean_run: CleanRun, flags: list[str]) -> None:
    again = clean_run(*flags, "--activation-checkpointing")
    assert json.loads((again / "config.json").read_text())["config"]["activation_checkpointing"] is True
    assert_same_run(again, clean_run(*flags))


def test_dropout_is_not_computed_again_on_apples_gpus() -> None:
    """By a stand-in for what lies there."""
    x = MagicMock()
    x.device.type = "mps"
    with pytest.raises(UserError, match="--activation-checkpointing with --dropout is not right on Apple's GPUs"):
        run_block(torch.nn.Identity(), x, again=True, random=True)


def test_activation_checkpointing_computes_blocks_again() -> None:
    config = TrainConfig(model="gpt2-nano", activation_checkpointing=True, device="cpu")
    model, _ = start_model(config, DistContext(), Found())
    calls = list[int]()
    model.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids, ids).backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(ids)
    assert len(calls) == 3


def test_the_script_without_flags_or_data(tmp_path: Path) -> None:
    """The trainer's other way in, from another folder and without a flag, names the command that prepares the data.

    It says so before it imports PyTorch's compiler, which takes as long as the rest.
    """
    done = run([*python(), str(ROOT / "train_gpt2.py")], cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 2
    imports, said = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    assert len(said) == 1
    assert said[0].startswith("error: no data directory at data/demo; prepare it with: python -m data_prep demo")
    names = {line.split("|")[-1].strip() for line in imports}
    assert "torch" in names
    assert "torch._dynamo" not in names
