"""The figures of the page, by bokeh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    GlyphRenderer,
    HoverTool,
    Label,
    Line,
    LinearScale,
    NumeralTickFormatter,
    Range1d,
    Scatter,
    Span,
    VSpan,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from eval.curves import SMOOTHED_FROM, running_median, thinned
from eval.history import (
    ALL_PANELS,
    HELLASWAG,
    LOSS,
    MEMORY,
    MFU,
    NORM,
    SPEED,
    Curve,
    Panel,
    last_step,
    protocols_of,
    published_curves,
    published_scores,
)
from eval.report.record import COLORS, Record

MOST_POINTS = 2000
"""Of a curve on the page."""
FROM_ZERO = (SPEED, MFU, MEMORY)
GREY = "#a6a6a6"
MARKED_UP_TO = 30
"""Points of a curve, each with a dot."""
WIDE = 50
"""The axis of a norm is logarithmic where the greatest is so many times the median: else a spike hides all others."""
DASHES = ("solid", "dashed", "dotted")
SYMBOLS = {"restart": "triangle", "skip": "x", "spike": "star", "checkpoint": "diamond"}
"""Of the marks in a figure."""


class Drawn(NamedTuple):
    """What a page needs of the figures, all of it HTML."""

    library: str
    script: str
    figures: tuple[str, ...]


class Scene(NamedTuple):
    """What the figures share: so they move together, and their points are stored once."""

    x_range: Range1d
    crosshair: Span
    marks: Mapping[tuple[int, str], ColumnDataSource]
    """By a run's number and the kind."""


def drawn(records: Sequence[Record]) -> Drawn:
    """A figure for each quantity that any run has, a colour for each run; what is drawn has the tags of its legend."""
    histories = [record.history for record in records]
    last = 1.02 * last_step(histories) or 1.0
    marks = {
        (record.number, kind): ColumnDataSource(
            {"step": [mark.step for mark in marks], "text": [mark.text for mark in marks]}
        )
        for record in records
        for kind, marks in record.marks.items()
    }
    scene = Scene(Range1d(0, last), Span(dimension="height", line_color="#999999", line_dash="dotted"), marks)
    shown = [panel for panel in ALL_PANELS if any(history.curves[panel].steps for history in histories)]
    figures = [_figure(panel, records, scene, last) for panel in shown]
    document = Document()
    with document.models.freeze():  # else bokeh looks through all of them with each
        for each in figures:
            document.add_root(each)
    script, divisions = components(figures) if figures else ("", ())
    return Drawn(Resources(mode="inline", components=["bokeh"]).render_js(), script, tuple(divisions))


def tag_of(record: Record) -> str:
    """What the page's legend calls a run."""
    return f"run {record.number}"


def _figure(panel: Panel, records: Sequence[Record], scene: Scene, last: float) -> figure:
    histories = [record.history for record in records]
    values = [value for history in histories for value in history.curves[panel].values]
    logarithmic = panel == NORM and min(values) > 0 and max(values) > WIDE * float(np.median(values))
    protocols = protocols_of(histories) if panel == HELLASWAG else []
    floor = {"start": 0} if panel in FROM_ZERO else {}
    plot = figure(
        title=f"{panel.title} by {' and '.join(protocols)}" if protocols else panel.title,
        x_axis_label="step",
        y_axis_label=panel.unit,
        y_axis_type="log" if logarithmic else "linear",
        x_range=scene.x_range,
        y_range=DataRange1d(only_visible=True, range_padding=0.4 if floor or panel == HELLASWAG else 0.15, **floor),
        tools="xpan,xwheel_zoom,reset",
        toolbar_location="above",
        height=280,
        min_width=100,
        sizing_mode="stretch_width",
    )
    plot.window_axis = "x"
    plot.toolbar.logo = None
    zoom = BoxZoomTool(dimensions="width", name="drag")
    plot.add_tools(zoom, CrosshairTool(overlay=scene.crosshair, visible=False))
    plot.toolbar.active_drag = zoom
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker.desired_num_ticks = 5
    plot.grid.grid_line_alpha = 0.5
    for place, (name, curve) in enumerate(published_curves(panel, histories, last).items()):
        _draw_published(plot, name, curve, DASHES[place % len(DASHES)])
    noisy = panel.noisy and any(len(history.curves[panel].steps) >= SMOOTHED_FROM for history in histories)
    drawing = [record for record in records if record.history.curves[panel].steps]
    hovered = [_draw_run(plot, record, panel, noisy=noisy) for record in drawing]
    text = [("", "$name"), ("step", "@step{0,0}"), (panel.unit, "@value{%.5g}")]
    text += [("median around", "@median{%.5g}")] if noisy else []
    formats = {"@value": "printf", "@median": "printf"}
    plot.add_tools(HoverTool(renderers=hovered, mode="vline", tooltips=text, formatters=formats, visible=False))
    if panel == HELLASWAG:
        _draw_scores(plot, protocols, last)
    plot.y_range.renderers = list(plot.renderers)  # those so far: the marks have a range of their own
    _draw_marks(plot, records, scene, SYMBOLS if panel == LOSS else SYMBOLS.keys() - {"checkpoint"})
    return plot


def _draw_run(plot: figure, record: Record, panel: Panel, *, noisy: bool) -> GlyphRenderer:
    """A run's curve: pale where there are many points, with the running median over it. Returns what the mouse asks."""
    steps, values = (np.asarray(column, dtype=np.float64) for column in record.history.curves[panel])
    kept = thinned(values.tolist(), MOST_POINTS)
    columns = {"step": steps[kept], "value": values[kept].astype(np.float32)}
    smoothed = noisy and len(values) >= SMOOTHED_FROM
    if noisy:
        median = running_median(values.tolist(), kept) if smoothed else values[kept]
        columns["median"] = np.asarray(median, dtype=np.float32)
    source, tags = ColumnDataSource(columns), [tag_of(record)]
    look = {"line_color": record.color, "line_width": 2}
    dash = DASHES[record.number // len(COLORS) % len(DASHES)]
    if smoothed:
        pale = Line(x="step", y="value", line_color=record.color, line_alpha=0.35)
        asked = plot.add_glyph(source, pale, name=record.name, tags=[*tags, "single steps"])
        plot.add_glyph(source, Line(x="step", y="median", line_dash=dash, **look), tags=tags)
        return asked
    asked = plot.add_glyph(source, Line(x="step", y="value", line_dash=dash, **look), name=record.name, tags=tags)
    if len(values) <= MARKED_UP_TO:
        plot.add_glyph(
            source, Scatter(x="step", y="value", size=5, **look | {"line_width": 1}, fill_color=record.color), tags=tags
        )
    return asked


def _draw_published(plot: figure, name: str, curve: Curve, dash: str) -> None:
    """A published curve in grey."""
    source = ColumnDataSource({"step": curve.steps, "value": curve.values})
    if len(curve.steps) == 1:
        glyph = Scatter(x="step", y="value", marker="diamond", size=10, fill_color=GREY, line_color=GREY)
    else:
        glyph = Line(x="step", y="value", line_color=GREY, line_width=2.5, line_dash=dash)
    found = plot.add_glyph(source, glyph, tags=[name])
    tooltips = [("", name.replace("@", "").replace("$", "")), ("step", "@step{0,0}"), ("value", "@value{0.0000}")]
    plot.add_tools(HoverTool(renderers=[found], tooltips=tooltips, visible=False))


def _draw_scores(plot: figure, protocols: Sequence[str], last: float) -> None:
    """Lines at chance and at what the published models reach, each under its name, where curves rarely are."""
    for name, score in published_scores(protocols).items():
        at = 100 * score
        ends = ColumnDataSource({"step": [0, last], "value": [at, at]})
        line = Line(x="step", y="value", line_color="#737373", line_dash="dashed")
        plot.add_glyph(ends, line, tags=["published models"])
        label = Label(
            x=last if name == "chance" else 0,
            y=at,
            x_offset=-5 if name == "chance" else 5,
            y_offset=1,
            text=f"{name} {at:.4g}%",
            text_align="right" if name == "chance" else "left",
            text_font_size="11px",
            text_color="#595959",
            tags=["published models"],
        )
        plot.add_layout(label)


def _draw_marks(plot: figure, records: Sequence[Record], scene: Scene, kinds: Iterable[str]) -> None:
    """What happened: a symbol at the top, a checkpoint's at the bottom, and a line down from what is no checkpoint."""
    plot.extra_y_ranges = {"marks": Range1d(0, 1)}
    plot.extra_y_scales = {"marks": LinearScale()}
    symbols = []
    for (number, kind), source in scene.marks.items():
        if kind not in kinds:
            continue
        saved, color, tags = kind == "checkpoint", records[number].color, [tag_of(records[number]), kind]
        if not saved:
            plot.add_glyph(source, VSpan(x="step", line_color=color, line_alpha=0.4, line_dash="dashed"), tags=tags)
        symbol = Scatter(
            x="step",
            y=0.03 if saved else 0.95,
            marker=SYMBOLS[kind],
            size=7 if saved else 10,
            fill_color=color,
            line_color=color,
            line_width=2 if kind == "skip" else 1,
        )
        symbols.append(plot.add_glyph(source, symbol, y_range_name="marks", tags=tags))
    if symbols:
        plot.add_tools(HoverTool(renderers=symbols, tooltips=[("", "@text")], visible=False))
