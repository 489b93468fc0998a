"""Correct parts wired wrongly: a run is recomputed from its flags, and each flag has a test that sees what it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from drivers import warm
from recomputed import OTHERWISE, PLAIN, assert_near, recompute
from running import checkpoint, metrics
from safetensors.torch import load_file

from gpt2_ddp.pretrained import from_hf, load_model


@pytest.mark.parametrize(
    ("flags", "switches", "nproc"),
    [({}, [], 0), ({}, [], 2), ({}, ["--reproducible"], 0), (OTHERWISE, [], 0)],
    ids=["defaults", "two-ranks", "reproducible", "no-flag-at-its-default"],
)
def test_a_run_is_what_its_flags_say(
    shared_folder: Path, data_dir: Path, flags: Mapping[str, str], switches: list[str], nproc: int
) -> None:
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    run = warm.clean_run(shared_folder, data_dir, *given, *switches, nproc=nproc)
    model = load_model(checkpoint(run))
    expected = recompute(model.config, PLAIN | flags, data_dir)
    for told, line in zip(metrics(run), expected.lines, strict=True):
        for name, value in line.items():
            assert told[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert_near(from_hf(load_file(checkpoint(run) / "model.safetensors")), expected.weights)
    assert_near(load_file(checkpoint(run) / "optimizer.safetensors"), expected.moments)
