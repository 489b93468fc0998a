"""TensorBoard and W&B show a run's numbers, and are never worth the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from drivers import warm
from running import ROOT, environment, metrics, python, status, wait_until
from test_metrics import step_metrics

from gpt2_ddp.metrics import boards
from gpt2_ddp.metrics.boards import Aside, TensorBoard, WeightsAndBiases, kept_identity
from gpt2_ddp.metrics.log import FileLog

CONFIG = {"model": "gpt2", "max_steps": 3, "data_dir": "data/demo"}
TEXT = "Once\n<b>there</b> was | no *star*"


def tensorboard(out_dir: Path, *, resumed_step: int) -> Aside:
    return Aside("--tensorboard", lambda: TensorBoard(out_dir, resumed_step=resumed_step, config=CONFIG), "")


def shown_texts(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Step and text by tag, by the reader that TensorBoard's pages have, which purges texts too."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, b"".join(event.tensor_proto.string_val).decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if tag.endswith("text_summary")
    }


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = FileLog(tmp_path, resumed_step=0, boards=[tensorboard(tmp_path, resumed_step=0)])
    for step in (1, 2, 3):
        log.train(step_metrics(step, loss=10.0 - step))
        sources = [{"data_dir": "data/a", "val_loss": 3.0 + step}]
        log.event("val", step=step, val_loss=20.0 - step, sources=sources)
    log.event("sample", step=3, text="of the step that is made again")
    log.close()
    log = FileLog(tmp_path, resumed_step=2, boards=[tensorboard(tmp_path, resumed_step=2)])
    log.train(step_metrics(3, loss=0.5))
    log.event("sample", step=3, text=TEXT)
    log.status("stopped", step=3, reason="SIGTERM")
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/val_loss")] == [(1, 19.0), (2, 18.0)]
    assert [event.value for event in events.Scalars("val/data/a/val_loss")] == [4.0, 5.0]
    assert "train/grad_norm" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["scalars"] if "data_hash" in tag]
    texts = shown_texts(tmp_path / "tensorboard")
    assert texts["sample/text_summary"] == [(3, "    " + TEXT.replace("\n", "\n    "))]  # as code, no Markdown in it
    assert texts["status/text_summary"] == [(3, '    stopped at step 3\n    {"reason": "SIGTERM"}')]
    assert [step for step, _ in texts["config/text_summary"]] == [0, 2]
    assert json.loads(texts["config/text_summary"][-1][1]) == CONFIG


def test_tensorboard_forgets_the_steps_that_a_spike_took_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = FileLog(tmp_path, resumed_step=0, boards=[tensorboard(tmp_path, resumed_step=0)])
    for step in (1, 2, 3):
        log.train(step_metrics(step, loss=10.0 - step))
    log.cut(1)
    log.train(step_metrics(2, loss=0.5))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 0.5)]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind seven bytes, each record a message of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""
        place += 7 + length
        if (1 << 15) - place % (1 << 15) < 7:  # no part begins so near to the end of a block
            place += (1 << 15) - place % (1 << 15)


def told_wandb(folder: Path) -> dict[str, Any]:
    """What a start told W&B offline: its run, configuration, rows, summary, exit status and tables."""
    [file] = folder.glob("*.wandb")
    told: dict[str, Any] = {"config": {}, "rows": [], "summary": {}}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told |= {"id": record.run.run_id, "name": record.run.display_name}
            told["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            told["rows"].append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif kind == "summary":
            items = record.summary.update
            told["summary"] |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        elif kind == "exit":
            told["exit"] = record.exit.exit_code
    told["tables"] = [json.loads(table.read_text())["data"] for table in folder.glob("files/media/table/sample/*")]
    return told


def test_weights_and_biases_shows_a_run_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of a run, the second in a directory that was moved, with more steps, and it fails."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(boards, "CLOSING_SECONDS", 200.0)  # its own process may be slow to start on a busy machine
    (tmp_path / "run").mkdir()
    for out_dir, resumed, steps, state in ((tmp_path / "run", 0, 3, "stopped"), (tmp_path / "moved", 2, 6, "failed")):
        config = CONFIG | {"max_steps": steps}
        aside = Aside("--wandb", lambda out_dir=out_dir, config=config: WeightsAndBiases(out_dir, config=config), "")
        log = FileLog(out_dir, resumed_step=resumed, boards=[aside])
        log.status("running", step=resumed)
        for step in range(resumed + 1, steps + 1):
            log.train(step_metrics(step, loss=10.0 - step))
        log.event("sample", step=steps, text=TEXT)
        log.status(state, step=steps, **({"error": "it broke"} if state == "failed" else {}))
        log.close()
        if out_dir.name == "run":
            out_dir.rename(tmp_path / "moved")
    first, second = map(told_wandb, sorted((tmp_path / "moved").glob("wandb/offline-run-*")))
    assert first["id"] == second["id"] == (tmp_path / "moved" / "wandb_id").read_text().strip()
    for told, steps in ((first, 3), (second, 6)):
        assert {key: told["config"][key] for key in CONFIG} == CONFIG | {"max_steps": steps}
        assert told["tables"] == [[[steps, TEXT]]]
    losses = [
        [(row["step"], row["train/loss"]) for row in told["rows"] if "train/loss" in row] for told in (first, second)
    ]
    assert losses == [[(1, 9.0), (2, 8.0), (3, 7.0)], [(3, 7.0), (4, 6.0), (5, 5.0), (6, 4.0)]]
    assert (first["summary"]["state"], first["summary"]["state_step"], first["exit"]) == ("stopped", 3, 0)
    assert (second["summary"]["state"], second["summary"]["state_step"], second["exit"]) == ("failed", 6, 1)
    assert second["summary"]["error"] == "it broke"


@pytest.mark.parametrize("broken", ["", "not an id / of W&B", "\x00"])
def test_a_broken_identity_is_replaced_and_then_kept(tmp_path: Path, broken: str) -> None:
    (tmp_path / "wandb_id").write_text(broken)
    identity = kept_identity(tmp_path / "wandb_id")
    assert identity.isalnum()
    assert kept_identity(tmp_path / "wandb_id") == identity != kept_identity(tmp_path / "other")


class Failing:
    """A board that can be told to fail, or to wait for ever."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.waits = threading.Event()

    def add(self, _: str, step: int, values: Mapping[str, Any]) -> None:
        if step == 3 and "hangs" in values:
            self.waits.wait()
        if step == 3:
            raise ConnectionResetError("the service is gone")
        self.seen.append(step)

    def stand(self, *_: Any) -> None: ...
    def cut(self, _: int) -> None: ...

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
