"""What a run says of itself at its start, and how long it still takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from drivers import warm
from running import final_hashes, metrics
from test_metrics import lines, step_metrics

from gpt2_ddp.build.telling import counted, short
from gpt2_ddp.metrics.progress import ProgressLog, RemainingTime, duration

TINY_PARAMETERS = 512 * 16 + 64 * 16 + 2 * (2 * 32 + 16 * 48 + 48 + 16 * 16 + 16 + 2 * 16 * 64 + 64 + 16) + 32
WATCHED = ("--val-every=6", "--val-tokens=64", "--system-every=5")


def to_go(said: str) -> list[str]:
    return [line for line in said.splitlines() if " to go" in line]


def test_a_run_says_what_runs_where_and_how_long_it_takes(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    """By a clock on which a step takes 1 s, and a validation or a save 100; two ranks, stopped at step 8 of 12."""
    clock, out_dir = {"work_clock": {"step": 1.0, "beside": 100.0}}, tmp_path / "run"
    said = warm.fork_ranks(2, out_dir, data_dir, *WATCHED, faults={**clock, "stop_after": {"step": 8}}).stdout
    windows = 2999 // 8 + 1999 // 8
    [start] = [line for line in said.splitlines() if " parameters | " in line]
    assert said.startswith(start)
    assert re.sub(r"cpu [^|]+", "cpu NAME ", start) == (
        f"gpt2-tiny, {TINY_PARAMETERS / 1000:.1f}K parameters | {data_dir}, {windows * 8 / 1000:.2f}K tokens | "
        f"12 steps of 64 tokens, {12 * 8 / windows:.3f} epochs | 2 ranks, cpu NAME | float32 | not compiled | "
        "2 micro-steps of 2 x 8 tokens"
    )
    assert to_go(said) == ["step 4 | about 8 s to go, not counting val", "step 6 | about 1 min 46 s to go"]
    assert [(told["step"], told["seconds"]) for told in metrics(out_dir, "remaining")] == [(4, 8.0), (6, 106.0)]

    said = warm.train(out_dir, data_dir, *WATCHED, "--max-steps=16", faults=clock).stdout  # now on one rank
    [start] = [line for line in said.splitlines() if " parameters | " in line]
    assert f"| steps 9 to 16 of 64 tokens, {16 * 8 / windows:.3f} epochs in all | 1 rank, " in start
    assert start.endswith(" | 4 micro-steps of 2 x 8 tokens")
    assert to_go(said) == ["step 12 | about 4 s to go, not counting val", "step 12 | about 1 min 44 s to go"]
    read = metrics(out_dir, "system")
    assert [reading["step"] for reading in read] == [5, 10, 15, 16]
    assert {"cpu_percent", "memory_free_mb", "disk_percent"} <= read[0].keys()
    assert read[0]["disk_free_mb"] == pytest.approx(shutil.disk_usage(out_dir).free / 2**20, rel=0.1)
    assert not any(name.startswith("gpu") for name in read[0])
    assert [(told["step"], told["seconds"]) for told in metrics(out_dir, "val")] == [
        (step, pytest.approx(100, abs=0.01)) for step in (6, 12, 16)
    ]
    assert final_hashes(out_dir, 8) == final_hashes(warm.clean_run(shared_folder, data_dir, nproc=2), 8)


def test_why_the_format_is_what_it_is_stands_in_the_one_line(data_dir: Path, tmp_path: Path) -> None:
    faults = {"matmuls": {"float32": [4e11], "bfloat16": [1e11]}}
    said = warm.train(tmp_path, data_dir, "--dtype=auto", "--max-steps=1", faults=faults).stdout.splitlines()
    assert " | float32 by measurement: 0.4 TFLOP/s against 0.1 in bfloat16 | not compiled | " in said[0]
    assert [line for line in said if "float32" in line] == said[:1]
    assert " parameters" not in warm.train(tmp_path, data_dir, "--dtype=auto", "--max-steps=1").stdout


def test_the_first_step_and_a_sleep_and_what_is_beside_steps_do_not_distort(tmp_path: Path) -> None:
    """Steps of 2 s, the first of which compiles for a minute, and another of which the machine sleeps for an hour."""
    remaining = RemainingTime(1000, {"val": 100, "hellaswag": 0, "checkpoint": 300})
    log = ProgressLog(tmp_path, resumed_step=0, boards=[], remaining=remaining)
    for step in range(1, 101):
        log.train(step_metrics(step, step_ms={1: 60_000, 50: 3_600_000}.get(step, 2000)))
        if step == 90:
            log.event("checkpoint", step=step, seconds=50.0, blocked_seconds=3.0, bytes=1)
    log.event("val", step=100, val_loss=3.0, tokens=64, seconds=30.0)
    log.close()
    told = [line for line in lines(tmp_path) if line["event"] == "remaining"]
    assert [line["step"] for line in told] == [4, 100]
    assert told[0]["seconds"] == 996 * 2
    slept = 900 * (98 * 2 + 10) / 99  # an hour counts as five steps
    saved = 4 * 3  # at 300, 600, 900 and 1000, and only what training waited for
    assert told[1]["seconds"] == pytest.approx(slept + 9 * 30 + saved, abs=0.1)


@pytest.mark.parametrize(("log_every", "told"), [(1, 4), (2, 6), (10, 20), (250, 500)])
def test_it_is_told_after_the_first_steps(log_every: int, told: int) -> None:
    remaining = RemainingTime(1000, {})
    logged = range(1, 1001) if log_every == 1 else range(log_every, 1001, log_every)
    suffices = []
    for step in logged:
        remaining.note_step(step, 1.0)
        suffices += [step] if remaining.suffices(step) else []
    assert suffices[0] == told
    assert remaining.seconds(400) == 600.0


def test_nothing_is_told_before_there_is_something_to_reckon_with() -> None:
    remaining = RemainingTime(10, {"val": 3})
    remaining.note_step(1, 60.0)
    assert remaining.seconds(1) is None
    remaining.note_step(2, 1.0)
    assert (remaining.seconds(2), remaining.unknown(2)) == (8.0, ["val"])
    remaining.note("val", 5.0)
    assert (remaining.seconds(3), remaining.unknown(3)) == (7 + 3 * 5, [])  # after 6, 9 and the last
    assert remaining.seconds(9) == 1 + 5
    assert remaining.seconds(10) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7800, "2 h 10 min"), (86400 * 3 + 4 * 3600, "3 d 4 h")],
)
def test_durations_are_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_are_short() -> None:
    assert [short(n) for n in (640, 15808, 999_900, 124_475_904, 1_557_686_400)] == [
        "640", "15.8K", "1M", "124M", "1.56B"
    ]  # fmt: skip
    assert (counted(1, "step"), counted(19073, "step")) == ("1 step", "19,073 steps")
