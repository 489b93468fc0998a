"""Runs parts one after the other, whatever becomes of each, and keeps the JSON and the page up to date."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.processes import forked

BOUND = 470.0
"""Seconds of a part: below eight minutes, with what it takes to end it."""


class SkippedPartError(Exception):
    """Raised by a part that has nothing to do here; its text says why."""


class Report:
    """What a part has found so far: on disk at once, so that a part that is ended keeps what it had."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.found: dict[str, Any] = {}
        self._path, self._deadline = path, time.monotonic() + seconds

    def add(self, name: str, value: Any) -> None:
        """Note `value`, which JSON must carry; a list of dictionaries becomes a table."""
        self.found[name] = value
        self.write("running")

    def left(self) -> float:
        """Seconds until the part's bound."""
        return self._deadline - time.monotonic()

    def write(self, status: str, reason: str = "") -> None:
        self._path.write_text(json.dumps({"status": status, "reason": reason, "found": self.found}))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the questions. `work` writes into its report, and raises where the answer is not what it should be."""

    number: int
    title: str
    work: Callable[[Report], None]
    seconds: float = BOUND

    @property
    def settles(self) -> str:
        """The first paragraph of the part's docstring, with the row that it settles."""
        return " ".join((self.work.__doc__ or "").split("\n\n")[0].split())


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """One part in a process of its own; its output goes to gpu.log."""
    path, log = folder / f"part_{part.number}.json", folder / "gpu.log"

    def work() -> None:
        print(f"\n==== part {part.number}: {part.title}", flush=True)
        report = Report(path, part.seconds)
        report.write("running")
        try:
            part.work(report)
            report.write("ok")
        except SkippedPartError as skipped:
            report.write("skipped", str(skipped))
        except BaseException as error:
            report.write("failed", f"{type(error).__name__}: {error}"[:2000])
            raise

    start = time.monotonic()
    ended = forked(work, log, part.seconds)
    told = json.loads(path.read_text()) if path.exists() else {"status": "running", "reason": "", "found": {}}
    path.unlink(missing_ok=True)
    if told["status"] == "running":
        told |= {"status": "failed", "reason": ended or "it did not come to its end"}
    return {
        "part": part.number,
        "title": part.title,
        "settles": part.settles,
        **told,
        "seconds": round(time.monotonic() - start, 1),
    }


def run_parts(parts: Sequence[Part], folder: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """All parts in turn; gpu.json and gpu.md in `folder` are written anew after each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.log").unlink(missing_ok=True)
    results: list[dict[str, Any]] = []
    for part in parts:
        results.append(run_part(part, folder))
        last = results[-1]
        told = f" ({last['reason'].splitlines()[0]})" if last["reason"] else ""
        print(f"part {part.number:2} {last['status']:8}{last['seconds']:7.1f} s  {part.title}{told}", flush=True)
        (folder / "gpu.json").write_text(json.dumps({"machine": machine, "parts": results}, indent=1) + "\n")
        (folder / "gpu.md").write_text(page(machine, results))
    return results


def page(machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [f"# {machine.get('name', 'unknown')}", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += table([{"part": r["part"], "": r["title"], "status": r["status"], "s": r["seconds"]} for r in results])
    for result in results:
        lines += ["", f"## {result['part']}. {result['title']}: {result['status']}", "", result["settles"], ""]
        lines += [f"**{result['reason'].strip()}**", ""] if result["reason"] else []
        for name, value in result["found"].items():
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                lines += ["", f"{name}:", "", *table(value), ""]
            else:
                lines.append(f"- {name}: {shown(value)}")
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows with a column for each key that any of them has."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(head, "")).replace("|", "/").replace("\n", " ") for head in heads] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]


def shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value}"
