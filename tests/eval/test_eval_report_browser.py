"""The page of `python -m eval report` in a real browser. Skips where chromium is not installed (apt-get install it)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from drivers.browser import Mouse, Seen, chromium, look
from PIL import Image
from test_eval_plot import train_event
from test_eval_report import EVENTS, WILD, page, written

pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium: apt-get install chromium")

READY = """new Promise((done) => {
  const figures = () => Bokeh.documents.flatMap((document) => document.roots());
  const box = ({x, y, width, height}) => [x + scrollX, y + scrollY, width, height];
  const answer = () => done({
    title: document.title,
    width: document.documentElement.scrollWidth,
    figures: figures().map((figure) => figure.title.text),
    boxes: [...document.querySelectorAll(".figures > div > *")].map((each) => box(each.getBoundingClientRect())),
  });
  const finished = () => figures().length && figures().every((figure) => Bokeh.index.get_one(figure)?.has_finished());
  const wait = () => finished() ? setTimeout(answer, 200) : setTimeout(wait, 100);
  wait();
})"""
"""What lies where, when all figures are drawn."""
HIDE = """document.querySelector('.legend button[value="run 0"]').click();
new Promise((done) => setTimeout(() => done(Bokeh.documents[0].roots().flatMap((figure) => figure.renderers)
  .map((part) => [part.tags, part.visible])), 300))"""

AT = """(step) => {
  const [figure] = Bokeh.documents[0].roots();
  const view = Bokeh.index.get_one(figure), box = view.el.getBoundingClientRect();
  return [box.x + view.frame.x_scale.compute(step), box.y + view.frame.bbox.y_center];
}"""
"""Where the middle of the first figure is at a step, on the screen."""
SETTLED = "new Promise((done) => setTimeout(done, 500))"
TOLD = f"""{SETTLED}.then(() => {{
  const within = (node) => [node, ...[...(node.shadowRoot?.querySelectorAll("*") ?? [])].flatMap(within)];
  const shown = [...document.querySelectorAll("*")].flatMap(within).filter((node) => node.checkVisibility());
  return shown.filter((node) => node.matches(".bk-Tooltip")).map((node) => node.shadowRoot.textContent);
}})"""
"""The texts beside the mouse."""
RANGES = f"{SETTLED}.then(() => Bokeh.documents[0].roots().map(({{x_range}}) => [x_range.start, x_range.end]))"

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def colors(picture: bytes, box: list[float]) -> set[tuple[int, ...]]:
    """The colours in a part of a picture."""
    x, y, width, height = box
    part = Image.open(io.BytesIO(picture)).convert("RGB").crop((x, y, x + width, y + height))
    return {color for _, color in part.getcolors(1 << 24)}  # type: ignore[union-attr, misc]


def test_the_page_is_drawn_at_both_widths_and_its_legend_hides(tmp_path: Path) -> None:
    """No console error, no request, every figure with its curves, nothing wider than the screen; and a run that was
    clicked is gone from all figures, with its marks."""
    wild = [*EVENTS, {"event": "sample", "step": 20, "text": WILD}, {"event": "stop", "step": 10, "reason": WILD}]
    lower = {"val_loss": 4.0, "bits_per_byte": 1.25}  # so that it does not hide the other
    shorter = [event | lower if event["event"] == "val" else event for event in EVENTS if event["step"] <= 10]
    one, two = written(tmp_path / "$$one<i>$$", wild), written(tmp_path / "two", shorter, max_lr=2e-3)
    told = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(told | {"data_source": WILD}))
    page(tmp_path, one, two)
    seen: dict[int, Seen] = dict(
        zip((1280, 400), look(tmp_path / "page.html", (1280, 400), (READY, HIDE)), strict=True)
    )
    for width, each in seen.items():
        assert (each.errors, each.requests) == ([], [])
        laid, parts = each.answers
        assert (len(laid["figures"]), laid["figures"][0]) == (9, "Training loss")
        assert laid["title"] == "$$one<i>$$, two"
        assert laid["width"] <= width
        assert len(laid["boxes"]) == 9
        assert all(box[2] > 300 for box in laid["boxes"])
        before, after = each.pictures
        assert {BLUE, ORANGE} <= colors(before, laid["boxes"][0])
        for box, title in zip(laid["boxes"], laid["figures"], strict=True):
            assert {BLUE, ORANGE} & colors(before, box), title
            assert {BLUE, ORANGE} & colors(after, box) == {ORANGE}, title
        assert {visible for tags, visible in parts if "run 0" in tags} == {False}
        assert {visible for tags, visible in parts if "run 0" not in tags} == {True}
    assert len({box[0] for box in seen[1280].answers[0]["boxes"]}) == 3  # beside each other
    assert {box[0] for box in seen[400].answers[0]["boxes"]} == {10}  # one under the other


def test_a_page_without_a_step_and_one_of_one_step_are_no_error(tmp_path: Path) -> None:
    page(tmp_path, written(tmp_path / "none", EVENTS[:1]))
    [seen] = look(tmp_path / "page.html", (400,), ("document.querySelectorAll('h2').length",))
    assert (seen.errors, seen.requests) == ([], [])
    assert seen.answers[0] >= 3
    page(tmp_path, written(tmp_path / "single", [train_event(1)]))
    [seen] = look(tmp_path / "page.html", (400,), (READY,), touch=True)
    assert (seen.errors, seen.requests) == ([], [])
    assert "Training loss" in seen.answers[0]["figures"]


def test_the_mouse_tells_values_and_zooms_into_steps_in_all_figures(tmp_path: Path) -> None:
    page(tmp_path, written(tmp_path / "run"))
    hover = Mouse(f"[['mouseMoved', ...({AT})(8)], ['mouseMoved', ...({AT})(9)]]")
    drag = Mouse(
        f"[['mousePressed', ...({AT})(5)], ['mouseMoved', ...({AT})(9)], ['mouseMoved', ...({AT})(15)], "
        f"['mouseReleased', ...({AT})(15)]]"
    )
    [seen] = look(tmp_path / "page.html", (1280,), (READY, hover, TOLD, drag, RANGES))
    assert (seen.errors, seen.requests) == ([], [])
    _, _, told, _, ranges = seen.answers
    loss = next(event["loss"] for event in EVENTS if event["event"] == "train" and event["step"] == 9)
    assert any("step9" in "".join(text.split()).replace(":", "") and f"{loss:.5g}" in text for text in told), told
    assert len(ranges) == 9
    for start, end in ranges:
        assert (start, end) == pytest.approx((5, 15), abs=0.3)
