"""Which checkpoint a run goes on from, and what is said where it goes on otherwise."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from drivers import warm
from running import checkpoint, final_hashes, metrics, tree

from gpt2_ddp.build.beginning import require_room
from gpt2_ddp.build.prolonging import rate_jump
from gpt2_ddp.build.resume import saved_dtype, was_restarted
from gpt2_ddp.checkpoint.choice import named
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.optim.schedules import Cosine
from gpt2_ddp.system.files import TIME_FORMAT, read_json


@pytest.fixture(scope="module")
def clean(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir)


def break_checkpoint(path: Path) -> None:
    (path / "optimizer.safetensors").write_bytes(b"broken")


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_run_directory_stands_for_its_newest_good_checkpoint(
    inside: str, clean: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Of another run: nothing in it is touched. The run that goes on ends at the same weights."""
    other = tmp_path / "other"
    shutil.copytree(clean, other)
    break_checkpoint(checkpoint(other, 12))
    before = tree(other)
    done = warm.train(tmp_path / "run", data_dir, f"--resume={other / inside}")
    assert f"{checkpoint(other, 12)} is broken (optimizer.safetensors has 6 bytes" in done.stdout
    assert f"resuming {tmp_path / 'run'} from {checkpoint(other, 8)} at step 8" in done.stdout
    assert tree(other) == before
    assert final_hashes(tmp_path / "run") == final_hashes(clean)


def test_its_own_run_directory(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(clean, out_dir)
    shutil.rmtree(checkpoint(out_dir, 12))
    done = warm.train(out_dir, data_dir, f"--resume={out_dir}")
    assert f"from {checkpoint(out_dir, 8)} at step 8" in done.stdout
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


def test_the_same_command_goes_on_from_what_it_has_trained(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """And another one does not throw it away."""
    out_dir, flag = tmp_path / "run", f"--resume={checkpoint(clean, 4)}"
    warm.train(out_dir, data_dir, flag, faults={"stop_after": {"step": 7}}, status=75)
    done = warm.train(out_dir, data_dir, flag)
    assert f"resuming {out_dir} from {checkpoint(out_dir, 7)} at step 7" in done.stdout
    assert final_hashes(out_dir) == final_hashes(clean)
    before = tree(out_dir)
    done = warm.train(out_dir, data_dir, flag, "--max-steps", "20", status=2)
    assert f"{out_dir} has step_00000012 already: leave --resume out to go on from there" in done.stderr
    assert tree(out_dir) == before


def test_a_way_back_can_be_taken_back(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """What was set aside is taken up by its name, also after a death before the next save."""
    out_dir = shutil.copytree(clean, tmp_path / "run")
    warm.train(out_dir, data_dir, f"--resume={checkpoint(out_dir, 4)}", "--max-lr=2e-3")
    old = checkpoint(out_dir, 8).with_name("step_00000008.superseded")
    killed = {"kill": {"steps": [10]}}
    warm.train(out_dir, data_dir, f"--resume={old}", faults=killed, status=-signal.SIGKILL)
    done = warm.train(out_dir, data_dir, f"--resume={old}")
    assert f"resuming {out_dir} from {old} at step 8" in done.stdout
    assert final_hashes(out_dir) == final_hashes(clean)


def test_a_start_that_is_refused_sets_nothing_aside(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """What a save that was cut off has left goes, which nothing else would ever take away."""
    out_dir = shutil.copytree(clean, tmp_path / "run")
    before = tree(out_dir)
    cut_off = checkpoint(out_dir, 11).with_suffix(".tmp")
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"half of it")
    flags = (f"--resume={checkpoint(out_dir, 4)}", "--reproducible")
    done = warm.train(out_dir, data_dir, *flags, status=2)
    assert "--reproducible: the run that is resumed was not begun with it" in done.stderr
    assert tree(out_dir) == before


def test_links_to_its_checkpoints_are_its_checkpoints(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """One that was moved to another disk, and a name for one."""
    out_dir, moved, latest = shutil.copytree(clean, tmp_path / "run"), tmp_path / "moved", tmp_path / "latest"
    checkpoint(out_dir, 12).rename(moved)
    checkpoint(out_dir, 12).symlink_to(moved)
    assert "nothing to do" in warm.train(out_dir, data_dir).stdout
    latest.symlink_to(checkpoint(out_dir, 8))
    done = warm.train(out_dir, data_dir, f"--resume={latest}")
    assert "step_00000012 is newer; set aside" in done.stdout
    assert checkpoint(out_dir, 4).is_dir()
    assert final_hashes(out_dir) == final_hashes(clean)


def test_a_checkpoint_of_another_run_that_does_not_fit_says_which(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    done = warm.train(tmp_path / "new", data_dir, f"--resume={clean}", "--seed=5", status=2)
    said = f"error: {checkpoint(clean, 12)} is another run: --seed is 5, the run has 1337. Leave --resume out, with "
    assert done.stderr.startswith(f"{said}--init-from {checkpoint(clean, 12)}")


def test_the_time_of_a_step_is_that_of_the_steps_that_were_made(data_dir: Path, tmp_path: Path) -> None:
    """A start in the midst of --log-every makes fewer until it logs."""
    slow: dict[str, Any] = {"slow_steps": {"seconds": 0.2}}
    warm.train(tmp_path, data_dir, "--log-every=4", faults={"stop_after": {"step": 7}}, status=75)
    warm.train(tmp_path, data_dir, "--log-every=4", "--max-steps=8", faults=slow)
    assert metrics(tmp_path)[-1]["step_ms"] >= 200


def test_never_is_for_old_runs_and_not_for_restarts(data_dir: Path, tmp_path: Path) -> None:
    """A restart by torchrun, and a job that SLURM queued again, go on; the command by hand is refused."""
    out_dir = tmp_path / "run"
    killed = {"kill": {"steps": [6], "when_saved": True}}
    argv = warm.flags(out_dir, data_dir, "--resume", "never")
    assert warm.start_forked(argv, faults=killed).wait().returncode == -signal.SIGKILL
    refused = warm.start_forked(argv).wait()
    assert (refused.returncode, "holds a run and --resume is never" in refused.stderr) == (2, True)
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        other = warm.start_forked([*argv, "--max-lr=3"], env={variable: "1"}).wait()
        assert other.returncode == 2, variable
        done = warm.start_forked(argv, env={variable: "1"}).wait()
        assert done.returncode == 0, done.stderr


def test_a_torchrun_that_began_later_made_none_of_the_starts_before() -> None:
    now = datetime.now().astimezone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert was_restarted(now.strftime(TIME_FORMAT))
        assert not was_restarted((now - timedelta(days=900)).strftime(TIME_FORMAT))
        assert not was_restarted("yesterday")


def test_the_number_format_of_a_run_is_kept_whatever_names_it(clean: Path, tmp_path: Path) -> None:
    for place in (clean, clean / "checkpoints", checkpoint(clean, 4)):
        assert saved_dtype(TrainConfig(resume=str(place), out_dir=tmp_path), "cpu") == "float32"
    assert saved_dtype(TrainConfig(resume=str(tmp_path), out_dir=tmp_path), "cpu") is None


def test_a_path_with_no_good_checkpoint_says_what_to_give(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot resume from .*/run: manifest.json is missing; give a run directory"):
        named(tmp_path / "run")
    shutil.copytree(checkpoint(clean, 4), tmp_path / "run" / "checkpoints" / "step_00000004")
    assert named(tmp_path / "run") == (checkpoint(tmp_path / "run", 4), [])
    break_checkpoint(checkpoint(tmp_path / "run", 4))
    with pytest.raises(ValueError, match=r"step_00000004 is broken .*; give another run or checkpoint"):
        named(tmp_path / "run")


SAVED = TrainConfig(max_steps=1000, warmup_steps=100, max_lr=6e-4)


@pytest.mark.parametrize(
    ("changes", "step", "jumps"),
    [
        ({}, 500, False),
        ({"max_steps": 2000}, 500, True),
        ({"max_steps": 2000}, 50, False),  # in the warm-up the length of the run does not matter
        ({"max_lr": 3e-4}, 50, True),
        ({"min_lr": 6e-5}, 500, False),  # what the default was
        ({"min_lr": 0.0}, 999, True),
        ({"max_steps": 1001}, 500, False),
        ({"warmup_steps": 200}, 50, True),
        ({"max_lr": 3e-4, "max_steps": 400}, 500, False),  # nothing is left to do
        ({"dropout": 0.5, "log_every": 7}, 500, False),
    ],
)
def test_a_rate_that_jumps_is_said(changes: dict[str, Any], step: int, jumps: bool) -> None:
    said = rate_jump(replace(SAVED, **changes), SAVED.to_json(), step)
    assert len(said) == jumps
    if jumps:
        assert f" at step {step + 1}: " in said[0]
        for name, value in changes.items():
            assert f"--{name.replace('_', '-')} {SAVED.to_json()[name]} is now {value}" in said[0]


def test_a_rate_of_muons_own_that_jumps_is_said_too() -> None:
    old, new = (TrainConfig(optimizer="muon", muon_lr=rate) for rate in (1e-3, 2e-3))
    assert rate_jump(new, old.to_json(), 500) == [
        "Muon's learning rate jumps at step 501: --muon-lr 0.001 is now 0.002"
    ]
    assert rate_jump(new, new.to_json(), 500) == []


@pytest.mark.parametrize("saved", [{}, {"max_steps": "many", "max_lr": None}, {"max_steps": -1}, {"warmup_steps": []}])
def test_a_saved_configuration_that_is_none_says_nothing(saved: dict[str, Any]) -> None:
    assert rate_jump(SAVED, saved, 500) == []


def test_a_resume_with_more_steps_says_how_the_rate_jumps(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(clean, out_dir)
    shutil.rmtree(checkpoint(out_dir, 12))
    done = warm.train(out_dir, data_dir, "--max-steps", "24")
    found = re.search(r"jumps from (\S+) to (\S+) at step 9: --max-steps 12 is now 24\n", done.stdout)
    assert found
    schedule = Cosine(max_steps=12, warmup_steps=3, max_lr=1e-2, final_lr=1e-3)
    assert float(found[1]) == pytest.approx(schedule.rate(9), rel=1e-3)
    [new] = [entry["lr"] for entry in metrics(out_dir) if entry["step"] == 9]
    assert float(found[2]) == pytest.approx(new, rel=1e-3)
    assert "jumps" not in warm.train(out_dir, data_dir, "--max-steps", "24").stdout


def test_a_checkpoint_tells_a_run_by_the_names_that_it_always_did(clean: Path) -> None:
    """Older checkpoints are resumed by these, and other tools read them."""
    state = read_json(checkpoint(clean) / "trainer_state.json")
    names = (
        "step tokens_seen data_hash skipped skipped_in_a_row spike_guard numerics batch data_fingerprint scaler config"
    )
    assert state.keys() == set(names.split())
    assert state["spike_guard"].keys() == {"passed_over", "rollbacks", "recent"}
    assert state["batch"].keys() == {"micro_batch_size", "sequence_length", "total_batch_size", "world_size"}


class Usage(NamedTuple):
    """What `shutil.disk_usage` answers."""

    total: int
    used: int
    free: int


def test_a_disk_too_small_for_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(model="gpt2-nano", out_dir=tmp_path)
    for usage in (Usage(10**9, 0, 10**9), Usage(0, 0, 0)):  # zeros: a file system that does not tell
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        require_room(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**7))
    with pytest.raises(ValueError, match=r"no space for a checkpoint of gpt2-nano, which takes 38 MiB; 9 MiB are free"):
        require_room(config)
