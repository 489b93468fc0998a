"""A compiler that fails, as Triton may on a card that it no longer knows, costs a warning and never the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivers import warm
from running import final_hashes, metrics

WARNING = "torch.compile failed ("


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_training_goes_on_without_it(data_dir: Path, tmp_path: Path, backward: bool) -> None:
    flags = ("--max-steps=3", "--checkpoint-every=0")
    warm.train(tmp_path / "plain", data_dir, *flags)
    done = warm.train(
        tmp_path / "run", data_dir, *flags, "--compile=on", faults={"broken_compiler": {"backward": backward}}
    )
    [line] = [line for line in done.stderr.splitlines() if WARNING in line]
    assert "PassManager::run failed" in line
    assert "for this architecture" in line  # the cause, which is not in the error's first line
    assert line.endswith("training without it")
    assert len(metrics(tmp_path / "run")) == 3
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "plain")


def test_ranks_with_gpus_of_two_kinds_compute_alike(data_dir: Path, tmp_path: Path) -> None:
    """In the format that both have, and compiled only if both can be."""
    flags = ("--max-steps=3", "--checkpoint-every=0", "--check-ranks-every=1")
    warm.fork_ranks(2, tmp_path / "plain", data_dir, *flags)
    auto = ("--dtype=auto", "--compile=auto")
    warm.fork_ranks(2, tmp_path / "run", data_dir, *flags, *auto, faults={"two_kinds_of_gpu": {}})
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "plain")


def test_on_one_rank_alone_all_go_on_without_it(data_dir: Path, tmp_path: Path) -> None:
    """Were the others compiled, their buckets would not be those of the first, and the run would hang or diverge."""
    flags = ("--max-steps=3", "--checkpoint-every=0", "--check-ranks-every=1")
    warm.fork_ranks(2, tmp_path / "plain", data_dir, *flags)
    fault = {"broken_compiler": {"backward": True, "rank": 1}}
    done = warm.fork_ranks(2, tmp_path / "run", data_dir, *flags, "--compile=on", faults=fault)
    assert done.stderr.count(WARNING) == 1, done.stderr
    assert len(metrics(tmp_path / "run")) == 3
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "plain")
