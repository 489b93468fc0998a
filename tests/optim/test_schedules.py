"""The learning rates against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.optim.schedules import Cosine, Linear, WarmupStableDecay


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 6e-5),
        (5, 3e-4),
        (10, 6e-4),
        (35, 6e-5 + 5.4e-4 * (2 + math.sqrt(2)) / 4),  # a quarter of the cosine
        (60, 3.3e-4),  # half of it
        (85, 6e-5 + 5.4e-4 * (2 - math.sqrt(2)) / 4),
        (110, 6e-5),
        (111, 6e-5),
        (10**6, 6e-5),
    ],
)
def test_schedule_in_closed_form(step: int, expected: float) -> None:
    rate = Cosine(max_steps=110, warmup_steps=10, max_lr=6e-4, final_lr=6e-5).rate(step)
    assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "linear", "stable"),
    [
        (5, 0.5, 0.5),
        (10, 1.0, 1.0),
        (35, 0.75, 1.0),
        (66, 0.44, 1.0),
        (77, 0.33, 0.75),  # a quarter of the 44 steps that are four tenths of all
        (109, 0.01, 1 / 44),
        (110, 0.0, 0.0),
        (111, 0.0, 0.0),
    ],
)
def test_lines_in_closed_form(step: int, linear: float, stable: float) -> None:
    flags: dict[str, Any] = {"max_steps": 110, "warmup_steps": 10, "max_lr": 1.0, "final_lr": 0.0}
    assert Linear(**flags).rate(step) == pytest.approx(linear, abs=1e-12)
    wsd = WarmupStableDecay(**flags, cooldown_fraction=0.4)
    assert wsd.rate(step) == pytest.approx(stable, abs=1e-12)
    assert wsd.branch_step == 66
    assert Linear(**flags).branch_step is None


def test_a_rate_that_stays_is_the_very_one_and_does_not_depend_on_the_length() -> None:
    one, longer = (
        WarmupStableDecay(max_steps=steps, warmup_steps=5, max_lr=1e-2, final_lr=1e-3, cooldown_fraction=0.25)
        for steps in (100, 1000)
    )
    assert [one.rate(step) for step in range(1, 76)] == [longer.rate(step) for step in range(1, 76)]
    assert one.rate(75) == 1e-2 > one.rate(76)
    assert TrainConfig(schedule="wsd").final_lr == TrainConfig(schedule="linear", min_lr=0.0).final_lr == 0.0
    short = WarmupStableDecay(max_steps=10, warmup_steps=8, max_lr=1.0, final_lr=0.0, cooldown_fraction=0.5)
    assert (short.branch_step, short.rate(8), short.rate(9)) == (8, 1.0, 0.5)
    for steps, warmup, fraction in ((4, 8, 0.5), (10, 0, 1.0)):  # within the warm-up, and no step before the line
        none = WarmupStableDecay(
            max_steps=steps, warmup_steps=warmup, max_lr=1.0, final_lr=0.0, cooldown_fraction=fraction
        )
        assert none.branch_step is None
    all_of_it = WarmupStableDecay(max_steps=100, warmup_steps=5, max_lr=1.0, final_lr=0.0, cooldown_fraction=1.0)
    assert [all_of_it.rate(step) for step in (5, 100)] == [1.0, 0.0]


def test_schedule_at_its_edges() -> None:
    assert Cosine(max_steps=1, warmup_steps=0, max_lr=1.0, final_lr=0.25).rate(1) == 0.25
    assert Cosine(max_steps=10, warmup_steps=3, max_lr=1.0, final_lr=0.1).rate(10) == 0.1  # exactly
    assert Cosine(max_steps=4, warmup_steps=8, max_lr=1.0, final_lr=0.1).rate(4) == 0.5  # ends within the warm-up
    rates = list(map(Cosine(max_steps=50, warmup_steps=0, max_lr=1.0, final_lr=0.1).rate, range(1, 51)))
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 50
