"""The page beside its figures, as HTML. Whatever comes from a run goes through `cell` or `escape`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from eval.history import BITS, HELLASWAG, LOSS, MEMORY, MFU, SPEED, VALIDATION, Curve
from eval.report.record import Record, bytes_text, hardware, number
from gpt2_ddp.config import TrainConfig

LONGEST = 4000
"""Characters of one text from a run."""
MOST_SAMPLES, MOST_CHECKPOINTS = 6, 200
OF_A_START = ("world_size", "device", "device_name", "dtype", "python", "torch", "commit")
"""Of the last one, what runs are compared by beside their flags."""


def cell(value: object) -> str:
    """A value from a run, as text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return escape(text if len(text) <= LONGEST else f"{text[:LONGEST]} [and more]")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "wide") -> str:
    """Of cells that are HTML already; the first of each row is its head. A `long` one is scrolled in its place."""
    if not rows:
        return ""
    top = "".join(f"<th scope=col>{head}</th>" for head in heads)
    lines = (f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{each}</td>' for each in row[1:])}</tr>" for row in rows)
    body = "".join(lines)
    return f"<div class={kind}><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def section(title: str, body: str, *, folded: bool = False) -> str:
    """A part of the page; nothing where it would be empty."""
    if not body:
        return ""
    opened = "" if folded else " open"
    return f"<details{opened}><summary><h2>{title}</h2></summary>{body}</details>"


def named(record: Record) -> str:
    """A run's name beside its colour."""
    return f'<span class=swatch style="background:{record.color}"></span>{cell(record.name)}'


def summary(records: Sequence[Record]) -> str:
    """How each run stands: a row a fact, a column a run; a fact that no run has is left out."""
    facts: dict[str, Callable[[Record], str]] = {
        "state": _state,
        "model": lambda record: cell(record.history.config.get("model", "")),
        "hardware": lambda record: cell(hardware(record.starts[-1])) if record.starts else "",
        "tokens seen": _tokens,
        "training loss": lambda record: _latest(record.history.curves[LOSS], "{:.4f}", 10),
        "validation loss": lambda record: _best(record.history.curves[VALIDATION], "{:.4f}", min),
        "bits per byte": lambda record: _best(record.history.curves[BITS], "{:.4f}", min),
        "HellaSwag acc_norm": lambda record: _best(record.history.curves[HELLASWAG], "{:.2f}%", max),
        "thousand tokens/s": lambda record: _median(record.history.curves[SPEED], "{:.4g}"),
        "mfu": lambda record: _median(record.history.curves[MFU], "{:.3g}%"),
        "memory": lambda record: _most(record.history.curves[MEMORY]),
        "marks": _happened,
        "checkpoints": _saved,
    }
    rows = []
    for name, fact in facts.items():
        if any(told := [fact(record) for record in records]):
            rows.append([name, *told])
    return table(["", *map(named, records)], rows)


def _state(record: Record) -> str:
    step, last = number(record.status, "step"), record.history.config.get("max_steps")
    train = record.history.curves[LOSS].steps
    step = max(step or 0, train[-1] if train else 0)
    of = f" of {last:,}" if isinstance(last, int) else ""
    return f"{cell(record.status.get('state', 'unknown'))} at step {step:,}{of}"


def _tokens(record: Record) -> str:
    events = record.history.events.get("train", ())
    tokens = number(events[-1], "tokens_seen") if events else None
    return "" if tokens is None else f"{tokens:,.0f}"


def _latest(curve: Curve, form: str, count: int) -> str:
    if not curve.values:
        return ""
    values = curve.values[-count:]
    return form.format(statistics.fmean(values)) + (f" (mean of the last {len(values)})" if len(values) > 1 else "")


def _best(curve: Curve, form: str, choose: Callable[..., float]) -> str:
    if not curve.values:
        return ""
    last, best = curve.values[-1], choose(curve.values)
    where = curve.steps[curve.values.index(best)]
    return form.format(last) + ("" if best == last else f" (best {form.format(best)} at step {where:,})")


def _median(curve: Curve, form: str) -> str:
    return f"{form.format(statistics.median(curve.values))} (median)" if curve.values else ""


def _most(curve: Curve) -> str:
    return f"{max(curve.values):.3g} GiB at most" if curve.values else ""


def _happened(record: Record) -> str:
    skipped = max((number(event, "skipped") or 0 for event in record.history.events.get("train", ())), default=0)
    counts = {
        "restart": len(record.starts[1:]),
        "skipped update": int(skipped),
        "spike": len(record.history.events.get("spike", ())),
    }
    return ", ".join(f"{count:,} {name}{'s' * (count > 1)}" for name, count in counts.items() if count) or "none"


def _saved(record: Record) -> str:
    kept = [each for each in record.checkpoints if each.kept]
    size = f", {bytes_text(sum(each.size for each in kept))}" if kept else ""
    return f"{len(record.checkpoints)} saved, {len(kept)} here{size}" if record.checkpoints else ""


def settings(record: Record) -> dict[str, Any]:
    """All that two runs may differ in: flags, data, and what the last start ran on."""
    told, last = record.history.told, record.starts[-1] if record.starts else {}
    data = {name: told[name] for name in ("data_source", "data_fingerprint") if name in told}
    return {**record.history.config, **data, **{name: last[name] for name in OF_A_START if name in last}}


def differences(records: Sequence[Record]) -> str:
    """The settings in which the runs differ, but where they lie and how they were started; nothing for a single run."""
    if len(records) < 2:
        return ""
    rows = [row for row in _settings(records, lambda _, value: cell(value)) if len(set(row[1:])) > 1]
    rows = [row for row in rows if row[0] not in ("out_dir", "resume", "config")]
    return table(["", *map(named, records)], rows) or "<p>nothing: the runs were told the same</p>"


def configuration(records: Sequence[Record]) -> str:
    """All settings; flags that differ from the trainer's defaults stand out."""
    defaults = TrainConfig().to_json()

    def shown(name: str, value: object) -> str:
        changed = name in defaults and value != defaults[name]
        return f"<b>{cell(value)}</b>" if changed else cell(value)

    body = table(["", *map(named, records)], _settings(records, shown), kind="long")
    return body and f"<p>Bold is what differs from the trainer's defaults.</p>{body}"


def _settings(records: Sequence[Record], shown: Callable[[str, object], str]) -> list[list[str]]:
    found = [settings(record) for record in records]
    names = list(dict.fromkeys(name for each in found for name in each))
    return [[cell(name), *(shown(name, each[name]) if name in each else "&ndash;" for each in found)] for name in names]


def starts(records: Sequence[Record]) -> str:
    """What each start of each run ran on, and how it was called."""
    rows = []
    for record in records:
        for place, start in enumerate(record.starts, start=1):
            argv = start.get("argv")
            command = " ".join(map(str, argv)) if isinstance(argv, list) else ""
            shown: dict[str, Any] = {**start, "time": str(start.get("time", "")).replace("T", " ")}
            told = [cell(shown[name]) if name in shown else "" for name in ("step", "time", "host")]
            program = [f"{name} {str(start[name])[:12]}" for name in ("python", "torch", "commit") if start.get(name)]
            dtype = str(start.get("dtype", "")).removeprefix("torch.")
            last = [cell(hardware(start)), cell(dtype), cell(", ".join(program)), f"<code>{cell(command)}</code>"]
            rows.append([f"{named(record)}, start {place}", *told, *last])
    return table(["", "from step", "time", "host", "hardware", "number format", "program", "command"], rows)


def samples(record: Record) -> str:
    """A run's texts in their order, from the first to the last, each with the loss that it was written at."""
    told = [(event["step"], event["text"]) for event in record.history.events.get("sample", ()) if event.get("text")]
    count = min(len(told), MOST_SAMPLES)
    chosen = [told[place * (len(told) - 1) // max(count - 1, 1)] for place in range(count)]
    note = f"<p class=note>{count} of {len(told)}, evenly spread over the run</p>" if count < len(told) else ""
    cards = "".join(
        f"<article><h3>step {step:,}{_loss_at(record, step)}</h3><p>{cell(text)}</p></article>" for step, text in chosen
    )
    return cards and f"{note}<div class=samples>{cards}</div>"


def _loss_at(record: Record, step: int) -> str:
    """The last validation loss up to a step, or else the training loss."""
    for panel, name in ((VALIDATION, "validation loss"), (LOSS, "training loss")):
        steps, values = record.history.curves[panel]
        known = [value for at, value in zip(steps, values, strict=True) if at <= step]
        if known:
            return f", {name} {known[-1]:.3f}"
    return ""


def checkpoints(record: Record) -> str:
    """A run's checkpoints, the newest first."""
    rows = [
        [
            f"step {each.step:,}",
            bytes_text(each.size),
            "" if each.seconds is None else f"{each.seconds:.3g} s",
            "here" if each.kept else "deleted since",
        ]
        for each in reversed(record.checkpoints)
    ]
    more = f"<p>and {len(rows) - MOST_CHECKPOINTS:,} older ones</p>" if len(rows) > MOST_CHECKPOINTS else ""
    return table(["", "size", "saved in", ""], rows[:MOST_CHECKPOINTS], kind="long") + more


def by_run(records: Sequence[Record], body: Callable[[Record], str]) -> str:
    """A part for each run that has one, under the run's name where there are several."""
    parts = [(record, text) for record in records if (text := body(record))]
    if len(records) == 1:
        return "".join(text for _, text in parts)
    return "".join(f"<section><h3 class=run>{named(record)}</h3>{text}</section>" for record, text in parts)
