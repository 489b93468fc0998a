"""The same bits: on 1, 2 and 4 ranks with --reproducible, and without it after a resume on as many ranks as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drivers import warm
from running import final_hashes, metrics, weights_and_moments

from gpt2_ddp.data.shards import write_shard

SAME = ("--reproducible",)
DROPOUT = (*SAME, "--dropout", "0.1")


def data_hashes(out_dir: Path) -> list[str]:
    return [entry["data_hash"] for entry in metrics(out_dir)]


@pytest.mark.parametrize("nproc", [2, 4])
def test_any_number_of_ranks_gives_the_same_bits(
    shared_folder: Path, data_dir: Path, tmp_path: Path, nproc: int
) -> None:
    clean = warm.clean_run(shared_folder, data_dir, *SAME)
    warm.fork_ranks(nproc, tmp_path / "run", data_dir, *SAME)
    assert final_hashes(tmp_path / "run") == final_hashes(clean)
    assert data_hashes(tmp_path / "run") == data_hashes(clean)


def test_a_number_of_ranks_that_changes_at_every_resume_gives_the_same_bits(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    clean, out_dir = warm.clean_run(shared_folder, data_dir, *DROPOUT), tmp_path / "run"
    warm.train(out_dir, data_dir, *DROPOUT, faults={"stop_after": {"step": 3}}, status=75)
    warm.fork_ranks(2, out_dir, data_dir, *DROPOUT, faults={"stop_after": {"step": 5}})
    warm.fork_ranks(4, out_dir, data_dir, *DROPOUT, faults={"stop_after": {"step": 10}})
    warm.train(out_dir, data_dir, *DROPOUT)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert data_hashes(out_dir) == data_hashes(clean)


def test_without_the_flag_a_resume_on_four_ranks_gives_the_same_bits(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Four, because the sum of two gradients does not depend on their order."""
    flags = ("--dropout", "0.1")
    clean = warm.clean_run(shared_folder, data_dir, *flags, nproc=4)
    warm.fork_ranks(4, tmp_path / "run", data_dir, *flags, faults={"stop_after": {"step": 5}})
    warm.fork_ranks(4, tmp_path / "run", data_dir, *flags)
    assert final_hashes(tmp_path / "run") == final_hashes(clean)
    assert data_hashes(tmp_path / "run") == data_hashes(clean)


def test_dropout_drops_and_depends_on_the_seed_and_the_place_alone(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    clean = warm.clean_run(shared_folder, data_dir, *DROPOUT)
    assert weights_and_moments(clean) != weights_and_moments(warm.clean_run(shared_folder, data_dir, *SAME))
    for step in (1, 6):
        warm.train(tmp_path / "run", data_dir, *DROPOUT, faults={"stop_after": {"step": step}}, status=75)
    warm.train(tmp_path / "run", data_dir, *DROPOUT)
    assert final_hashes(tmp_path / "run") == final_hashes(clean)


def test_masks_differ_from_step_to_step_and_within_a_step(tmp_path: Path) -> None:
    """Nothing is learned and all tokens are equal: a loss that differs had other masks."""
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train_000000.bin", np.full(3000, 7, dtype=np.uint16))
    losses = {}
    for tokens in ("16", "64"):  # one micro-batch a step, and four
        flags = ("--max-lr", "0", "--dropout", "0.5", "--total-batch-size", tokens)
        warm.train(tmp_path / tokens, tmp_path / "data", *flags)
        losses[tokens] = [entry["loss"] for entry in metrics(tmp_path / tokens)]
    assert len({*losses["16"], *losses["64"]}) == 24


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--total-batch-size", "48"), "--reproducible needs a power of two of micro-batches in a step, not 3"),
        (("--total-batch-size", "96"), "--reproducible needs a power of two of micro-batches in a step, not 6"),
    ],
)
def test_what_makes_no_tree_is_refused(data_dir: Path, tmp_path: Path, flags: tuple[str, ...], line: str) -> None:
    done = warm.train(tmp_path / "run", data_dir, *SAME, *flags, status=2)
    assert done.stderr == f"error: {line}\n"


def test_three_ranks_are_refused(data_dir: Path, tmp_path: Path) -> None:
    done = warm.fork_ranks(3, tmp_path / "run", data_dir, *SAME, "--total-batch-size", "96", status=2)
    assert "error: --reproducible needs a power of two" in done.stderr


def test_a_resume_that_would_compute_otherwise_is_refused(data_dir: Path, tmp_path: Path) -> None:
    stop = {"stop_after": {"step": 2}}
    warm.train(tmp_path / "same", data_dir, *SAME, faults=stop, status=75)
    warm.train(tmp_path / "any", data_dir, faults=stop, status=75)
    done = warm.train(tmp_path / "same", data_dir, *SAME, "--micro-batch-size", "4", status=2)
    assert done.stderr == (
        "error: --reproducible: the run that is resumed has micro_batch_size 2, not micro_batch_size 4\n"
    )
    done = warm.train(tmp_path / "same", data_dir, *SAME, "--dtype", "bfloat16", status=2)
    assert "the run that is resumed has dtype 'torch.float32', not dtype 'torch.bfloat16'" in done.stderr
    done = warm.train(tmp_path / "any", data_dir, *SAME, status=2)
    assert "the run that is resumed was not begun with it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
