"""What a run has written, for those who draw it: the events of metrics.jsonl, their curves, and what to see beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval.published import CHANCE, published_for
from gpt2_ddp.evaluation.hellaswag import PROTOCOLS
from gpt2_ddp.evaluation.reference import Reference, fitting
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import json_object, read_json

LARGEST = 1e15


class Panel(NamedTuple):
    """One curve for each run: the values of `key` in the lines of `event`, times `scale`."""

    title: str
    unit: str
    event: str
    key: str
    scale: float = 1.0

    @property
    def noisy(self) -> bool:
        """Whether a single step's value says less than those around it."""
        return self.key != "lr"


LOSS = Panel("Training loss", "nats per token", "train", "loss")
VALIDATION = Panel("Validation loss", "nats per token", "val", "val_loss")
BITS = Panel("Validation, bits per byte", "bits per byte of text", "val", "bits_per_byte")
HELLASWAG = Panel("HellaSwag acc_norm", "% right", "hellaswag", "acc_norm", 100.0)
RATE = Panel("Learning rate", "learning rate x 1000", "train", "lr", 1000.0)
NORM = Panel("Gradient norm before clipping", "L2 norm", "train", "grad_norm")
NOISE = Panel("Gradient noise scale", "thousand tokens", "noise_scale", "tokens", 0.001)
SPEED = Panel("Speed", "thousand tokens per second", "train", "tokens_per_sec", 0.001)
MFU = Panel("Share of the hardware's peak (mfu)", "%", "train", "mfu", 100.0)
MEMORY = Panel("Memory of the first rank", "GiB", "train", "memory_mb", 1 / 1024)
ALL_PANELS = (LOSS, VALIDATION, BITS, HELLASWAG, RATE, NORM, NOISE, SPEED, MFU, MEMORY)


class Curve(NamedTuple):
    """Values by step."""

    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as its files tell it."""

    path: Path
    """The metrics.jsonl."""
    events: Mapping[str, Sequence[Mapping[str, Any]]]
    """Its lines by their event, in their order; beside `event` and `step` any value may be anything."""
    curves: Mapping[Panel, Curve]
    """Of all panels; without the values that are missing, no numbers, or not finite."""
    told: Mapping[str, Any]
    """The config.json beside it; nothing where that is missing or broken, which is no reason not to draw."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The trainer's flags, as config.json has them."""
        config = self.told.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def protocols(self) -> set[str]:
        """By which HellaSwag was scored."""
        return {event["protocol"] for event in self.events.get("hellaswag", ()) if event.get("protocol") in PROTOCOLS}

    @property
    def references(self) -> tuple[Reference, ...]:
        """The published curves that the run may be compared with."""
        return fitting(self.config, self.told.get("data_source")) if self.config else ()


def read_history(run: Path) -> History:
    """What lies in a run directory, or beside a metrics.jsonl file; a last line that is torn is left out.

    Raises:
        UserError: naming the file and the line that is not a metric.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"no metrics at {path}: give a run directory, or its metrics.jsonl")
    events: dict[str, list[dict[str, Any]]] = {}
    for event in _events(path):
        events.setdefault(str(event["event"]), []).append(event)
    curves = {panel: _curve(panel, events.get(panel.event, ())) for panel in ALL_PANELS}
    return History(path=path, events=events, curves=curves, told=read_if_whole(path.parent / "config.json"))


def read_if_whole(file: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where it is missing or broken."""
    try:
        return read_json(file)
    except (OSError, UserError):
        return {}


def _curve(panel: Panel, events: Sequence[Mapping[str, Any]]) -> Curve:
    # a loss that is not finite is null, or NaN from elsewhere
    told = [(event["step"], event.get(panel.key)) for event in events]
    numbers = [(step, value) for step, value in told if isinstance(value, int | float) and abs(value) < LARGEST]
    return Curve([step for step, _ in numbers], [value * panel.scale for _, value in numbers])


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


def last_step(histories: Sequence[History]) -> float:
    """Of all that is drawn; 0 where nothing is."""
    return max((max(curve.steps, default=0) for history in histories for curve in history.curves.values()), default=0)


def published_curves(panel: Panel, histories: Sequence[History], last: float) -> dict[str, Curve]:
    """By their names, up to step `last`: the published curves of a panel that the runs may be compared with.

    HellaSwag's are by the completion protocol, and are left out where no run has a score by that.
    """
    if panel not in (VALIDATION, HELLASWAG):
        return {}
    found: dict[str, Curve] = {}
    for history in histories:
        for reference in history.references:
            batch = reference.recipe["total_batch_size"]
            steps = [point.tokens / batch for point in reference.points if point.tokens <= last * batch]
            name = f"published: {reference.name}"
            other_protocol = panel == HELLASWAG and "completion" not in history.protocols
            if name in found or other_protocol or not steps:
                continue
            if last * batch < reference.points[-1].tokens:
                steps.append(last)
            values = [panel.scale * (reference.at(step * batch, panel.key) or 0.0) for step in steps]
            found[name] = Curve(steps, values)
    return found


def protocols_of(histories: Sequence[History]) -> list[str]:
    """All by which any of the runs was scored."""
    return sorted(set().union(*(history.protocols for history in histories)))


def published_scores(protocols: Sequence[str]) -> dict[str, float]:
    """HellaSwag's acc_norm by name: chance, and what the published models of the smallest size reach."""
    scores = {"chance": CHANCE}
    for protocol in protocols:
        for number in published_for(protocol):
            if "124M" in number.model:
                own = f", {protocol}" if number.protocol and len(protocols) > 1 else ""
                scores[f"{number.model}{own}"] = number.acc_norm
    return scores
