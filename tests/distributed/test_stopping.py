"""Asked to stop in any way and at any time, a run saves the step it is in, once, and goes on to the same weights.

The runs are --reproducible, so that what two ranks began one rank can finish, quickly, and be compared with one rank.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from drivers import warm
from running import checkpoint, final_hashes, metrics, status, wait_until

from gpt2_ddp.checkpoint.files import faults

SAME = ("--reproducible",)


@pytest.fixture(scope="module")
def clean(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir, *SAME)


def held(out_dir: Path) -> int:
    """The process that waits at the place that a test has named."""
    wait_until(lambda: (out_dir / "held").exists() and (out_dir / "held").read_text())
    return int((out_dir / "held").read_text())


def go(out_dir: Path) -> None:
    (out_dir / "go").touch()


def saved_steps(out_dir: Path, *, whole: bool = False) -> list[int]:
    """The steps of the checkpoints; with `whole` one that is being written may lie beside them."""
    paths = [path for path in (out_dir / "checkpoints").iterdir() if not (whole and path.suffix == ".tmp")]
    return sorted(int(path.name.removeprefix("step_")) for path in paths)


def check_stopped_and_finish(out_dir: Path, data_dir: Path, clean: Path, *, step: int, reason: str) -> None:
    assert (status(out_dir)["state"], status(out_dir)["step"]) == ("stopped", step)
    [stop] = metrics(out_dir, "stop")
    assert (stop["step"], stop["reason"]) == (step, reason)
    assert saved_steps(out_dir) == sorted({*range(4, step, 4), step})
    assert [faults(path) for path in (out_dir / "checkpoints").iterdir()] == [[]] * len(saved_steps(out_dir))
    assert not (out_dir / "stop").exists()
    warm.train(out_dir, data_dir, *SAME)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("place", "rank", "number"),
    [
        ({"where": "step", "step": 6}, 1, signal.SIGUSR1),
        ({"where": "step", "step": 1}, 1, signal.SIGHUP),
        ({"where": "validate", "step": 6}, 0, signal.SIGINT),
    ],
    ids=["in a step", "in the first step", "while evaluating"],
)
def test_a_signal_to_one_rank_stops_all(
    clean: Path, data_dir: Path, tmp_path: Path, place: dict[str, object], rank: int, number: signal.Signals
) -> None:
    out_dir = tmp_path / "run"
    flags = (*SAME, "--val-every", "3", "--val-tokens", "64")
    hold = {"hold": {**place, "rank": rank}}
    warm.fork_ranks(2, out_dir, data_dir, *flags, faults=hold, meanwhile=lambda _: os.kill(held(out_dir), number))
    check_stopped_and_finish(out_dir, data_dir, clean, step=int(str(place["step"])), reason=number.name)


def test_a_file_stops_all(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"

    def ask(_: list[int]) -> None:
        held(out_dir)
        (out_dir / "stop").touch()
        go(out_dir)

    hold = {"hold": {"where": "step", "step": 6, "rank": 1}}
    warm.fork_ranks(2, out_dir, data_dir, *SAME, faults=hold, meanwhile=ask)
    check_stopped_and_finish(out_dir, data_dir, clean, step=6, reason="stop file")


SLOW_SAVE = {"hold_save": {"step": 4}, "hold": {"where": "step", "step": 6}}
"""The save of step 4 goes on until there is a file `go`; meanwhile a rank waits in step 6 for a signal."""


def test_a_save_in_flight_is_finished(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """And the last one after it, however long that takes: no rank waits, so that nobody may give up."""
    out_dir = tmp_path / "run"

    def stop(pids: list[int]) -> None:
        ranks = [psutil.Process(pid) for pid in pids]
        wait_until((out_dir / "saving").exists)
        held(out_dir)
        os.kill(ranks[0].pid, signal.SIGTERM)
        wait_until(lambda: warm.gone(ranks[1]))  # it has nothing to save
        time.sleep(6)  # longer than --timeout, after which a watchdog ends a rank, and than the patience of other saves
        assert checkpoint(out_dir, 4).with_suffix(".tmp").exists()
        assert saved_steps(out_dir, whole=True) == []
        assert not warm.gone(ranks[0])
        go(out_dir)

    warm.fork_ranks(2, out_dir, data_dir, *SAME, "--timeout", "4", faults=SLOW_SAVE, meanwhile=stop)
    check_stopped_and_finish(out_dir, data_dir, clean, step=6, reason="SIGTERM")


def test_a_signal_to_torchrun_stops_all_and_a_second_changes_nothing(
    clean: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Also in the middle of a save."""
    out_dir = tmp_path / "run"
    running = warm.start_ranks(2, out_dir, data_dir, *SAME, faults=SLOW_SAVE)
    wait_until((out_dir / "saving").exists)
    held(out_dir)
    ranks = warm.ranks(running)
    running.send_signal(signal.SIGTERM)
    wait_until(lambda: warm.gone(ranks[1]))  # so torchrun is in the middle of ending them
    running.send_signal(signal.SIGTERM)
    go(out_dir)
    wait_until(lambda: warm.gone(ranks[0]))
    warm.finish(running)
    check_stopped_and_finish(out_dir, data_dir, clean, step=6, reason="SIGTERM")


def test_another_signal_than_the_first_changes_nothing(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    trainer = warm.start(out_dir, data_dir, *SAME, faults=SLOW_SAVE)
    held(out_dir)
    trainer.send(signal.SIGINT)
    trainer.send(signal.SIGTERM)
    go(out_dir)
    assert trainer.wait().returncode == 75
    check_stopped_and_finish(out_dir, data_dir, clean, step=6, reason="SIGTERM")


def test_a_second_interrupt_ends_at_once(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    trainer = warm.start(out_dir, data_dir, *SAME, "--checkpoint-every", "2", faults=SLOW_SAVE)
    held(out_dir)
    trainer.insist(signal.SIGINT)  # the first waits for the save, which does not end
    assert trainer.wait().returncode == -signal.SIGINT
    assert (status(out_dir)["state"], status(out_dir)["error"]) == ("failed", "a second SIGINT")
    assert saved_steps(out_dir, whole=True) == [2]
    warm.train(out_dir, data_dir, *SAME)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


def test_stopped_after_every_step_in_turn(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    for step in range(1, 12):
        warm.train(out_dir, data_dir, *SAME, faults={"stop_after": {"step": step}}, status=75)
        assert saved_steps(out_dir)[-1] == step
    warm.train(out_dir, data_dir, *SAME)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


def test_a_stop_file_from_before_the_start_is_no_reason(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    warm.train(tmp_path / "run", data_dir, *SAME)
    assert final_hashes(tmp_path / "run") == final_hashes(clean)


def test_what_waits_for_other_ranks_ends_at_a_signal(data_dir: Path, tmp_path: Path) -> None:
    """In PyTorch's own code, where Python's handlers do not run."""
    mark = tmp_path / "waiting"
    trainer = warm.start(tmp_path / "run", data_dir, faults={"unmet": {"mark": str(mark)}})
    wait_until(mark.exists)
    trainer.send(signal.SIGTERM)
    done = trainer.wait()
    assert done.returncode == 75
    assert done.stderr.endswith("stopped by SIGTERM before the first step: there is nothing to save\n")


def test_a_rank_that_waits_for_a_dead_one_leaves_before_it_is_killed(data_dir: Path, tmp_path: Path) -> None:
    """torchrun would kill it after 30 seconds, and nobody would know why."""
    out_dir = tmp_path / "run"
    running = warm.start_ranks(2, out_dir, data_dir, faults={"hold": {"where": "step", "step": 6, "rank": 1}})
    os.kill(held(out_dir), signal.SIGSTOP)
    os.kill(warm.ranks(running)[0].pid, signal.SIGTERM)
    start = time.monotonic()
    done = warm.finish(running)
    assert time.monotonic() - start < 25
    assert done.returncode == 1
    line = f"the run stands still: rank 1 on {socket.gethostname()} gives no sign of life; asked to stop, but no step"
    assert f"error: {line}" in done.stderr
    assert status(out_dir)["state"] == "failed"
    assert status(out_dir)["error"].startswith(line)
    assert faults(checkpoint(out_dir, 4)) == []
