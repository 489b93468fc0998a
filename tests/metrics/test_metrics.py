"""What a run writes about itself (design section 6): the console line, metrics.jsonl, status.json, TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.metrics.log import (
    FileLog,
    NullLog,
    StepMetrics,
    cut_metrics,
    memory_mb,
)
from gpt2_ddp.periodic import save

TRAIN_FIELDS = [
    "event", "step", "loss", "lr", "grad_norm", "step_ms", "data_wait_ms", "tokens_per_sec", "mfu", "tokens_seen",
    "data_hash", "memory_mb", "skipped",
]  # fmt: skip


def step_metrics(step: int = 18, **changed: object) -> StepMetrics:
    values = {
        "step": step, "loss": 8.8689594, "lr": 1.59440559e-05, "grad_norm": 3.53431, "step_ms": 11944.7608,
        "data_wait_ms": 0.05, "tokens_per_sec": 2743.296, "mfu": None, "tokens_seen": 589824, "data_hash": "ab",
        "memory_mb": 512.5, "skipped": 0,
    }  # fmt: skip
    return StepMetrics(**(values | changed))


def lines(out_dir: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (out_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_the_console_line_is_the_designs_to_the_letter() -> None:
    expected = "step 18 | loss: 8.868959 | lr 1.5944e-05 | norm: 3.5343 | dt: 11944.76ms | tok/sec: 2743.30"
    assert step_metrics().console_line() == expected


def test_events_go_to_metrics_jsonl_as_they_happen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FileLog(tmp_path, resumed_step=0)
    log.event("start", step=0, world_size=2)
    log.train(step_metrics(1))
    assert [entry["event"] for entry in lines(tmp_path)] == ["start", "train"]  # before the log is closed
    log.event("val", step=1, val_loss=3.25, tokens=4096)
    log.close()
    start, train, val = lines(tmp_path)
    assert start == {"event": "start", "step": 0, "world_size": 2}
    assert list(train) == TRAIN_FIELDS
    assert train["mfu"] is None
    assert train["loss"] == 8.8689594
    assert val == {"event": "val", "step": 1, "val_loss": 3.25, "tokens": 4096}
    assert capsys.readouterr().out == step_metrics(1).console_line() + "\n"


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    log = FileLog(tmp_path, resumed_step=0)
    log.train(step_metrics(1, loss=math.nan, grad_norm=math.inf))
    log.event("val", step=1, val_loss=-math.inf, sources=[{"data_dir": "a", "val_loss": math.nan}])
    log.close()
    train, val = lines(tmp_path)
    assert val["sources"] == [{"data_dir": "a", "val_loss": None}]
    assert (train["loss"], train["grad_norm"], val["val_loss"]) == (None, None, None)


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    log = FileLog(tmp_path, resumed_step=0)
    log.event("start", step=0)
    for step in range(1, 9):
        log.train(step_metrics(step))
        if step % 4 == 0:
            log.event("val", step=step, val_loss=1.0)
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "train", "step": 9, "lo')  # what a killed process leaves
    log = FileLog(tmp_path, resumed_step=5)
    log.event("start", step=5)
    for step in range(6, 11):
        log.train(step_metrics(step))
    log.close()
    found = [(entry["event"], entry["step"]) for entry in lines(tmp_path)]
    expected = [("start", 0), *(("train", step) for step in range(1, 5)), ("val", 4), ("train", 5), ("start", 5)]
    assert found == [*expected, *(("train", step) for step in range(6, 11))]


def test_the_log_is_on_the_disk_before_a_checkpoint_that_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(plan=BatchPlan(micro_batch_size=1, sequence_length=8, total_batch_size=8))
    save(run)
    calls = [name for name, *_ in run.mock_calls]
    assert calls.index("log.flush") < calls.index("writer.save")
    log, flushed = FileLog(tmp_path, resumed_step=0), list[int]()
    monkeypatch.setattr(os, "fsync", flushed.append)
    log.flush()
    assert os.path.samestat(os.fstat(flushed[0]), (tmp_path / "metrics.jsonl").stat())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EINVAL, "not supported")))
    log.flush()
    log.close()


def test_going_back_takes_no_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do lines come later that waited in memory and are no more."""
    log = FileLog(tmp_path, resumed_step=0)
    for step in range(1, 5):
        log.event("train", step=step)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gpt2_ddp.metrics.log.replace_file", full)
        patch.setattr(log, "_write", lambda: None)
        log.event("train", step=5)
        log.cut(3)
        log.event("spike", step=3)
    log.event("train", step=4)
    log.close()
    assert [(entry["event"], entry["step"]) for entry in lines(tmp_path)] == [
        *(("train", step) for step in (1, 2, 3)),
        ("spike", 3),
        ("train", 4),
    ]


@pytest.mark.parametrize(
    "torn", [b'{"event": "train", "st', b"\xff\xfe\x00", b"[1, 2]\n", b"null\n", b'{"a": 1}\n', b"\n"]
)
def test_lines_that_are_none_are_dropped(tmp_path: Path, torn: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"event": "train", "step": 3}\n'
    path.write_bytes(good + torn)
    cut_metrics(path, 3)
    assert path.read_bytes() == good
    path.write_bytes(good + torn)
    with monkeypatch.context() as patch:  # a file system that cannot make a file shorter
        patch.setattr(os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
        cut_metrics(path, 3)
    assert path.read_bytes() == good
    cut_metrics(path, 2)
    assert path.read_bytes() == b""
    cut_metrics(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    log = FileLog(tmp_path, resumed_step=0)
    log.status("running", step=0)
    with open(tmp_path / "status.json") as reader:  # keeps the old file: it is replaced, not written over
        log.status("failed", step=7, error="RuntimeError: x")
        assert json.load(reader)["state"] == "running"
    log.close()
    written = json.loads((tmp_path / "status.json").read_text())
    assert abs(time.time() - datetime.strptime(written.pop("time"), "%Y-%m-%dT%H:%M:%S%z").timestamp()) < 60
    assert written == {
        "state": "failed",
        "step": 7,
        "error": "RuntimeError: x",
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "status.json"]


def test_the_other_ranks_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = NullLog()
    log.say("x")
    log.event("val", step=1, val_loss=1.0)
    log.train(step_metrics())
    log.status("running", step=1)
    log.close()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_memory_is_in_mebibytes() -> None:
    assert memory_mb(3 << 20) == 3.0
    assert memory_mb(None) == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = FileLog(tmp_path, resumed_step=0)
    log.event("val", step=1, val_loss=1.0)
    free, log._file = log._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    log.event("val", step=2, val_loss=2.0)
    assert "No space left on device" in capsys.readouterr().err
    log._file.close()
    log._file = free
    log.event("val", step=3, val_loss=3.0)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
