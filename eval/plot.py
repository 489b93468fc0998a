"""`python -m eval plot`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from eval.curves import SMOOTHED_FROM, running_median
from eval.history import (
    HELLASWAG,
    LOSS,
    NOISE,
    NORM,
    RATE,
    SPEED,
    VALIDATION,
    Curve,
    History,
    last_step,
    protocols_of,
    published_curves,
    published_scores,
    read_history,
    run_names,
)
from eval.run_state import died
from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import ColorType, LineStyleType

PANELS = (LOSS, VALIDATION, HELLASWAG, RATE, NORM, NOISE, SPEED)
"""A panel that no run has a value for is left out."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """The curves of one or several runs in one picture."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or metrics.jsonl files."""
    out: Path
    """The PNG to write."""

    def run(self) -> None:
        """Write the picture and say where it is."""
        if not self.runs:
            raise UserError("no run to plot: name at least one run directory")
        histories = [read_history(path) for path in self.runs]
        for history in histories:
            if not any(history.curves[panel].steps for panel in PANELS):
                raise UserError(f"{history.path} has nothing to plot yet")
        figure = draw(histories, run_names(self.runs))
        figure.savefig(self.out, format="png", dpi=120)
        for line in filter(None, map(died, self.runs)):
            tell(f"warning: {line}")
        print(f"wrote {self.out}")


def draw(histories: Sequence[History], names: Sequence[str]) -> Figure:
    """The picture: a panel for each quantity that any run has, a colour for each run.

    Raises:
        UserError: where matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("plots need matplotlib: pip install -e '.[plot]' in the checkout") from None
    shown = [panel for panel in PANELS if any(history.curves[panel].steps for history in histories)]
    last = 1.02 * last_step(histories) or 1
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    figure = Figure(figsize=(5.2 * columns, 3.6 * math.ceil(len(shown) / columns) + 0.7), layout="constrained")
    colors = [colormaps["tab10"](index % 10) for index in range(len(names))]
    styles: list[LineStyleType] = ["-" if index < 10 else "--" if index < 20 else ":" for index in range(len(names))]
    runs = [Line2D([], [], color=color, linestyle=style) for color, style in zip(colors, styles, strict=True)]
    handles = dict(zip(names, runs, strict=True))
    for place, panel in enumerate(shown, start=1):
        axes = figure.add_subplot(math.ceil(len(shown) / columns), columns, place)
        axes.set(title=panel.title, ylabel=panel.unit, xlabel="step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        handles |= _draw_references(axes, published_curves(panel, histories, last))
        for history, color, style in zip(histories, colors, styles, strict=True):
            _draw_curve(axes, history.curves[panel], color, style, noisy=panel.noisy)
        if panel == HELLASWAG:
            _draw_published(axes, protocols_of(histories))
        if panel == SPEED:
            axes.set_ylim(0, 1.1 * max(value for history in histories for value in history.curves[panel].values))
    if len(handles) == 1:
        figure.suptitle(names[0], fontweight="bold")
    else:
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _draw_references(axes: Axes, curves: Mapping[str, Curve]) -> dict[str, Line2D]:
    """The published curves in grey, by their names."""
    drawn: dict[str, Line2D] = {}
    for name, (steps, values) in curves.items():
        style, marker = ("", "D") if len(steps) == 1 else (("-", "--", ":")[len(drawn) % 3], "")
        [drawn[name]] = axes.plot(steps, values, color="0.65", linestyle=style, linewidth=2, marker=marker, zorder=1)
    return drawn


def _draw_curve(axes: Axes, curve: Curve, color: ColorType, style: LineStyleType, *, noisy: bool) -> None:
    """One run's curve: points where there are few, a running median over the pale values where there are many."""
    if len(curve.steps) < SMOOTHED_FROM or not noisy:
        marker = "o" if len(curve.steps) <= 30 else ""
        axes.plot(curve.steps, curve.values, color=color, linestyle=style, marker=marker, markersize=3.5, linewidth=1.4)
        return
    median = running_median(curve.values, range(len(curve.values)))
    axes.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(curve.steps, median, color=color, linestyle=style, linewidth=1.6)


def _draw_published(axes: Axes, protocols: Sequence[str]) -> None:
    """Lines at chance and at what the published models of the smallest size reach."""
    for name, accuracy in published_scores(protocols).items():
        axes.axhline(100 * accuracy, color="0.45", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {100 * accuracy:.4g}%",
            (0.99 if name == "chance" else 0.01, 100 * accuracy),  # where curves rarely are
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right" if name == "chance" else "left",
            va="bottom",
            fontsize="small",
            color="0.35",
        )
    if protocols:
        axes.set_title(f"{axes.get_title()} by {' and '.join(protocols)}")
    axes.margins(y=0.12)
