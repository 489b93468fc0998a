"""Killed anywhere, by SIGKILL, a run goes on to the weights of one that nothing disturbed.

The long form, `-m slow`, trains on after a death at every single file operation of a save; the suite does so for some,
and looks for all of them that a save can always be told from a torn one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from drivers import warm
from running import environment, final_hashes, metrics, run, wait_until

KEEP_ONE = ("--keep-checkpoints", "1")


def same_as(clean: Path, out_dir: Path) -> bool:
    """Whether a run has the weights, the moments and the data of `clean`, and each step of it once."""
    hashes = [(entry["step"], entry["data_hash"]) for entry in metrics(out_dir)]
    assert hashes == [(entry["step"], entry["data_hash"]) for entry in metrics(clean)]
    return final_hashes(out_dir) == final_hashes(clean)


@pytest.fixture(scope="module")
def clean(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir)


@pytest.fixture(scope="module")
def operations(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the save of step 8 does with files, pruning included, in order."""
    folder = tmp_path_factory.mktemp("operations")
    listing = {"kill_in_save": {"step": 8, "operation": 0, "listing": str(folder / "list")}}
    warm.train(folder / "run", data_dir, *KEEP_ONE, faults=listing)
    return (folder / "list").read_text().splitlines()


def test_a_forked_trainer_is_the_real_one(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(warm.DRIVER), *warm.flags(tmp_path / "run", data_dir)]
    assert run(command).returncode == 0
    assert same_as(clean, tmp_path / "run")


def test_a_save_killed_at_every_operation_leaves_a_good_checkpoint(clean: Path) -> None:
    command = [sys.executable, str(Path(warm.DRIVER).with_name("kill_every.py"))]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of fsyncs
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = run([*command, str(clean / "checkpoints" / "step_00000008"), f"{folder}/checkpoints"])
    assert done.returncode == 0, done.stderr
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    renamed = [death["operation"] for death in deaths].index("rename step_00000008.tmp")
    assert [death["found"] for death in deaths] == [
        *["step_00000004"] * (renamed + 1),
        *["step_00000008"] * (len(deaths) - renamed - 1),
    ]
    assert all(death["same"] and death["said"] == [] for death in deaths)
    assert {tuple(death["left"]) for death in deaths} == {("step_00000012",)}
    flushed = [name for death in deaths[:renamed] for kind, name in [death["operation"].split()] if kind == "fsync"]
    assert flushed == [*sorted(path.name for path in (clean / "checkpoints" / "step_00000008").iterdir()
                               if path.name != "manifest.json"), "manifest.json", "step_00000008.tmp"]  # fmt: skip
    assert "fsync checkpoints" in [death["operation"] for death in deaths[renamed + 1 :][:3]]
    kinds = {death["operation"].split()[0] for death in deaths}
    assert kinds == {"open", "write", "flush", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"}


def go_on_after_death_at(operation: int, clean: Path, data_dir: Path, out_dir: Path) -> None:
    killed = {"kill_in_save": {"step": 8, "operation": operation}}
    warm.train(out_dir, data_dir, *KEEP_ONE, faults=killed, status=-signal.SIGKILL)
    warm.train(out_dir, data_dir, *KEEP_ONE)
    assert same_as(clean, out_dir), f"after death at operation {operation}"
    assert [path.name for path in (out_dir / "checkpoints").iterdir()] == ["step_00000012"]
    shutil.rmtree(out_dir)


def test_a_run_killed_in_a_save_goes_on_to_the_same_weights(
    clean: Path, data_dir: Path, operations: list[str], tmp_path: Path
) -> None:
    first_of_kind = [next(group)[0] for _, group in itertools.groupby(enumerate(operations, 1), lambda pair: pair[1])]
    late = [number for number in first_of_kind if number >= operations.index("open manifest.json")]
    for number in sorted({*random.Random(0).sample(first_of_kind, 6), *late[::3]}):
        go_on_after_death_at(number, clean, data_dir, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_at_each_operation_of_a_save_goes_on_to_the_same_weights(
    clean: Path, data_dir: Path, operations: list[str], tmp_path: Path
) -> None:
    for number in range(1, len(operations) + 1):
        go_on_after_death_at(number, clean, data_dir, tmp_path / "run")


def test_killed_in_every_step_a_run_goes_on_to_the_same_weights(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    every_step = {"kill": {"steps": list(range(1, 13))}}
    for _ in range(12):
        warm.train(tmp_path / "run", data_dir, faults=every_step, status=-signal.SIGKILL)
    warm.train(tmp_path / "run", data_dir, faults=every_step)
    assert same_as(clean, tmp_path / "run")


def test_torchrun_restarts_after_the_death_of_a_worker(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    faults = {"kill": {"steps": [10], "rank": 1}}
    running = warm.start_ranks(2, tmp_path / "run", data_dir, faults=faults, torchrun=["--max-restarts=3"])
    done = warm.finish(running)
    assert done.returncode == 0, done.stderr
    assert same_as(warm.clean_run(shared_folder, data_dir, nproc=2), tmp_path / "run")
    starts = [entry["step"] for entry in metrics(tmp_path / "run", "start")]
    assert len(starts) == 2
    assert starts[1] in (4, 8)  # the save of step 8 may still have been on its way


def workers(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(agent.pid).children(recursive=True)


def test_ranks_end_with_their_torchrun_and_the_next_start_goes_on(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    faults = {"hold": {"where": "step", "step": 6, "rank": 0}}
    running = warm.start_ranks(2, tmp_path / "run", data_dir, faults=faults)
    wait_until((tmp_path / "run" / "held").exists)
    orphans = workers(running)
    assert len(orphans) >= 2
    running.kill()
    wait_until(lambda: not any(orphan.is_running() for orphan in orphans))
    assert "torchrun has died" in warm.finish(running).stderr
    warm.fork_ranks(2, tmp_path / "run", data_dir)
    assert same_as(warm.clean_run(shared_folder, data_dir, nproc=2), tmp_path / "run")


def test_a_second_trainer_in_the_same_directory_is_refused(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    first = warm.start(tmp_path / "run", data_dir, faults={"hold": {"where": "step", "step": 6}})
    wait_until((tmp_path / "run" / "held").exists)
    command = [sys.executable, str(warm.DRIVER), *warm.flags(tmp_path / "run", data_dir)]
    second = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2
    assert second.stderr.startswith("error: ")
    assert "in use by another trainer" in second.stderr
    (tmp_path / "run" / "go").touch()
    assert first.wait().returncode == 0
    assert same_as(clean, tmp_path / "run")
