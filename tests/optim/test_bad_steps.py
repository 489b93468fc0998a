"""Steps that must not count: losses and gradients that are not finite, and losses that jump out of line."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from drivers import warm
from recomputed import assert_near
from running import checkpoint, final_hashes, metrics, status, wait_until, weights_and_moments
from safetensors.torch import load_file

from gpt2_ddp.checkpoint.files import faults
from gpt2_ddp.optim.updates import step_unless

GUARDED = ("--spike-guard", "6", "--max-steps", "32", "--checkpoint-every", "5", "--max-lr", "1e-3")
"""The guard needs 16 losses before it judges; checkpoints at 0, 5, 10, ..."""


def skipped(out_dir: Path) -> list[int]:
    return [entry["skipped"] for entry in metrics(out_dir)]


@pytest.mark.parametrize(
    ("dtype", "where", "value"),
    [
        ("float32", "loss", math.nan),
        ("float32", "loss", math.inf),
        ("float32", "gradient", math.nan),
        ("float32", "gradient", -math.inf),
        ("float16", "loss", math.nan),
        ("float16", "gradient", math.inf),
    ],
)
def test_an_update_that_is_not_finite_is_left_out(
    data_dir: Path, tmp_path: Path, dtype: str, where: str, value: float
) -> None:
    """Of steps 3, 7 and 8; the next save, at 8, holds what a run that leaves these updates out holds."""
    bad = {"non_finite": {"steps": [3, 7, 8], "where": where, "value": value}}
    warm.train(tmp_path / "bad", data_dir, "--dtype", dtype, faults=bad)
    out = {"leave_out": {"steps": [3, 7, 8], "halve_scale": dtype == "float16"}}
    warm.train(tmp_path / "out", data_dir, "--dtype", dtype, faults=out)
    for step in (4, 8, 12):
        assert final_hashes(tmp_path / "bad", step) == final_hashes(tmp_path / "out", step)
    assert skipped(tmp_path / "bad") == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    warm.train(tmp_path / "good", data_dir, "--dtype", dtype)
    assert skipped(tmp_path / "good") == [0] * 12
    assert weights_and_moments(tmp_path / "good") != weights_and_moments(tmp_path / "bad")


def test_on_apples_gpus_the_host_leaves_the_step_out() -> None:
    """Stand-ins: a skip that lies there, and a fused optimizer that would not look at it."""
    skip, optimizer = MagicMock(), MagicMock(_step_supports_amp_scaling=True)
    skip.device.type, skip.__bool__.return_value = "mps", True
    step_unless(skip, optimizer)
    assert not optimizer.step.called
    skip.device.type = "cuda"
    step_unless(skip, optimizer)
    assert optimizer.step.called
    assert optimizer.found_inf is skip.float()


def test_what_is_not_finite_on_one_rank_is_left_out_on_all(data_dir: Path, tmp_path: Path) -> None:
    """The ranks compare their weights at each save, so that one which had updated would be found."""
    bad = {"non_finite": {"steps": [3, 7], "where": "gradient", "value": math.inf, "rank": 1}}
    warm.fork_ranks(2, tmp_path / "bad", data_dir, faults=bad)
    assert skipped(tmp_path / "bad") == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    warm.train(tmp_path / "out", data_dir, faults={"leave_out": {"steps": [3, 7]}})
    for name in ("model.safetensors", "optimizer.safetensors"):  # of one rank, up to the order of a sum
        assert_near(*(load_file(checkpoint(tmp_path / run) / name) for run in ("bad", "out")))


def test_so_it_is_where_ranks_sum_in_a_tree(data_dir: Path, tmp_path: Path) -> None:
    bad = {"non_finite": {"steps": [3, 7], "where": "loss", "value": math.nan, "rank": 1}}
    warm.fork_ranks(2, tmp_path / "bad", data_dir, "--reproducible", faults=bad)
    assert skipped(tmp_path / "bad") == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    warm.train(tmp_path / "out", data_dir, "--reproducible", faults={"leave_out": {"steps": [3, 7]}})
    assert final_hashes(tmp_path / "bad") == final_hashes(tmp_path / "out")


def test_a_resume_takes_up_the_scale_of_the_gradients_and_the_skipped_updates(data_dir: Path, tmp_path: Path) -> None:
    """It was halved at step 3; a new scaler would have the scale that it begins with, and count from the resume."""
    bad = {"non_finite": {"steps": [3], "where": "gradient", "value": math.inf}}
    for steps in ("5", "12"):
        warm.train(tmp_path / "run", data_dir, "--dtype", "float16", "--max-steps", steps, faults=bad)
        scaler = json.loads((checkpoint(tmp_path / "run") / "trainer_state.json").read_text())["scaler"]
        assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**15, int(steps) - 3)
    assert skipped(tmp_path / "run") == [0, 0] + [1] * 10


def test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    bad = {"non_finite": {"steps": list(range(6, 13)), "where": "loss", "value": math.nan}}
    flags = ("--skip-limit", "3", "--log-every", "1")
    done = warm.train(tmp_path / "run", data_dir, *flags, faults=bad, status=1)
    assert "step 9: 4 steps in a row had a loss or gradient that is not finite (--skip-limit 3)" in done.stderr
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["step"]) == ("failed", 9)
    assert faults(tmp_path / "run" / "checkpoints" / "step_00000004") == []
    again = warm.train(tmp_path / "run", data_dir, *flags, faults=bad, status=1)
    assert "step 9: 4 steps in a row" in again.stderr  # of which 6 to 8 came before the checkpoint it went on from


def test_skips_between_two_logged_steps_are_seen(data_dir: Path, tmp_path: Path) -> None:
    bad = {"non_finite": {"steps": [2, 3, 4, 5], "where": "loss", "value": math.nan}}
    done = warm.train(tmp_path / "run", data_dir, "--skip-limit", "3", "--log-every", "8", faults=bad, status=1)
    assert "step 8: 4 steps in a row" in done.stderr


def spiky(*steps: int, kill: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"spike": {"steps": steps, "factor": 5}, "kill": {"steps": kill, "when_saved": True}}


def guard(out_dir: Path) -> dict[str, Any]:
    """What the last checkpoint says of the guard."""
    return dict(final_hashes(out_dir)["spike_guard"])


def test_a_spike_goes_back_and_passes_over_the_data(data_dir: Path, tmp_path: Path) -> None:
    """As a run does that never sees the data of steps 21 to 23."""
    done = warm.train(tmp_path / "spiked", data_dir, *GUARDED, faults=spiky(23))
    assert "step 23 | loss" in done.stdout
    assert "is a spike: going back to step 20 and past this data" in done.stdout
    passed = {"pass_over": {"after": 20, "by": 3}}
    warm.train(tmp_path / "passed", data_dir, *GUARDED, faults=passed)
    guards = [guard(tmp_path / name) for name in ("spiked", "passed")]
    assert final_hashes(tmp_path / "spiked") == {**final_hashes(tmp_path / "passed"), "spike_guard": guards[0]}
    losses = [entry["loss"] for entry in metrics(tmp_path / "spiked")]
    assert guards[0] == {"passed_over": 3, "rollbacks": 1, "recent": losses}  # none of those that did not count
    assert guards[1] == {"passed_over": 0, "rollbacks": 0, "recent": losses}
    chains = [[(e["step"], e["data_hash"]) for e in metrics(tmp_path / name)] for name in ("spiked", "passed")]
    assert chains[0] == chains[1]
    assert [step for step, _ in chains[0]] == list(range(1, 33))
    [event] = metrics(tmp_path / "spiked", "spike")
    assert (event["step"], event["spike_step"], event["passed_over"]) == (20, 23, 3)


def test_going_back_takes_up_the_counts_of_skipped_updates(data_dir: Path, tmp_path: Path) -> None:
    """Update 20 is skipped and saved; of data steps 21 to 23, one of them skipped, nothing remains; 24 is skipped."""
    bad = {"non_finite": {"steps": [20, 22, 24], "where": "loss", "value": math.nan}}
    warm.train(tmp_path / "run", data_dir, *GUARDED, faults=bad | spiky(23))
    assert skipped(tmp_path / "run") == [0] * 19 + [1] + [2] * 12
    counts = [
        (final_hashes(tmp_path / "run", step)[name]) for step in (20, 32) for name in ("skipped", "skipped_in_a_row")
    ]
    assert counts == [1, 1, 2, 0]
    done = warm.train(tmp_path / "less", data_dir, *GUARDED, "--skip-limit", "1", faults=bad | spiky(23), status=1)
    assert "step 21: 2 steps in a row" in done.stderr


@pytest.mark.parametrize(("kills", "starts"), [((24,), [0, 20]), ((27,), [0, 20]), ((24, 27, 30), [0, 20, 20, 25])])
def test_what_was_passed_over_is_remembered_by_a_resume(
    shared_folder: Path, data_dir: Path, tmp_path: Path, kills: tuple[int, ...], starts: list[int]
) -> None:
    """Data step 24 is the first after the rollback, and step 25 of data step 28 is saved. The spike of data step 33
    comes when the run has gone back as often as it may.
    """
    flags, out_dir = (*GUARDED, "--spike-limit", "1"), tmp_path / "killed"
    clean = warm.clean_run(shared_folder, data_dir, *flags, faults=spiky(23, 33))
    for _ in kills:
        warm.train(out_dir, data_dir, *flags, faults=spiky(23, 33, kill=kills), status=-signal.SIGKILL)
    warm.train(out_dir, data_dir, *flags, faults=spiky(23, 33, kill=kills))
    assert [entry["step"] for entry in metrics(out_dir, "start")] == starts
    assert final_hashes(out_dir) == final_hashes(clean)
    assert guard(clean)["rollbacks"] == 1
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 33))


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(data_dir: Path, tmp_path: Path) -> None:
    flags = (*GUARDED, "--checkpoint-every", "30")
    warm.train(tmp_path / "spiked", data_dir, *flags, faults=spiky(20, kill=(25,)), status=-signal.SIGKILL)
    done = warm.train(tmp_path / "spiked", data_dir, *flags, faults=spiky(20, kill=(25,)))
    assert "could not save" not in done.stdout
    warm.train(tmp_path / "passed", data_dir, *flags, faults={"pass_over": {"after": 0, "by": 20}})
    assert weights_and_moments(tmp_path / "spiked") == weights_and_moments(tmp_path / "passed")


def test_a_spike_after_a_resume_from_elsewhere_goes_back_to_where_it_began(data_dir: Path, tmp_path: Path) -> None:
    flags = (*GUARDED, "--max-steps", "28")
    first = tmp_path / "first"
    warm.train(first, data_dir, *flags, faults=spiky(23))
    other = (*flags, f"--resume={checkpoint(first, 20)}", "--checkpoint-every", "30")
    done = warm.train(tmp_path / "other", data_dir, *other, faults=spiky(23))
    assert "going back to step 20" in done.stdout
    assert weights_and_moments(tmp_path / "other") == weights_and_moments(first)


def test_it_goes_back_no_more_often_than_it_may(data_dir: Path, tmp_path: Path) -> None:
    flags = (*GUARDED, "--spike-limit", "2")
    done = warm.train(tmp_path / "run", data_dir, *flags, faults=spiky(*range(23, 60)))
    assert done.stdout.count("is a spike") == 2
    spikes = [(entry["spike_step"], entry["passed_over"]) for entry in metrics(tmp_path / "run", "spike")]
    assert spikes == [(23, 3), (21, 4)]
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, 33))


def test_two_ranks_go_back_together(data_dir: Path, tmp_path: Path) -> None:
    """To a checkpoint that is still being written, for longer than a rank may stand still."""

    def let_go(_: list[int]) -> None:
        wait_until((tmp_path / "two" / "saving").exists)
        time.sleep(6)
        (tmp_path / "two" / "go").touch()

    flags = (*GUARDED, "--reproducible", "--timeout", "3")
    slow = {"hold_save": {"step": 20}}
    warm.fork_ranks(2, tmp_path / "two", data_dir, *flags, faults=spiky(23) | slow, meanwhile=let_go)
    warm.train(tmp_path / "one", data_dir, *flags, faults={"pass_over": {"after": 20, "by": 3}})
    two, one = final_hashes(tmp_path / "two"), final_hashes(tmp_path / "one")
    assert two == {**one, "spike_guard": {**one["spike_guard"], "passed_over": 3, "rollbacks": 1}}


def test_without_the_guard_a_spike_is_trained_on(data_dir: Path, tmp_path: Path) -> None:
    """So it is with one that is told to let it pass."""
    for number, flags in enumerate(((), ("--spike-guard", "1e6"))):
        done = warm.train(tmp_path / str(number), data_dir, "--max-steps", "32", *flags, faults=spiky(23))
        assert "is a spike" not in done.stdout
        assert metrics(tmp_path / str(number), "spike") == []
