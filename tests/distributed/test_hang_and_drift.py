"""Ranks that hang or drift apart are named and end the run, before they can spoil a checkpoint."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psutil
from drivers import warm
from running import checkpoint, final_hashes, status, wait_until, write_shards

from gpt2_ddp.checkpoint.files import faults


def test_a_rank_that_hangs_is_named_and_the_run_restarts(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    """Rank 0, at that: the one that writes."""
    out_dir, stopped_rank = tmp_path / "run", 0
    running = warm.start_ranks(
        2,
        out_dir,
        data_dir,
        "--timeout",
        "4",
        faults={"hold": {"where": "step", "step": 6, "rank": stopped_rank}},
        torchrun=["--max-restarts=1"],
    )
    wait_until(lambda: (out_dir / "held").exists() and (out_dir / "held").read_text())
    hung = psutil.Process(int((out_dir / "held").read_text()))
    hung.send_signal(signal.SIGSTOP)
    done = warm.finish(running)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    named = f"rank {stopped_rank} on {socket.gethostname()} gives no sign of life"
    assert line == f"error: the run stands still: {named}"
    assert not hung.is_running()
    assert final_hashes(out_dir) == final_hashes(warm.clean_run(shared_folder, data_dir, nproc=2))


def test_a_rank_that_others_wait_for_is_named(data_dir: Path, tmp_path: Path) -> None:
    """It lives, and does not get on."""
    held = {"hold": {"where": "step", "step": 6, "rank": 1}}
    done = warm.fork_ranks(2, tmp_path / "run", data_dir, "--timeout", "4", faults=held, status=1)
    line = f"the run stands still: rank 1 on {socket.gethostname()} holds up the others"
    assert f"error: {line}\n" in done.stderr
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["error"]) == ("failed", line)
    assert faults(checkpoint(tmp_path / "run", 4)) == []


def test_one_flipped_bit_is_found_before_the_next_save(data_dir: Path, tmp_path: Path) -> None:
    """Of a moment, while the weights stand still."""
    name = "h.1.mlp.c_fc.weight.exp_avg_sq"
    flipped = {"flip_bit": {"step": 6, "rank": 2, "tensor": name}}
    done = warm.fork_ranks(4, tmp_path / "run", data_dir, "--max-lr", "0", faults=flipped, status=1)
    assert f"the ranks no longer hold the same weights; out of line: rank 2 in {name}" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert status(tmp_path / "run")["state"] == "failed"


def test_two_ranks_that_differ_are_both_named(data_dir: Path, tmp_path: Path) -> None:
    """Two cannot outvote each other. A check more often than the saves."""
    name = "wte.weight"
    flipped = {"flip_bit": {"step": 6, "rank": 0, "tensor": name}}
    flags = ("--check-ranks-every", "1")
    done = warm.fork_ranks(2, tmp_path / "run", data_dir, *flags, faults=flipped, status=1)
    assert f"out of line: rank 0 in {name}, rank 1 in {name}" in done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("step 7 |")]


def test_other_data_on_one_rank_is_refused_at_the_start(data_dir: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", seed=1)
    exit_file = tmp_path / "status"
    faults = {"other_data": {"rank": 1, "data_dir": str(other)}, "elsewhere": {"rank": 1}}
    told = {"GPT2_DDP_EXIT_FILE": str(exit_file)}
    done = warm.fork_ranks(2, tmp_path / "run", data_dir, faults=faults, status=2, env=told)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the training data of rank 1 on elsewhere differs from that of rank 0" in line
    assert exit_file.read_text() == "2"
    assert not (tmp_path / "run").exists()
