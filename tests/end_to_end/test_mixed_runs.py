"""Runs on a mixture of data directories: the same data on any number of ranks and after a resume, and what is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data.test_mixture import walked_windows
from drivers import warm
from running import copy_until, final_hashes, metrics, write_shards

from eval.val_loss import ValLoss
from gpt2_ddp.build.config_file import parse_flags
from gpt2_ddp.data.mixture import open_mixture
from gpt2_ddp.data.plan import BatchPlan

FLAGS = ("--reproducible", "--val-every", "6", "--val-tokens", "80")
PER_STEP = 8
SEED = 1337


def mixed(parent: Path, *weights: str) -> tuple[str, ...]:
    return ("--data-dir", *(f"{parent / name}:{weight}" for name, weight in zip("ab", weights, strict=True)))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data directories, the second of 12 windows of 8 tokens."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(folder / "a", 1)
    write_shards(folder / "b", 2, train_tokens=(99,), val_tokens=(200,))
    return folder


@pytest.fixture(scope="module")
def clean(parent: Path) -> Path:
    done = warm.train(parent / "run", parent / "a", *mixed(parent, "0.7", "0.3"), *FLAGS)
    (parent / "run" / "stdout").write_text(done.stdout)
    return parent / "run"


def test_the_data_is_the_one_that_is_walked_and_what_each_source_gave_is_told(parent: Path, clean: Path) -> None:
    plan = BatchPlan(micro_batch_size=2, sequence_length=8, total_batch_size=64)
    mixture = open_mixture(mixed(parent, "7", "3")[1:], plan)
    windows = walked_windows(mixture, SEED, 12 * PER_STEP)
    chain = ""
    for entry, step in zip(metrics(clean), np.array_split(windows, 12), strict=True):
        chain = hashlib.sha256(chain.encode() + step.astype("<i8").tobytes()).hexdigest()
        assert entry["data_hash"] == chain
    n = mixture.counts[0]
    events = metrics(clean, "sources")
    assert [event["step"] for event in events] == [4, 8, 12]
    for event in events:
        given = windows[: event["step"] * PER_STEP]
        counts = [sum(window < n for window in given), sum(window >= n for window in given)]
        assert [source["windows"] for source in event["sources"]] == counts
        assert [source["tokens"] for source in event["sources"]] == [count * 8 for count in counts]
        assert [source["data_dir"] for source in event["sources"]] == [str(parent / "a"), str(parent / "b")]
    assert events[-1]["sources"][1]["epochs"] == round(counts[1] / 12, 4) > 2
    assert f"the data is a mixture: 70% {parent / 'a'}, 30% {parent / 'b'}\n" in (clean / "stdout").read_text()


def test_any_number_of_ranks_changed_at_every_resume_is_the_same_run(parent: Path, clean: Path, tmp_path: Path) -> None:
    """To the bit, on 4, 2 and 1 ranks; by weights of the same ratio, and from where the directories have moved to."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    flags = (*mixed(parent, "0.7", "0.3"), *FLAGS)
    warm.fork_ranks(4, run, parent, *flags, faults={"stop_after": {"step": 3}})
    warm.fork_ranks(2, run, parent, *flags, faults={"stop_after": {"step": 9}})
    for name in "ab":
        shutil.copytree(parent / name, moved / name)
    warm.train(run, parent, *mixed(moved, "7", "3"), *FLAGS)
    assert final_hashes(run) == final_hashes(clean)
    assert [entry["data_hash"] for entry in metrics(run)] == [entry["data_hash"] for entry in metrics(clean)]
    given = {event["step"]: event for event in metrics(run, "sources")}
    assert list(given) == [3, 4, 8, 9, 12]
    for event in metrics(clean, "sources"):
        assert json.dumps(given[event["step"]]).replace(str(moved), str(parent)) == json.dumps(event)


@pytest.mark.parametrize("weights", [("0.6", "0.4"), None], ids=["other weights", "one of them"])
def test_another_mixture_does_not_go_on(
    parent: Path, clean: Path, tmp_path: Path, weights: tuple[str, str] | None
) -> None:
    run = copy_until(clean, tmp_path / "run", 8)
    flags = mixed(parent, *weights) if weights else ()
    done = warm.train(run, parent / "a", *flags, *FLAGS, status=2)
    assert done.stderr.count("\n") == 1
    assert f"{run} is another run: the tokens in --data-dir {parent / 'a'}" in done.stderr
    assert "are not those the run was trained on" in done.stderr
    assert ("in this order and by these weights" in done.stderr) == bool(weights)


def test_validation_is_of_each_source_and_of_all_by_their_shares(parent: Path, clean: Path, tmp_path: Path) -> None:
    last = metrics(clean, "val")[-1]
    parts = last["sources"]
    assert [part["tokens"] for part in parts] == [56, 24]
    assert last["tokens"] == 80
    assert last["val_loss"] == pytest.approx(sum(part["val_loss"] * part["tokens"] for part in parts) / 80, rel=1e-9)
    assert f" | {parent / 'a'}: {parts[0]['val_loss']:.6f} | {parent / 'b'}: " in (clean / "stdout").read_text()
    found = []
    for part in (None, parts[1]):
        data_dir = Path(part["data_dir"]) if part else mixed(parent, "0.7", "0.3")[1:]
        file, tokens = tmp_path / "loss.json", part["tokens"] if part else 80
        ValLoss(model=str(clean), device="cpu", dtype="float32", data_dir=data_dir, val_tokens=tokens, json=file).run()
        found.append(json.loads(file.read_text()))
    assert found[0]["sources"][1]["val_loss"] == found[1]["val_loss"]
    for now, then in zip(found, (last, parts[1]), strict=True):
        for name in ("val_loss", "bits_per_byte", "tokens"):
            assert now[name] == pytest.approx(then[name], rel=1e-5)


def test_the_config_json_of_a_mixture_is_its_flags(parent: Path, clean: Path) -> None:
    again = parse_flags([f"--config={clean / 'config.json'}", "--model=gpt2-nano"])
    assert ("--data-dir", *again.data_dir) == mixed(parent, "0.7", "0.3")
    assert json.loads((clean / "config.json").read_text())["data_source"] == [None, None]


def test_a_spike_guard_counts_what_it_passed_over_as_given(parent: Path, tmp_path: Path) -> None:
    flags = ("--spike-guard", "6", "--max-steps", "30", "--checkpoint-every", "5", "--max-lr", "1e-3")
    spike = {"spike": {"steps": [23], "factor": 5}}
    warm.train(tmp_path / "run", parent / "a", *mixed(parent, "0.7", "0.3"), *flags, faults=spike)
    assert metrics(tmp_path / "run", "spike")[0]["passed_over"] == 3
    totals = {
        event["step"]: sum(source["windows"] for source in event["sources"])
        for event in metrics(tmp_path / "run", "sources")
    }
    assert totals == {step: 8 * (step + (3 if step > 20 else 0)) for step in range(0, 31, 5)}
