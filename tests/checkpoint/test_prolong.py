"""A finished run whose rate stayed until its last steps goes on from before these when it is given more of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from drivers import warm
from running import final_hashes, metrics, tree

from gpt2_ddp.checkpoint.files import faults
from gpt2_ddp.checkpoint.mirror import Mirror, fetch

WSD = ("--schedule", "wsd", "--cooldown-fraction", "0.5", "--keep-checkpoints", "1")


def names(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def test_a_longer_run_from_before_the_cool_down_is_the_run_that_was_longer_at_once(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Of 12 steps 6 are left out, with a checkpoint among them; of 24 none but the last 12 have a lower rate.

    So is one of which only the copies are left; their drive then has what the longer run has.
    """
    straight, out_dir = warm.clean_run(shared_folder, data_dir, *WSD, "--max-steps", "24"), tmp_path / "run"
    done = warm.train(out_dir, data_dir, *WSD, "--keep-checkpoints", "2")
    assert done.stdout.endswith("a larger --max-steps goes on from step 6, before the cool-down\n")
    assert names(out_dir) == ["step_00000006", "step_00000008", "step_00000012"]
    short, drive = (out_dir / "metrics.jsonl").read_text(), tmp_path / "drive"
    Mirror(out_dir, drive, count=2).update()
    shutil.rmtree(out_dir)
    fetch(drive, out_dir)
    assert (names(out_dir), names(drive)) == (
        ["step_00000006", "step_00000012"], ["step_00000006", "step_00000008", "step_00000012"],
    )  # fmt: skip
    again = warm.train(out_dir, data_dir, *WSD, "--max-steps", "24").stdout
    assert "step_00000012 stays as step_00000012.finished, its log as metrics.step_00000012.jsonl\n" in again
    assert f"resuming {out_dir} from {out_dir}/checkpoints/step_00000006 at step 6\n" in again
    assert "jumps" not in again
    assert final_hashes(out_dir, 24) == final_hashes(straight, 24)
    lines, expected = ([(m["step"], m["loss"], m["lr"]) for m in metrics(run)] for run in (out_dir, straight))
    assert lines == expected
    assert (out_dir / "metrics.step_00000012.jsonl").read_text() == short
    assert names(out_dir) == ["step_00000012", "step_00000012.finished", "step_00000024"]
    assert not faults(out_dir / "checkpoints" / "step_00000012.finished")
    assert "warning" not in "".join(Mirror(out_dir, drive, count=1).update())
    assert tree(drive / "checkpoints") == tree(out_dir / "checkpoints")
    assert (
        "nothing to do"
        in warm.train(out_dir, data_dir, *WSD, "--max-steps", "24", "--cooldown-fraction", "0.25").stdout
    )


def test_a_prolonged_run_that_dies_at_once_says_of_no_jump(data_dir: Path, tmp_path: Path) -> None:
    """Its new rate is the one before, and not that of the cool-down that is no more."""
    warm.train(tmp_path, data_dir, *WSD, faults={"stop_after": {"step": 6}}, status=75)
    assert "jumps" not in warm.train(tmp_path, data_dir, *WSD, "--max-steps", "24").stdout


def test_what_is_no_longer_there_is_not_promised(data_dir: Path, tmp_path: Path) -> None:
    warm.train(tmp_path, data_dir, *WSD, "--keep-checkpoints", "0")
    for step in ("06", "12"):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_000000{step}")
    said = warm.train(tmp_path, data_dir, *WSD).stdout
    assert "at step 8\n" in said
    assert "a larger --max-steps" not in said


@pytest.mark.parametrize("lost", [True, False])
def test_what_was_not_finished_or_is_lost_goes_on_from_its_newest(data_dir: Path, tmp_path: Path, lost: bool) -> None:
    """A run that was stopped before its cool-down began, and one whose checkpoint from there is broken."""
    faulty = None if lost else {"stop_after": {"step": 5}}
    warm.train(tmp_path, data_dir, *WSD, faults=faulty, status=0 if lost else 75)
    if lost:
        (tmp_path / "checkpoints" / "step_00000006" / "model.safetensors").write_bytes(b"")
    said = warm.train(tmp_path, data_dir, *WSD, "--max-steps", "24").stdout
    assert f"at step {12 if lost else 5}\n" in said
    assert ("the learning rate jumps from " in said) == lost
    assert "stays as" not in said
