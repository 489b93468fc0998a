"""The page of `python -m eval report` in a real browser. Skips where chromium is not installed (apt-get install it)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from drivers.browser import Seen, chromium, look
from PIL import Image
from test_eval_plot import train_event
from test_eval_report import EVENTS, WILD, page, written

pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium: apt-get install chromium")

READY = """new Promise((done) => {
  const wait = () => {
    const figures = Bokeh.documents.flatMap((document) => document.roots());
    const drawn = figures.length && figures.every((figure) => Bokeh.index.get_one?.(figure)?.has_finished?.());
    drawn ? setTimeout(() => done(figures.map((figure) => figure.title.text)), 200) : setTimeout(wait, 100);
  };
  wait();
})"""
"""The titles of the figures, when all of them are drawn."""
ALONE = """({title: document.title, wide: document.documentElement.scrollWidth,
  boxes: [...document.querySelectorAll(".figures > div")].map((box) => {
    const {x, y, width, height} = box.getBoundingClientRect();
    return [x + scrollX, y + scrollY, width, height];
  })})"""
HIDE = """document.querySelector('.legend button[value="run 0"]').click();
new Promise((done) => setTimeout(() => done(Bokeh.documents[0].roots().flatMap((figure) => figure.renderers)
  .map((part) => [part.tags, part.visible])), 300))"""


def colors(seen: Seen, box: list[float]) -> set[tuple[int, ...]]:
    """The colours in a part of the picture."""
    x, y, width, height = box
    picture = Image.open(io.BytesIO(seen.picture)).convert("RGB").crop((x, y, x + width, y + height))
    return {color for _, color in picture.getcolors(1 << 24)}  # type: ignore[union-attr, misc]


def test_the_page_is_drawn_at_both_widths_and_its_legend_hides(tmp_path: Path) -> None:
    """No console error, no request, every figure with its curves in the colours of both runs, nothing wider than the
    screen; and a run that was clicked is gone from all figures."""
    wild = [*EVENTS, {"event": "sample", "step": 20, "text": WILD}, {"event": "stop", "step": 10, "reason": WILD}]
    one, two = written(tmp_path / "one", wild), written(tmp_path / f"$${WILD[9:17]}$$", max_lr=2e-3)
    told = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(told | {"data_source": WILD}))
    page(tmp_path, one, two)
    for seen in look(tmp_path / "page.html", (1280, 400), (READY, ALONE)):
        assert (seen.errors, seen.requests) == ([], [])
        titles, laid = seen.answers
        assert (len(titles), titles[0]) == (9, "Training loss")
        assert laid["title"].startswith("one, ")
        assert laid["wide"] <= Image.open(io.BytesIO(seen.picture)).width
        assert len(laid["boxes"]) == len(titles)
        for box in laid["boxes"]:
            assert box[2] > 300
            assert {(31, 119, 180), (255, 127, 14)} & colors(seen, box)
    assert laid["wide"] == 400
    assert {box[0] for box in laid["boxes"]} == {10}  # one under the other
    [seen] = look(tmp_path / "page.html", (1280,), (READY, ALONE, HIDE))
    assert seen.errors == []
    *_, parts = seen.answers
    assert {visible for tags, visible in parts if "run 0" in tags} == {False}
    assert {visible for tags, visible in parts if "run 0" not in tags} == {True}
    for box in seen.answers[1]["boxes"]:
        assert (31, 119, 180) not in colors(seen, box)
        assert (255, 127, 14) in colors(seen, box)


def test_a_page_without_a_step_and_one_of_one_step_are_no_error(tmp_path: Path) -> None:
    page(tmp_path, written(tmp_path / "none", EVENTS[:1]))
    [seen] = look(tmp_path / "page.html", (400,), ("document.querySelectorAll('h2').length",))
    assert seen.errors == []
    assert seen.answers[0] >= 3
    page(tmp_path, written(tmp_path / "single", [train_event(1)]))
    [seen] = look(tmp_path / "page.html", (400,), (READY,), touch=True)
    assert seen.errors == []
    assert "Training loss" in seen.answers[0]
