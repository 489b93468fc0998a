"""`python -m eval report`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from eval.history import ALL_PANELS, HELLASWAG, last_step, published_curves, run_names
from eval.report import tables
from eval.report.record import Record, read_record
from eval.run_state import died
from gpt2_ddp.system.cli import tell
from gpt2_ddp.system.errors import UserError
from gpt2_ddp.system.files import replace_file

if TYPE_CHECKING:
    from eval.report.figures import Drawn

ALONE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
"""What a browser may load for the page: nothing that is not in it."""
KINDS = {"restart": "&#9650; restart", "skip": "&#10005; skipped update", "spike": "&#9733; spike"}
"""The legend's names of marks, beside the symbols that stand in the figures."""
KINDS |= {"checkpoint": "&#9670; checkpoint"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page of a run, or of several over each other: one HTML file, to be opened without a network."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or metrics.jsonl files; runs that still go on too."""
    out: Path
    """The HTML file to write."""

    def run(self) -> None:
        """Write the page and say where it is."""
        if not self.runs:
            raise UserError("no run to report on: name at least one run directory")
        names = run_names(self.runs)
        records = [
            read_record(place, name, run) for place, (name, run) in enumerate(zip(names, self.runs, strict=True))
        ]
        for record in records:
            if not record.history.events:
                raise UserError(f"{record.history.path} has nothing to report yet")
        try:
            from eval.report.figures import drawn
        except ImportError:
            raise UserError("the page needs bokeh: pip install -e '.[report]' in the checkout") from None
        warnings = list(filter(None, map(died, self.runs)))
        replace_file(self.out, page(records, drawn(records), warnings).encode("utf-8", "replace"))
        for line in warnings:
            tell(f"warning: {line}")
        print(f"wrote {self.out}: open it in a browser")


def page(records: Sequence[Record], drawn: Drawn, warnings: Sequence[str]) -> str:
    """The whole HTML file."""
    here = Path(__file__).parent
    title = escape(", ".join(record.name for record in records))
    several = len(records) > 1
    parts = [
        tables.section("Where it stands", tables.summary(records)),
        tables.section("What differs", tables.differences(records)),
        tables.section("Curves", _curves(records, drawn)),
        tables.section("Samples", tables.by_run(records, tables.samples)),
        tables.section("Checkpoints", tables.by_run(records, tables.checkpoints), folded=several),
        tables.section("Starts", tables.starts(records)),
        tables.section("Configuration", tables.configuration(records), folded=several),
    ]
    warned = "".join(f"<p class=warning>{escape(line)}</p>" for line in warnings)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{ALONE}">',
            f"<meta name=viewport content='width=device-width, initial-scale=1'><title>{title}</title>",
            f"<style>{(here / 'page.css').read_text()}</style></head><body>",
            f"<h1>{title}</h1><p class=note>as of {time.strftime('%Y-%m-%d %H:%M %z')}</p>",
            warned,
            *filter(None, parts),
            drawn.library,
            drawn.script,
            f"<script>{(here / 'page.js').read_text()}</script></body></html>\n",
        ]
    )


def _curves(records: Sequence[Record], drawn: Drawn) -> str:
    """The figures under one legend, which hides what is clicked in all of them."""
    if not drawn.figures:
        return "<p>No step has been logged yet.</p>"
    buttons = [(f"run {record.number}", tables.named(record)) for record in records]
    histories = [record.history for record in records]
    for panel in ALL_PANELS:
        for name in published_curves(panel, histories, 1.02 * last_step(histories)):
            if name not in dict(buttons):
                buttons.append((name, f'<span class=swatch style="background:#a6a6a6"></span>{escape(name)}'))
    if any(history.curves[HELLASWAG].steps for history in histories):
        buttons.append(("published models", "published models"))
    buttons.append(("single steps", "single steps"))
    happened = {kind for record in records for kind in record.marks}
    buttons += [(kind, text) for kind, text in KINDS.items() if kind in happened]
    legend = "".join(
        f'<button type=button aria-pressed=true value="{escape(tag)}">{text}</button>' for tag, text in buttons
    )
    return (
        f"<div class=legend>{legend}</div><p class=note>A click on a name hides it. In a figure: the mouse tells the "
        "values, dragging zooms into steps, in all figures together, and the round arrow brings all back. A pale line "
        "is each step, or of many the least and the greatest of a few; the line over it is their running median.</p>"
        f"<div class=figures>{''.join(drawn.figures)}</div>"
    )
