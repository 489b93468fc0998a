"""`python -m eval plot`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

from eval.published import CHANCE, published_for
from eval.run_state import died
from gpt2_ddp.evaluation.hellaswag import PROTOCOLS
from gpt2_ddp.evaluation.reference import Reference, fitting
from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import ColorType, LineStyleType

LARGEST = 1e15
SMOOTHED_FROM = 100
"""Points from which on a curve is drawn pale, with its running median over it."""


class Panel(NamedTuple):
    """One curve for each run: the values of `key` in the lines of `event`, times `scale`."""

    title: str
    unit: str
    event: str
    key: str
    scale: float = 1.0


PANELS = (
    Panel("Training loss", "nats per token", "train", "loss"),
    Panel("Validation loss", "nats per token", "val", "val_loss"),
    Panel("HellaSwag acc_norm", "% right", "hellaswag", "acc_norm", 100.0),
    Panel("Learning rate", "learning rate x 1000", "train", "lr", 1000.0),
    Panel("Gradient norm before clipping", "L2 norm", "train", "grad_norm"),
    Panel("Gradient noise scale", "thousand tokens", "noise_scale", "tokens", 0.001),
    Panel("Speed", "thousand tokens per second", "train", "tokens_per_sec", 0.001),
)
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
        figure = draw([read_history(path) for path in self.runs], run_names(self.runs))
        figure.savefig(self.out, format="png", dpi=120)
        for line in filter(None, map(died, self.runs)):
            tell(f"warning: {line}")
        print(f"wrote {self.out}")


class Curve(NamedTuple):
    """Values by step."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run's metrics.jsonl holds for the panels, in their order, the protocols of its HellaSwag scores, and the
    published curves that it may be compared with."""

    curves: list[Curve]
    protocols: set[str]
    references: tuple[Reference, ...]


def read_history(run: Path) -> History:
    """The curves in a run directory or a metrics.jsonl file; a last line that is torn is left out.

    Raises:
        UserError: naming the file and the line that is not a metric, or a file without a single one.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"no metrics at {path}: give a run directory, or its metrics.jsonl")
    curves = [Curve([], []) for _ in PANELS]
    protocols = set()
    for event in _events(path):
        if event["event"] == "hellaswag" and event.get("protocol") in PROTOCOLS:
            protocols.add(str(event["protocol"]))
        for panel, curve in zip(PANELS, curves, strict=True):
            value = event.get(panel.key)
            # a loss that is not finite is null, or NaN from elsewhere
            if event["event"] == panel.event and isinstance(value, int | float) and abs(value) < LARGEST:
                curve.steps.append(event["step"])
                curve.values.append(value * panel.scale)
    if not any(curve.steps for curve in curves):
        raise UserError(f"{path} has nothing to plot yet")
    return History(curves=curves, protocols=protocols, references=_references(path.parent / "config.json"))


def _references(config_file: Path) -> tuple[Reference, ...]:
    """What fits a run by its config.json; nothing where that is missing or broken, which is no reason not to draw."""
    try:
        told = read_json(config_file)
    except (OSError, UserError):
        return ()
    config = told.get("config")
    return fitting(config, told.get("data_source")) if isinstance(config, dict) else ()


def _events(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json_object(line)
        except UserError as error:
            if number == len(lines):  # torn: every whole line ends in a newline
                return
            raise UserError(f"{path}, line {number}: {error}") from None
        step = event.get("step")
        if not isinstance(step, int) or not 0 <= step < LARGEST or "event" not in event:
            raise UserError(f"{path}, line {number}: not an object with an event and a step")
        yield event


def run_names(runs: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart."""
    short = [path.resolve().name if path.is_dir() else path.resolve().parent.name for path in runs]
    return short if len(set(short)) == len(short) else [str(path) for path in runs]


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
    shown = [index for index in range(len(PANELS)) if any(history.curves[index].steps for history in histories)]
    last = 1.02 * max(max(curve.steps, default=0) for history in histories for curve in history.curves) or 1
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    figure = Figure(figsize=(5.2 * columns, 3.6 * math.ceil(len(shown) / columns) + 0.7), layout="constrained")
    colors = [colormaps["tab10"](index % 10) for index in range(len(names))]
    styles: list[LineStyleType] = ["-" if index < 10 else "--" if index < 20 else ":" for index in range(len(names))]
    runs = [Line2D([], [], color=color, linestyle=style) for color, style in zip(colors, styles, strict=True)]
    handles = dict(zip(names, runs, strict=True))
    for place, index in enumerate(shown, start=1):
        axes = figure.add_subplot(math.ceil(len(shown) / columns), columns, place)
        axes.set(title=PANELS[index].title, ylabel=PANELS[index].unit, xlabel="step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        handles |= _draw_references(axes, PANELS[index], histories, last)
        for history, color, style in zip(histories, colors, styles, strict=True):
            _draw_curve(axes, history.curves[index], color, style, noisy=PANELS[index].key != "lr")
        if PANELS[index].key == "acc_norm":
            _draw_published(axes, sorted(set().union(*(history.protocols for history in histories))))
        if PANELS[index].key == "tokens_per_sec":
            axes.set_ylim(0, 1.1 * max(value for history in histories for value in history.curves[index].values))
    if len(handles) == 1:
        figure.suptitle(names[0], fontweight="bold")
    else:
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _draw_references(axes: Axes, panel: Panel, histories: Sequence[History], last: float) -> dict[str, Line2D]:
    """Grey, up to step `last`: the published curves of a panel that the runs may be compared with, by their names.

    HellaSwag's are by the completion protocol, and are left out where no run has a score by that.
    """
    if panel.key not in ("val_loss", "acc_norm"):
        return {}
    drawn: dict[str, Line2D] = {}
    for history in histories:
        for reference in history.references:
            batch = reference.recipe["total_batch_size"]
            steps = [point.tokens / batch for point in reference.points if point.tokens <= last * batch]
            name = f"published: {reference.name}"
            other_protocol = panel.key == "acc_norm" and "completion" not in history.protocols
            if name in drawn or other_protocol or not steps:
                continue
            if last * batch < reference.points[-1].tokens:
                steps.append(last)
            values = [panel.scale * (reference.at(step * batch, panel.key) or 0.0) for step in steps]
            style, marker = ("", "D") if len(steps) == 1 else (("-", "--", ":")[len(drawn) % 3], "")
            [line] = axes.plot(steps, values, color="0.65", linestyle=style, linewidth=2, marker=marker, zorder=1)
            drawn[name] = line
    return drawn


def _draw_curve(axes: Axes, curve: Curve, color: ColorType, style: LineStyleType, *, noisy: bool) -> None:
    """One run's curve: points where there are few, a running median over the pale values where there are many."""
    if len(curve.steps) < SMOOTHED_FROM or not noisy:
        marker = "o" if len(curve.steps) <= 30 else ""
        axes.plot(curve.steps, curve.values, color=color, linestyle=style, marker=marker, markersize=3.5, linewidth=1.4)
        return
    reach = len(curve.values) // 50
    reaches = [min(reach, index) for index in range(len(curve.values))]  # symmetric at the start, where it is steep
    median = [float(np.median(curve.values[index - r : index + r + 1])) for index, r in enumerate(reaches)]
    axes.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.3)
    axes.plot(curve.steps, median, color=color, linestyle=style, linewidth=1.6)


def _draw_published(axes: Axes, protocols: Sequence[str]) -> None:
    """Lines at chance and at what the published models of the smallest size reach."""
    lines = {"chance": CHANCE}
    for protocol in protocols:
        for number in published_for(protocol):
            if "124M" in number.model:
                own = f", {protocol}" if number.protocol and len(protocols) > 1 else ""
                lines[f"{number.model}{own}"] = number.acc_norm
    for name, accuracy in lines.items():
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
