"""`python -m gpt2_ddp.bench --auto`: trials that differ in one choice, trained for real, and how far `auto` lags."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import environment

from gpt2_ddp.bench.choices import (
    Outcome,
    Trained,
    Trial,
    alternatives,
    attempt,
    compared,
    compile_lag,
    report,
    rows,
    train,
)
from gpt2_ddp.bench.command import short_step
from gpt2_ddp.bench.ladder import Shapes
from gpt2_ddp.data.shards import write_shard

TINY = Shapes(model="gpt2-nano", sequence_length=32, micro_batch_size=1, total_batch_size=256, steps=2)
AUTO = Trial(choice="all", name="auto", ranks=2, threads=2)
TAKEN = Trained(seconds=(1.0,), start_seconds=5.0, dtype="float32", micro_batch_size=2)


def test_each_alternative_differs_in_one_choice() -> None:
    trials = alternatives(AUTO, TAKEN, TINY, "cpu")
    assert [(trial.choice, trial.name) for trial in trials] == [
        ("dtype", "bfloat16"),
        ("ranks and threads", "1 x 4"),
        ("ranks and threads", "4 x 1"),
        ("micro-batch", "1"),
        ("micro-batch", "4"),
        ("compile", "on"),
    ]
    for trial in trials:
        differs = (trial.ranks, trial.threads) != (AUTO.ranks, AUTO.threads)
        assert differs == (trial.choice == "ranks and threads") == (not trial.flags)
        assert trial.ranks * trial.threads == 4
    on_gpu = {(trial.choice, trial.name) for trial in alternatives(AUTO, TAKEN, TINY, "cuda")}
    assert {("dtype", "float16"), ("compile", "off")} < on_gpu
    assert "ranks and threads" not in {choice for choice, _ in on_gpu}


def test_how_far_auto_is_behind() -> None:
    outcomes = compared("dtype", {"bfloat16": 400.0, "float32": 100.0}, "float32")
    assert [(outcome.name, outcome.behind) for outcome in outcomes] == [("float32", 0.75), ("bfloat16", None)]
    slow = Outcome(choice="dtype", name="float16", tokens_per_sec=3.0, slow=True)
    lines = report([*outcomes, slow]).splitlines()
    assert lines[1].split() == ["dtype", "auto:", "float32", "100", "75.0%"]
    assert lines[3].split() == ["float16", "<3"]


def test_a_rule_about_compiling_is_judged_by_the_length_of_run_that_it_suits_least() -> None:
    """Compared with every length of run, one after the other."""
    for eager, compiled, later, switch in (
        (100.0, 160.0, 60.0, 200_000.0),
        (100.0, 105.0, 60.0, 20_000.0),
        (100, 90, 60, 1e5),
    ):
        worst = 0.0
        for tokens in np.geomspace(1000, 1e9, 4000):
            seconds = {False: tokens / eager, True: later + tokens / compiled}
            worst = max(worst, 1 - min(seconds.values()) / seconds[tokens > switch])
        assert compile_lag(eager=eager, compiled=compiled, later=later, switch=switch) == pytest.approx(worst, abs=0.01)


def test_a_trial_trains_and_one_without_patience_is_ended(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train_000000.bin", np.arange(600, dtype=np.uint16))
    alone = replace(AUTO, ranks=1, threads=1, flags=("--dtype=float32",))
    done = train(alone, TINY, "cpu", tmp_path, 120)
    assert (len(done.seconds), done.dtype, done.micro_batch_size) == (2, "float32", 8)
    assert 0 < max(done.seconds) < done.start_seconds
    ended = train(alone, TINY, "cpu", tmp_path, 0.5)
    assert (ended.seconds, ended.start_seconds) == ((), 0.5)
    failed = attempt(replace(alone, flags=("--micro-batch-size=3",)), TINY, "cpu", tmp_path, 120)
    assert re.search(r"failed: error: .*--total-batch-size", failed.failed)
    trials = {alone: [done]} | {replace(alone, choice=name, name=name): [failed] for name in ("micro-batch", "compile")}
    lines = report(rows(TINY, alone, trials, "cpu", 9.0)).splitlines()
    for name in ("micro-batch", "compile"):
        [row] = [line for line in lines if line.split()[:2] == [name, "-"]]
        assert row.endswith(failed.failed)


@pytest.mark.parametrize(("sequence_length", "tokens"), [(256, 1024), (384, 768), (768, 768)])
def test_attention_is_compared_over_whole_sequences(sequence_length: int, tokens: int) -> None:
    shapes = replace(TINY, sequence_length=sequence_length, micro_batch_size=2, total_batch_size=4 * sequence_length)
    assert short_step(shapes).total_batch_size == tokens


@pytest.mark.slow
def test_the_whole_comparison(tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    command = [sys.executable, "-m", "gpt2_ddp.bench", "--auto", *flags, "--json", str(tmp_path / "auto.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    choices = json.loads((tmp_path / "auto.json").read_text())["choices"]
    taken = {choice["choice"]: choice for choice in choices if choice["behind"] is not None}
    assert list(taken) == ["dtype", "ranks and threads", "micro-batch", "compile", "attention"]
    assert all(f"auto: {choice['name']}" in done.stdout for choice in taken.values())
