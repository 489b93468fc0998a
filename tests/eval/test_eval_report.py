"""`python -m eval report`: the page holds what a run's files say, whole and safe, whatever they say."""

from __future__ import annotations

import base64
import gzip
import json
import re
import time
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import python, run
from test_eval_plot import full_run, train_event, write_run

from eval.curves import thinned
from eval.report.command import Report
from eval.report.record import MOST_MARKS, Mark, merged, read_record
from gpt2_ddp.config import TrainConfig

START = {"time": "2026-11-20T10:00:00+0000", "step": 0, "argv": ["gpt2_ddp.train", "--seed=3"], "host": "node7"}
START |= {"world_size": 2, "device_name": "a card", "dtype": "torch.float32", "python": "3.11", "torch": "2.13.0"}
EVENTS = [
    {"event": "start", "step": 0, "world_size": 2, "dtype": "torch.float32"},
    *(train_event(step, memory_mb=2048.0, skipped=int(step >= 5), mfu=0.4) for step in range(1, 21)),
    {"event": "val", "step": 10, "val_loss": 4.25, "bits_per_byte": 1.5, "tokens": 9},
    {"event": "sample", "step": 10, "text": "Language is young"},
    {"event": "stop", "step": 10, "reason": "SIGUSR1"},
    {"event": "spike", "step": 10, "spike_step": 14, "loss": 99.5, "passed_over": 4},
    {"event": "checkpoint", "step": 10, "seconds": 0.5, "blocked_seconds": 0.1, "bytes": 1_234_000},
    {"event": "sample", "step": 20, "text": "Language is old & <wise>"},
    {"event": "hellaswag", "step": 20, "acc": 0.26, "acc_norm": 0.275, "examples": 9, "protocol": "completion"},
]


def written(folder: Path, events: Sequence[dict[str, Any]] = EVENTS, torn: str = "", **flags: Any) -> Path:
    """A run directory with a configuration, two starts and a status."""
    write_run(folder, events, torn)
    config = TrainConfig(**{"max_steps": 20, "out_dir": folder} | flags).to_json()
    starts = [START, START | {"step": 10, "world_size": 4, "host": "node8"}]
    (folder / "config.json").write_text(json.dumps({"config": config, "data_source": "tests", "starts": starts}))
    (folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 20}))
    return folder


def page(tmp_path: Path, *runs: Path) -> str:
    Report(runs=runs, out=tmp_path / "page.html").run()
    return (tmp_path / "page.html").read_text()


def words(html: str) -> str:
    """What of a page is to be read: without the scripts and the tags."""
    return unescape(" ".join(re.sub(r"<(script|style)>.*?</\1>|<[^>]*>", " ", html, flags=re.S).split()))


def models(html: str) -> list[dict[str, Any]]:
    """bokeh's models in a page, from the script that draws them."""
    [told] = re.findall(r"const docs_json = '(.*?)';", html)
    found: list[dict[str, Any]] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("type") == "object":
                found.append(value)
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                visit(each)

    visit(json.loads(unescape(told.replace("\\\\", "\\"))))
    return found


def columns(html: str) -> list[dict[str, list[Any]]]:
    """The data of all that is drawn."""
    sources = [each for each in models(html) if each["name"] == "ColumnDataSource"]
    return [{name: _numbers(column) for name, column in each["attributes"]["data"]["entries"]} for each in sources]


def _numbers(column: Any) -> list[Any]:
    if isinstance(column, list):
        return column
    return np.frombuffer(gzip.decompress(base64.b64decode(column["array"]["data"])), dtype=column["dtype"]).tolist()


def titles(html: str) -> list[str]:
    return [each["attributes"]["text"] for each in models(html) if each["name"] == "Title" and each.get("attributes")]


def test_a_run_is_told_whole(tmp_path: Path) -> None:
    html = page(tmp_path, written(tmp_path / "one"))
    text = words(html)
    for told in (
        "stopped at step 20 of 20",
        "one, start 1 0 2026-11-20 10:00:00+0000 node7 2 x a card float32 python 3.11, torch 2.13.0",
        "one, start 2 10 2026-11-20 10:00:00+0000 node8 4 x a card",
        "gpt2_ddp.train --seed=3",
        "1 restart, 1 skipped update, 1 spike",
        "step 10, validation loss 4.250 Language is young step 20, validation loss 4.250 Language is old & <wise>",
        "step 10 1.23 MB 0.5 s deleted since",
        "validation loss 4.2500",
        "data_source tests",
    ):
        assert told in text
    assert titles(html) == [
        "Training loss",
        "Validation loss",
        "Validation, bits per byte",
        "HellaSwag acc_norm by completion",
        "Learning rate",
        "Gradient norm before clipping",
        "Speed",
        "Share of the hardware's peak (mfu)",
        "Memory of the first rank",
    ]
    drawn = columns(html)
    assert [4.25] in [each.get("value") for each in drawn]
    marks = {
        step: text for each in drawn if "text" in each for step, text in zip(each["step"], each["text"], strict=True)
    }
    assert marks[14] == "one: loss 99.5 at step 14 was a spike; back to step 10"
    assert marks[5] == "one: 1 skipped by step 5, not finite"
    restarts = [each["text"] for each in drawn if any("start 2" in text for text in each.get("text", ()))]
    assert restarts == [["one: start 2, from step 10 on 4 x a card; it had stopped: SIGUSR1"]]
    assert {each["attributes"]["text"] for each in models(html) if each["name"] == "Label"} == {
        "chance 25%",
        "GPT-2 124M 29.55%",
        "GPT-3 Small (124M) 33.7%",
    }


def test_the_kept_log_of_a_prolonged_run_is_not_told_the_state_of_the_new_one(tmp_path: Path) -> None:
    """Nor does a byte that is no UTF-8, in what a run was called, end the page."""
    run_dir = written(tmp_path / "run")
    record = read_record(0, "run", run_dir)
    assert (record.status["step"], len(record.starts)) == (20, 2)
    kept = (run_dir / "metrics.jsonl").rename(run_dir / "metrics.step_00000020.jsonl")
    (run_dir / "checkpoints" / "step_00000030").mkdir(parents=True)
    record = read_record(0, "odd \udcff", kept)
    assert (record.status, [each.step for each in record.checkpoints], len(record.starts)) == ({}, [10], 1)
    other = written(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["starts"][-1]["argv"] = ["gpt2_ddp.train", "--data-dir=\udcff"]
    (other / "config.json").write_text(json.dumps(config))
    assert "--data-dir=?" in words(page(tmp_path, kept, other))


def test_several_runs_lie_over_each_other_with_what_differs(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", max_lr=1e-3), written(tmp_path / "two", max_lr=2e-3)
    html = page(tmp_path, one, two)
    differs = words(html.partition("What differs")[2].partition("Curves")[0])
    assert differs == "one two max_lr 0.001 0.002"
    lines = [each["attributes"] for each in models(html) if each["name"] == "GlyphRenderer"]
    names = [each["name"] for each in lines if each.get("name")]
    assert names == ["one", "two"] * 9
    tags = [tuple(each["tags"]) for each in lines]
    assert {("run 0",), ("run 1",), ("run 1", "restart"), ("run 0", "spike"), ("run 0", "checkpoint")} <= set(tags)
    assert re.findall(r'<button[^>]*value="(run \d)"', html) == ["run 0", "run 1"]


def test_twenty_thousand_steps_are_a_small_page_soon_and_keep_a_spike_of_one_step(tmp_path: Path) -> None:
    events = [train_event(step, loss=3.0 + step % 7 / 100, memory_mb=99.0, mfu=0.4) for step in range(1, 20_001)]
    events[12_344]["loss"] = 77.0
    folder, before = write_run(tmp_path / "long", events), time.process_time()
    html = page(tmp_path, folder)
    assert time.process_time() - before < 5
    [library, *_] = sorted(re.findall(r"<script[^>]*>.*?</script>", html, flags=re.S), key=len, reverse=True)
    assert len(html) - len(library) < 3e6
    losses = columns(html)[0]
    assert losses["value"][losses["step"].index(12_345)] == 77
    assert max(losses["median"]) < 3.1
    assert all(len(each["step"]) <= 2000 for each in columns(html))
    assert (losses["step"][0], losses["step"][-1]) == (1, 20_000)


def test_thinning_keeps_the_extremes_of_each_stretch() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    kept = thinned(values.tolist(), 500)
    assert len(kept) <= 500
    assert kept == sorted(set(kept))
    for start in range(0, 5000 - 40, 20):
        stretch = range(start, start + 41)  # no stretch is longer, so there is one within it
        assert any(index in kept for index in stretch)
    assert {0, 4999, int(values.argmax()), int(values.argmin())} <= set(kept)
    assert thinned([1.0, 2.0], 500) == [0, 1]


def test_marks_too_close_together_are_one_that_says_so() -> None:
    marks = merged([Mark("skip", float(step), f"at {step}") for step in range(10_000, 0, -1)])
    assert len(marks) <= MOST_MARKS
    assert marks[0].text == "at 1, and 32 more until step 33"
    assert merged([Mark("skip", 0.0, "a"), Mark("skip", 0.0, "b")]) == [Mark("skip", 0.0, "a"), Mark("skip", 0.0, "b")]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([EVENTS[0]], "No step has been logged yet"),
        ([train_event(1)], "at step 1"),
        ([train_event(1, loss=None), train_event(2, loss=None)], "at step 0"),
        ([{"event": "val", "step": 0, "val_loss": 5.0}], "validation loss 5.0000"),
        (full_run, "at step 300"),
    ],
)
def test_a_run_that_has_little_still_makes_a_page(tmp_path: Path, events: Any, said: str) -> None:
    """Without a config.json, a status.json and checkpoints; and with a line that is being written."""
    run_dir = (
        events(tmp_path / "a", 300) if callable(events) else write_run(tmp_path / "a", events, torn='{"event": "tr')
    )
    assert said in words(page(tmp_path, run_dir))


WILD = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)>'


def test_what_a_run_says_is_text_and_never_a_part_of_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "a<b" / "$$x$$ <i>name"
    folder.parent.mkdir()
    events: list[dict[str, Any]] = [
        *EVENTS,
        {"event": "sample", "step": 20, "text": WILD},
        {"event": "sample", "step": 20, "text": {"not": ["text", WILD]}},
        {"event": "stop", "step": 10, "reason": WILD},
        {"event": "hellaswag", "step": 20, "acc_norm": "0.3", "protocol": [WILD]},
        {"event": "spike", "step": 3, "spike_step": WILD, "loss": 3},
        {"event": "checkpoint", "step": 12, "bytes": WILD, "seconds": None},
        {"event": WILD, "step": 1},
    ]
    written(folder, events)
    told = json.loads((folder / "config.json").read_text())
    told["config"] |= {"model": WILD, WILD: WILD, "max_steps": WILD}
    told["data_source"] = [WILD]
    told["starts"] += ["no start", {"step": 11, "host": WILD, "argv": [WILD], "world_size": {WILD: 1}, "dtype": [WILD]}]
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "status.json").write_text(json.dumps({"state": WILD, "step": [WILD]}))
    calm = page(tmp_path, written(tmp_path / "calm"))
    html = page(tmp_path, folder)
    for tag in ("<script", "</script", "<img", "<i>", "<b "):
        assert html.count(tag) == calm.count(tag)
    assert words(html).count('document.title = "taken"') >= 8


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no metrics at"),
        ({"metrics.jsonl": ""}, "has nothing to report yet"),
        ({"metrics.jsonl": "\0\x01\n"}, "line 1: not JSON"),
        ({"config.json": "{}"}, "no metrics at"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        page(tmp_path, tmp_path)
    assert not (tmp_path / "page.html").exists()
    assert capsys.readouterr().out == ""


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path: Path) -> None:
    """A run beside none, a folder that is not there, and no bokeh: one line each, and status 2."""
    folder, out = written(tmp_path / "one"), tmp_path / "page.html"
    script = (
        "import contextlib, sys\nimport eval.__main__ as e\nfrom gpt2_ddp.system.cli import run\nsys.argv[0] = 'eval'\n"
        f"for out, runs in (({str(out)!r}, ['one']), ('no/page.html', ['one']), ('x.html', ['one', 'two'])):\n"
        "    sys.argv[1:] = ['report', *runs, '--out', out]\n"
        "    try: run(e.main, prints_result=True)\n"
        "    except SystemExit as ended: print(ended.code)\n"
        "for name in [name for name in sys.modules if name.startswith('eval.report.figures')]: del sys.modules[name]\n"
        "sys.modules['bokeh'] = None\nsys.modules['bokeh.document'] = None\n"
        "sys.argv[1:] = ['report', 'one', '--out', 'x.html']\nrun(e.main)"
    )
    done = run([*python(), "-c", script], cwd=tmp_path)
    assert done.stdout == f"wrote {out}: open it in a browser\n0\n2\n2\n"
    assert done.stderr.splitlines() == [
        "error: no/page.html: No such file or directory",
        "error: no metrics at two: give a run directory, or its metrics.jsonl",
        "error: the page needs bokeh: pip install -e '.[report]' in the checkout",
    ]
    assert done.returncode == 2
    assert folder.name in out.read_text()
