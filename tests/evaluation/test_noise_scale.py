"""The gradient noise scale, against the gradients of single sequences kept whole; and it leaves the run alone."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from drivers import warm
from drivers.live_bytes import LiveBytes
from recomputed import step_windows, token_windows
from running import checkpoint, final_hashes, metrics
from torch.nn import functional as F

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.evaluation.noise_scale import Measured, measured_before, noise_scale, squared_norms
from gpt2_ddp.model.gpt import GPT, model_config
from gpt2_ddp.model.huggingface import load_model

LENGTH, SEQUENCES = int(warm.TINY["sequence-length"]), 8
STEPS = (4, 8, 12)
EVERY = ("--noise-scale-every", "4")


def from_single_gradients(run: Path, data_dir: Path, step: int, passed_over: int = 0) -> tuple[float, float]:
    """|G|^2 as the mean product of two sequences' gradients, and their sample variance, per token; in float64."""
    model, windows = load_model(checkpoint(run, step)).double().eval(), token_windows(data_dir, "train", LENGTH)
    rows = []
    for number in step_windows(step + passed_over + 1, per_step=SEQUENCES, n=len(windows), seed=1337):
        sequence = torch.tensor([windows[number]])
        loss = F.cross_entropy(model(sequence[:, :-1]).flatten(0, 1), sequence[:, 1:].flatten())
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))]))
    gradients = torch.stack(rows)
    products = gradients @ gradients.T
    pairs = products[~torch.eye(SEQUENCES, dtype=torch.bool)]
    return float(pairs.mean()), LENGTH * float(gradients.var(0).sum())


@pytest.mark.parametrize(
    ("flags", "nproc", "near"),
    [
        (("--dropout", "0.1"), 0, 1e-4),
        (("--dtype", "float16", "--activation-checkpointing"), 0, 0.01),
        ((), 2, 1e-4),
    ],
    ids=["dropout", "float16", "two-ranks"],
)
def test_it_is_that_of_all_single_gradients_and_changes_no_bit(
    shared_folder: Path, data_dir: Path, tmp_path: Path, flags: tuple[str, ...], nproc: int, near: float
) -> None:
    """Also where the run is stopped on the way, and its averages go on from what is there."""
    run = tmp_path / "run"
    if nproc:
        done = warm.fork_ranks(nproc, run, data_dir, *flags, *EVERY)
    else:
        warm.train(run, data_dir, *flags, *EVERY, faults={"stop_after": {"step": 6}}, status=75)
        done = warm.train(run, data_dir, *flags, *EVERY)
    assert final_hashes(run) == final_hashes(warm.clean_run(shared_folder, data_dir, *flags, nproc=nproc))
    told = metrics(run, "noise_scale")
    assert [event["step"] for event in told] == list(STEPS)
    expected = [from_single_gradients(run, data_dir, step) for step in STEPS]
    for event, parts in zip(told, expected, strict=True):
        assert (event["squared_norm"], event["variance"]) == pytest.approx(parts, rel=near)
    (norm_4, variance_4), (norm_8, variance_8), (norm_12, variance_12) = expected
    average = (0.81 * variance_4 + 0.9 * variance_8 + variance_12) / (0.81 * norm_4 + 0.9 * norm_8 + norm_12)
    assert told[0]["tokens"] == pytest.approx(variance_4 / norm_4, rel=near)
    assert told[-1]["tokens"] == pytest.approx(average, rel=near)
    assert f"step 12 | gradient noise scale: {told[-1]['tokens']:.0f} tokens; a step has 64\n" in done.stdout


def test_after_a_spike_it_is_of_data_that_is_still_to_come(data_dir: Path, tmp_path: Path) -> None:
    """The data of steps 21 to 23 was passed over, so that step 31 is of what is number 34 in the order."""
    flags = ("--spike-guard", "6", "--max-steps", "32", "--checkpoint-every", "5", "--noise-scale-every", "10")
    faults = {"spike": {"steps": (23,), "factor": 5}}
    warm.train(tmp_path / "run", data_dir, *flags, faults=faults)
    [event] = [event for event in metrics(tmp_path / "run", "noise_scale") if event["step"] == 30]
    expected = from_single_gradients(tmp_path / "run", data_dir, 30, passed_over=3)
    assert (event["squared_norm"], event["variance"]) == pytest.approx(expected, rel=1e-4)


def test_it_takes_the_memory_of_a_training_step_of_one_sequence() -> None:
    """Which it takes beside training's own gradients, that wait meanwhile."""
    model = GPT(model_config("gpt2-nano")).init_weights(0)
    tokens = torch.arange(3 * 65).view(3, 65)
    peaks = []
    for measure in (False, True):
        with LiveBytes() as live:
            if measure:
                squared_norms(model, tokens, DistContext(), nullcontext(), sequences=3)
            else:
                for sequence in torch.split(tokens, 1):
                    model(sequence[:, :-1], sequence[:, 1:]).backward()
        peaks.append(live.peak)
    assert peaks[1] < 1.01 * peaks[0]


def test_a_step_of_one_sequence_is_refused(data_dir: Path, tmp_path: Path) -> None:
    one = ("--micro-batch-size", "1", "--total-batch-size", "8")
    done = warm.train(tmp_path / "run", data_dir, *one, *EVERY, status=2)
    assert done.stderr == (
        "error: --noise-scale-every compares one sequence with a step, and a step of --total-batch-size 8 is one: "
        "give at least 16, or leave it out\n"
    )


def test_what_cannot_be_averaged_is_left_out(tmp_path: Path) -> None:
    good = {"event": "noise_scale", "step": 2, "tokens": 5.0, "squared_norm": 2.0, "variance": 10.0}
    lines = [{"event": "train", "step": 1}, good, good | {"variance": None}, {"event": "sample", "text": "noise_scale"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + json.dumps(good)[:-9])
    before = measured_before(tmp_path / "metrics.jsonl")
    assert before == [Measured(squared_norm=2.0, variance=10.0)]
    assert measured_before(tmp_path / "absent") == []
    assert noise_scale([*before, Measured(math.nan, 1.0), Measured(1.0, math.inf)]) == 5
    assert math.isnan(noise_scale([*before, Measured(-3.0, 10.0)]))
