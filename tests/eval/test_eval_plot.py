"""`python -m eval plot`: the picture holds what metrics.jsonl says, and nothing empty."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from running import metrics, python, run

from eval.history import LOSS, read_history, run_names
from eval.plot import Plot, draw
from eval.run_state import died
from gpt2_ddp.evaluation import reference

TITLES = ["Training loss", "Validation loss", "HellaSwag", "Learning rate", "Gradient norm", "Gradient noise", "Speed"]


def train_event(step: int, **values: Any) -> dict[str, Any]:
    loss = 3 + 8 * math.exp(-step / 20)
    event = {"event": "train", "step": step, "loss": loss, "lr": step * 1e-5, "grad_norm": 1 / step, "mfu": None}
    return event | {"tokens_per_sec": 2700.0 + step, "data_hash": "ab"} | values


def write_run(folder: Path, events: Sequence[dict[str, Any]], torn: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + torn)
    return folder


def full_run(folder: Path, steps: int = 40, protocol: str = "completion") -> Path:
    scores = {"event": "hellaswag", "step": steps, "acc": 0.26, "acc_norm": 0.275, "examples": 9, "protocol": protocol}
    events = [
        *map(train_event, range(1, steps + 1)),
        {"event": "val", "step": steps, "val_loss": 3.5, "tokens": 9},
        {"event": "noise_scale", "step": steps - 1, "tokens": None},
        {"event": "noise_scale", "step": steps, "tokens": 33000.0},
        scores,
    ]
    return write_run(folder, events)


def curves(axes: Any) -> list[tuple[list[float], list[float]]]:
    """The data of a panel's curves; the lines across at published numbers are left out."""
    lines = [line for line in axes.get_lines() if list(line.get_xdata()) != [0, 1]]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def test_each_panel_shows_its_metric_with_units(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "a")
    figure = draw([read_history(folder)], ["a"])
    panels = dict(zip(TITLES, figure.axes, strict=True))
    assert all(axes.get_title().startswith(title) for title, axes in panels.items())
    assert all(axes.get_ylabel() and axes.get_xlabel() == "step" for axes in figure.axes)
    train = metrics(folder)
    steps = list(range(1, 41))
    for title, key, scale in (
        ("Training loss", "loss", 1),
        ("Learning rate", "lr", 1000),
        ("Gradient norm", "grad_norm", 1),
        ("Speed", "tokens_per_sec", 0.001),
    ):
        assert curves(panels[title]) == [(steps, [pytest.approx(event[key] * scale) for event in train])]
    assert curves(panels["Validation loss"]) == [([40], [3.5])]
    assert curves(panels["Gradient noise"]) == [([40], [pytest.approx(33)])]
    assert curves(panels["HellaSwag"]) == [([40], [pytest.approx(27.5)])]


@pytest.mark.parametrize(("protocol", "gpt2"), [("completion", 29.55), ("harness", 31.14)])
def test_hellaswag_stands_between_the_published_lines(tmp_path: Path, protocol: str, gpt2: float) -> None:
    figure = draw([read_history(full_run(tmp_path / "a", protocol=protocol))], ["a"])
    axes = figure.axes[2]
    heights = [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]
    assert heights == [pytest.approx(25), pytest.approx(gpt2), pytest.approx(33.7)]
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["chance 25%", f"GPT-2 124M {gpt2}%", "GPT-3 Small (124M) 33.7%"]
    assert protocol in axes.get_title()


PUBLISHED = {
    "name": "a curve",
    "source": "a page",
    "data": ["tests"],
    "recipe": {"model": "gpt2", "sequence_length": 64, "total_batch_size": 256, "max_lr": 1e-3},
    "points": [[2560, 4.0, 0.25], [5120, 3.0, 0.26], [20480, 2.0, 0.3]],
}


def published_run(folder: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, source: str = "tests") -> Path:
    """A run of 40 steps on `source` that the published curve, of 80 steps, fits where that is "tests"."""
    file = folder.parent / "reference.json"
    file.write_text(json.dumps({"clearly_off": {"nats": 1, "from_tokens": 1}, "references": [PUBLISHED]}))
    monkeypatch.setattr(reference, "FILE", file)
    config = {"config": PUBLISHED["recipe"], "data_source": source}
    (full_run(folder, protocol=protocol) / "config.json").write_text(json.dumps(config))
    return folder


def grey(axes: Any) -> list[tuple[list[float], list[float]]]:
    lines = [line for line in axes.get_lines() if line.get_color() == "0.65"]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def test_the_published_curve_of_a_run_is_drawn_in_grey_as_far_as_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published_run(tmp_path / "a", monkeypatch, "completion")
    figure = draw([read_history(folder)], ["a"])
    panels = dict(zip(TITLES, figure.axes, strict=True))
    end = 40 * 1.02  # of the axes
    along = math.log(end * 256 / 5120) / math.log(4)
    assert grey(panels["Validation loss"]) == [([10, 20, end], pytest.approx([4, 3, 3 - along]))]
    assert grey(panels["HellaSwag"]) == [([10, 20, end], pytest.approx([25, 26, 26 + 4 * along]))]
    assert all(not grey(panels[title]) for title in TITLES if title not in ("Validation loss", "HellaSwag"))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "published: a curve"]


def test_what_is_published_of_other_runs_and_other_protocols_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = read_history(published_run(tmp_path / "harness", monkeypatch, "harness"))
    other = read_history(published_run(tmp_path / "other", monkeypatch, "completion", source="elsewhere"))
    figure = draw([harness, other], ["harness", "other"])
    assert [len(grey(axes)) for axes in figure.axes] == [0, 1, 0, 0, 0, 0, 0]
    figure = draw([other], ["other"])
    assert not any(grey(axes) for axes in figure.axes)
    assert not figure.legends
    (tmp_path / "harness" / "config.json").write_text('{"config": ')
    assert read_history(tmp_path / "harness").references == ()


def test_panels_without_a_value_are_left_out_and_runs_have_colours_and_names(tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", [train_event(1), train_event(2, loss=None, tokens_per_sec=math.nan)])
    long = write_run(tmp_path / "long", [train_event(step, grad_norm=None) for step in range(1, 7)])
    figure = draw([read_history(short), read_history(long)], run_names([short, long]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Training loss", "Learning rate", "Gradient norm before clipping", "Speed"]
    assert [len(steps) for steps, _ in curves(figure.axes[0])] == [1, 6]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["short", "long"]
    drawn = [line.get_color() for line in figure.axes[0].get_lines()]
    assert drawn == [line.get_color() for line in legend.get_lines()]
    assert len(set(drawn)) == 2


def test_many_points_get_a_median_that_an_outlier_does_not_bend(tmp_path: Path) -> None:
    events = [train_event(step, loss=100.0 if step == 300 else 3.0) for step in range(1, 601)]
    figure = draw([read_history(write_run(tmp_path / "a", events))], ["a"])
    (_, raw), (steps, median) = curves(figure.axes[0])
    assert steps == list(range(1, 601))
    assert max(raw) == 100
    assert set(median) == {3.0}


def test_a_torn_last_line_is_forgiven_and_a_torn_middle_is_not(tmp_path: Path) -> None:
    whole = [train_event(1), train_event(2)]
    folder = write_run(tmp_path / "a", whole, torn='{"event": "train", "step": 3, "lo')
    assert read_history(folder).curves[LOSS].steps == [1, 2]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(train_event(4)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not JSON"):
        read_history(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing to plot yet"),
        ('{"event": "start", "step": 0}\n', "nothing to plot yet"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"event": "train", "step": "two"}\n', "line 1: not an object with an event and a step"),
        ('{"event": "train", "step": -1, "loss": 2}\n', "line 1: not an object with an event and a step"),
        ("[" * 100_000 + "\n", "line 1: not JSON"),
        ('{"event": "train", "step": 1, "loss": 1e999}\n', "nothing to plot yet"),
    ],
)
def test_files_that_are_no_metrics_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Plot(runs=(tmp_path,), out=tmp_path / "x.png").run()
    assert not (tmp_path / "x.png").exists()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "x" / "gpt2").mkdir(parents=True)
    (tmp_path / "y" / "gpt2").mkdir(parents=True)
    paths = [tmp_path / "x" / "gpt2", tmp_path / "y" / "gpt2"]
    assert run_names(paths) == list(map(str, paths))


def test_the_command_draws_a_real_run_beside_another(tmp_path: Path, clean_run: Callable[..., Path]) -> None:
    real, other = clean_run("--val-every", "20", "--val-tokens", "640"), full_run(tmp_path / "other")
    out = tmp_path / "curves.png"
    done = run([*python(), "-m", "eval", "plot", str(real), str(other), "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    picture = matplotlib.image.imread(out)
    assert picture.shape[0] > 800
    assert picture.shape[1] > 1500
    colors = {tuple(color) for color in np.unique((picture[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # both runs' curves are in it


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "a")
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"  # as Python marks a module that cannot be imported
        "sys.argv[0] = 'eval'\nimport eval.__main__ as e\nfrom gpt2_ddp.system.cli import run\nrun(e.main)"
    )
    done = run([sys.executable, "-c", script, "plot", str(folder), "--out", str(tmp_path / "x.png")])
    assert done.returncode == 2
    assert done.stderr == "error: plots need matplotlib: pip install -e '.[plot]' in the checkout\n"


def test_a_run_whose_process_has_died_is_told(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() + 1))
    told = {"state": "running", "step": 0, "host": socket.gethostname(), "pid": process.pid, "time": now}
    (tmp_path / "status.json").write_text(json.dumps(told))
    assert died(tmp_path) is None
    process.communicate()
    assert "its process has died" in str(died(tmp_path))
    for other in ({"host": "elsewhere"}, {"state": "stopped"}, {"pid": None}):
        (tmp_path / "status.json").write_text(json.dumps(told | other))
        assert died(tmp_path) is None
    (tmp_path / "status.json").write_text(json.dumps(told | {"pid": os.getpid(), "time": "2000-01-01T00:00:00+0000"}))
    assert died(tmp_path) is not None  # the number is another process's now
    assert died(tmp_path / "absent") is None
