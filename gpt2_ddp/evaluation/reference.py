"""Published training curves, and where one stood when it had seen as many tokens as a run that matches it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_ddp.system.files import read_json

FILE = Path(__file__).with_name("reference.json")
"""The curves, where they are from, and what is clearly off them and why."""
MATCHING = ("model", "sequence_length", "total_batch_size")
"""Flags that a run must have as the recipe has them, beside the data: else its losses say nothing about each other."""
ABOUT_EQUAL = 0.25
"""Two values of a flag that differ by no more than this fraction are no cause of anything."""
NEARLY = 1e-3
"""A point stands for tokens that differ from its own by this fraction, as by a step at the end of a run."""
CAUSE_EVERY = 10
"""Of so many validations that are clearly off, one tells of the cause."""
OTHER_CAUSES = "a loss that jumped and did not come back, skipped updates (see metrics.jsonl), or too few --val-tokens"
"""Of a run with the flags of the reference: model, data and batch are its own too, and the order is always shuffled."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """`val_loss` in nats a token, `acc_norm` of HellaSwag by the completion protocol, after so many tokens."""

    tokens: int
    val_loss: float
    acc_norm: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A run that somebody has published: its whole curve, or its end."""

    name: str
    source: str
    """Where it is published."""
    data: tuple[str, ...]
    """What `data_prep` calls this data set in a manifest."""
    recipe: Mapping[str, Any]
    """Its settings, as far as they are known, by the names of the trainer's."""
    points: tuple[Point, ...]
    off_nats: float
    """A validation loss that is more than this above the reference is clearly off."""
    off_from_tokens: float

    def at(self, tokens: float, value: str) -> float | None:
        """`val_loss` or `acc_norm` after so many tokens, linear in their logarithm between two points; None before the
        first and after the last."""
        first, last = self.points[0].tokens, self.points[-1].tokens
        if not first * (1 - NEARLY) <= tokens <= last * (1 + NEARLY):
            return None
        places = [math.log(point.tokens) for point in self.points]
        return float(np.interp(math.log(tokens), places, [getattr(point, value) for point in self.points]))

    def distance(self, config: Mapping[str, Any]) -> tuple[float, int, float]:
        """How far a run's recipe is, the least first: by the rate, by how much of a curve there is, by the warm-up."""
        rate, warmup = (_ratio(config.get(name), self.recipe.get(name)) for name in ("max_lr", "warmup_steps"))
        return rate, -len(self.points), warmup


def _ratio(one: Any, other: Any) -> float:
    """The logarithm of how many times the one is the other, or the other the one; infinite for what is no rate."""
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in (one, other)):
        return math.inf
    return abs(math.log(one / other))


def read_references() -> list[Reference]:
    """What lies in `FILE`."""
    content = read_json(FILE)
    off = content["clearly_off"]
    return [
        Reference(
            name=each["name"],
            source=each["source"],
            data=tuple(each["data"]),
            recipe=each["recipe"],
            points=tuple(Point(tokens=tokens, val_loss=loss, acc_norm=acc) for tokens, loss, acc in each["points"]),
            off_nats=off["nats"],
            off_from_tokens=off["from_tokens"],
        )
        for each in content["references"]
    ]


def fitting(config: Mapping[str, Any], data_source: object) -> tuple[Reference, ...]:
    """What a run may be compared with: the reference with the nearest recipe and, where that tells only of its end, the
    nearest curve; none where model, data, batch or length of sequences are others, or the run began with weights.

    `config` are the trainer's flags as JSON has them, `data_source` is what the data's manifest calls their source; a
    mixture's is a list of them, which no reference has.
    """
    if config.get("init_from") is not None:
        return ()
    matching = [
        reference
        for reference in read_references()
        if data_source in reference.data and all(config.get(name) == reference.recipe[name] for name in MATCHING)
    ]
    nearest_first = sorted(matching, key=lambda reference: reference.distance(config))
    curve = next((number for number, reference in enumerate(nearest_first) if len(reference.points) > 1), 0)
    return tuple(nearest_first[: min(curve, 1)] + nearest_first[curve : curve + 1])


class OnTrack:
    """Tells with each validation of a run where its references stood after as many tokens."""

    def __init__(self, references: Sequence[Reference], config: Mapping[str, Any]) -> None:
        self._references, self._config = references, config
        self._off = 0
        """Validations so far that were clearly off."""

    def beside(self, step: int, val_loss: float) -> str:
        """What to say beside a validation loss in nats a token; nothing where no reference has a value."""
        tokens = step * self._config["total_batch_size"]
        for reference in self._references:
            there = reference.at(tokens, "val_loss")
            if there is not None:
                name = f" ({reference.name})" if len(self._references) > 1 else ""
                said = f" | reference: {there:.3f} at {_count(tokens)} tokens{name}"
                return said + self._cause(reference, step, tokens, val_loss - there)
        return ""

    def _cause(self, reference: Reference, step: int, tokens: int, above: float) -> str:
        longer = self._config["max_steps"] > reference.recipe.get("max_steps", math.inf) * (1 + NEARLY)
        if longer or tokens < reference.off_from_tokens or not above > reference.off_nats:
            return ""  # in a longer run the rate is still high where that of the reference has come down
        self._off += 1
        if self._off % CAUSE_EVERY != 1:
            return ""
        others = [
            f"--{name.replace('_', '-')} {self._config[name]} (the reference had {value})"
            for name, value in reference.recipe.items()
            if name not in (*MATCHING, "max_steps") and not _alike(self._config[name], value)
        ]
        most_often = f"a flag that differs: {', '.join(others)}" if others else OTHER_CAUSES
        return f"\nstep {step} | clearly off, {above:.2f} above the reference; most often that is {most_often}"


def _alike(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=ABOUT_EQUAL) if numbers else bool(one == other)


def _count(tokens: int) -> str:
    return f"{tokens / 1e9:.2f} billion" if tokens >= 1e7 else f"{tokens:,}"
