"""TensorBoard and W&B show a run's numbers, and are never worth the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from drivers import warm
from running import ROOT, environment, metrics, python, status, wait_until
from test_metrics import step_metrics

from gpt2_ddp.metrics import boards
from gpt2_ddp.metrics.boards import Aside, TensorBoard, WeightsAndBiases
from gpt2_ddp.metrics.log import FileLog


def tensorboard(out_dir: Path, *, resumed_step: int) -> Aside:
    return Aside("--tensorboard", lambda: TensorBoard(out_dir, resumed_step=resumed_step), "")


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = FileLog(tmp_path, resumed_step=0, boards=[tensorboard(tmp_path, resumed_step=0)])
    for step in (1, 2, 3):
        log.train(step_metrics(step, loss=10.0 - step))
        log.event("val", step=step, val_loss=20.0 - step)
    log.close()
    log = FileLog(tmp_path, resumed_step=2, boards=[tensorboard(tmp_path, resumed_step=2)])
    log.train(step_metrics(3, loss=0.5))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/val_loss")] == [(1, 19.0), (2, 18.0)]
    assert "train/grad_norm" in events.Tags()["scalars"]


def test_weights_and_biases_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = FileLog(tmp_path, resumed_step=0, boards=[Aside("--wandb", lambda: WeightsAndBiases(tmp_path), "")])
    log.train(step_metrics(1, loss=9.5))
    wait_until(lambda: "train/loss" in wandb.run.summary.keys())  # noqa: SIM118  a summary of wandb's own kind
    assert wandb.run.summary["train/loss"] == 9.5
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class Failing:
    """A board that can be told to fail, or to wait for ever."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.waits = threading.Event()

    def add(self, _: str, step: int, values: Mapping[str, float]) -> None:
        if step == 3 and "hangs" in values:
            self.waits.wait()
        if step == 3:
            raise ConnectionResetError("the service is gone")
        self.seen.append(step)

    def close(self) -> None:
        raise AssertionError("it has failed, and is asked for nothing more")


def test_a_board_that_fails_later_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = Failing()
    log = FileLog(tmp_path, resumed_step=0, boards=[Aside("--wandb", lambda: board, "")])
    for step in range(1, 6):
        log.train(step_metrics(step))
    log.close()
    assert board.seen == [1, 2]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --wandb: ConnectionResetError: the service is gone; the run goes on without it")
    assert len(metrics(tmp_path)) == 5


def test_a_board_that_does_not_answer_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(boards, "QUEUE_LENGTH", 4)
    board = Failing()
    aside = Aside("--wandb", lambda: board, "")
    for step in (1, 2, 3):
        aside.add("train", step, {"hangs": 1.0})
    wait_until(lambda: board.seen == [1, 2])
    for step in range(4, 20):
        aside.add("train", step, {"hangs": 1.0})
    aside.close()
    assert capsys.readouterr().err.count("--wandb: does not answer; the run goes on without it") == 1
    assert board.seen == [1, 2]
    board.waits.set()


def test_wandb_without_a_key_is_refused_at_the_start(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    nobody = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None, "NETRC": str(tmp_path / "none")}
    done = warm.train(tmp_path / "run", data_dir, "--wandb", faults={"variables": nobody}, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --wandb: No API key configured")
    assert "set WANDB_API_KEY" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_board_that_cannot_write_is_refused_at_the_start(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    done = warm.train(tmp_path / "run", data_dir, "--tensorboard", status=2)
    assert done.stderr.startswith("error: --tensorboard: ")
    assert len(done.stderr.splitlines()) == 1


def test_wandb_that_stops_answering_costs_nothing(data_dir: Path, tmp_path: Path) -> None:
    """A real one whose own process stands still. At the interpreter's end, wandb would wait for it for ever."""
    pytest.importorskip("wandb")
    pids = tmp_path / "pids"
    stopped = {"send_to_wandb": {"step": 6, "number": int(signal.SIGSTOP), "listing": str(pids)}}
    command = [*python(), str(warm.DRIVER), *warm.flags(tmp_path / "run", data_dir, "--wandb")]
    variables = environment({"FAULTS": json.dumps(stopped), "WANDB_MODE": "offline"})
    variables.pop("WANDB_SERVICE", None)  # a test in this process may have left its own, which would be used
    try:
        with open(tmp_path / "said", "w") as said:  # a pipe would stay open in wandb's process
            done = subprocess.run(command, env=variables, cwd=ROOT, stdout=said, stderr=said, timeout=120, check=False)
    finally:
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert done.returncode == 0, text
    assert text.count("warning: --wandb: does not answer") == 1
    assert "Traceback" not in text
    assert (status(tmp_path / "run")["state"], len(metrics(tmp_path / "run"))) == ("finished", 12)
