"""The figures of the page, by bokeh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    GlyphRenderer,
    HoverTool,
    Label,
    LinearScale,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from eval.curves import SMOOTHED_FROM, running_median, thinned
from eval.history import (
    ALL_PANELS,
    HELLASWAG,
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
from eval.report.record import Record

MOST_POINTS = 2000
"""Of a curve on the page."""
FROM_ZERO = (SPEED, MFU, MEMORY)
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
    plot = figure(
        title=f"{panel.title} by {' and '.join(protocols)}" if protocols else panel.title,
        x_axis_label="step",
        y_axis_label=panel.unit,
        y_axis_type="log" if logarithmic else "linear",
        x_range=scene.x_range,
        y_range=DataRange1d(only_visible=True, **{"start": 0} if panel in FROM_ZERO else {}),
        tools="xpan,xwheel_zoom,reset,save",
        toolbar_location="above",
        height=280,
        min_width=100,
        sizing_mode="stretch_width",
    )
    plot.window_axis = "x"
    plot.toolbar.logo = None
    zoom = BoxZoomTool(dimensions="width", name="drag")
    plot.add_tools(zoom, CrosshairTool(overlay=scene.crosshair))
    plot.toolbar.active_drag = zoom
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker.desired_num_ticks = 5
    plot.grid.grid_line_alpha = 0.5
    for place, (name, curve) in enumerate(published_curves(panel, histories, last).items()):
        _draw_published(plot, name, curve, DASHES[place % len(DASHES)])
    noisy = panel.noisy and any(len(history.curves[panel].steps) >= SMOOTHED_FROM for history in histories)
    hovered = [
        renderer
        for record in records
        if record.history.curves[panel].steps
        for renderer in _draw_run(plot, record, panel, noisy=noisy)
    ]
    text = [("", "$name"), ("step", "@step{0,0}"), (panel.unit, "@value{%.5g}")]
    text += [("median around", "@median{%.5g}")] if noisy else []
    formats = {"@value": "printf", "@median": "printf"}
    plot.add_tools(HoverTool(renderers=hovered, mode="vline", tooltips=text, formatters=formats))
    if panel == HELLASWAG:
        _draw_scores(plot, protocols)
    _draw_marks(plot, records, scene)
    return plot


def _draw_run(plot: figure, record: Record, panel: Panel, *, noisy: bool) -> list[GlyphRenderer]:
    """A run's curve: pale where there are many points, with the running median over it. What the mouse asks."""
    steps, values = (np.asarray(column, dtype=np.float64) for column in record.history.curves[panel])
    kept = thinned(values.tolist(), MOST_POINTS)
    columns = {"step": steps[kept], "value": values[kept].astype(np.float32)}
    smoothed = noisy and len(values) >= SMOOTHED_FROM
    if noisy:
        median = running_median(values.tolist(), kept) if smoothed else values[kept]
        columns["median"] = np.asarray(median, dtype=np.float32)
    source = ColumnDataSource(columns)
    look = {"color": record.color, "line_dash": DASHES[record.number // 10 % len(DASHES)], "source": source}
    run = tag_of(record)
    if smoothed:
        pale = plot.line("step", "value", **look | {"line_dash": "solid"}, line_alpha=0.35, name=record.name)
        plot.line("step", "median", **look, line_width=2, tags=[run])
        pale.tags = [run, "single steps"]
        return [pale]
    line = plot.line("step", "value", **look, line_width=2, name=record.name, tags=[run])
    if len(values) <= 30:
        plot.scatter("step", "value", color=record.color, source=source, size=5, tags=[run])
    return [line]


def _draw_published(plot: figure, name: str, curve: Curve, dash: str) -> None:
    """A published curve in grey."""
    source = ColumnDataSource({"step": curve.steps, "value": curve.values})
    if len(curve.steps) == 1:
        found = plot.scatter("step", "value", source=source, color="#a6a6a6", marker="diamond", size=10)
    else:
        found = plot.line("step", "value", source=source, color="#a6a6a6", line_width=2.5, line_dash=dash)
    found.tags = [name]
    tooltips = [("", name.replace("@", "").replace("$", "")), ("step", "@step{0,0}"), ("value", "@value{0.0000}")]
    plot.add_tools(HoverTool(renderers=[found], tooltips=tooltips, visible=False))


def _draw_scores(plot: figure, protocols: Sequence[str]) -> None:
    """Lines at chance and at what the published models reach, each under its name."""
    for name, score in published_scores(protocols).items():
        at = 100 * score
        plot.line([0, plot.x_range.end], [at, at], color="#737373", line_dash="dashed", tags=["published models"])
        plot.add_layout(
            Label(
                x=6,
                x_units="screen",
                y=at,
                y_offset=1,
                text=f"{name} {at:.4g}%",
                text_font_size="11px",
                text_color="#595959",
                tags=["published models"],
            )
        )


def _draw_marks(plot: figure, records: Sequence[Record], scene: Scene) -> None:
    """What happened: a symbol at the top, a checkpoint's at the bottom, and a line down from what is no checkpoint."""
    plot.extra_y_ranges = {"marks": Range1d(0, 1)}
    plot.extra_y_scales = {"marks": LinearScale()}
    symbols = []
    for (number, kind), source in scene.marks.items():
        record, tags = records[number], [tag_of(records[number]), kind]
        if kind != "checkpoint":
            plot.vspan("step", source=source, color=record.color, line_alpha=0.4, line_dash="dashed", tags=tags)
        symbol = plot.scatter(
            "step",
            0.03 if kind == "checkpoint" else 0.96,
            source=source,
            marker=SYMBOLS[kind],
            size=7 if kind == "checkpoint" else 10,
            color=record.color,
            line_width=2 if kind == "skip" else 1,
            y_range_name="marks",
            tags=tags,
        )
        symbols.append(symbol)
    if symbols:
        plot.add_tools(HoverTool(renderers=symbols, tooltips=[("", "@text")], visible=False))
