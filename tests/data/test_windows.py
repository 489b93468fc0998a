"""Windows of many shards, and of shards that are not whole."""

from __future__ import annotations

import itertools
import resource
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from recomputed import token_windows
from running import write_shards

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.loader import TrainData, ValidationData
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.shards import OpenShard, write_shard
from gpt2_ddp.data.windows import OPEN_SHARDS, Windows
from gpt2_ddp.system.errors import OneRankError

LENGTH = 8


def test_more_shards_than_may_stay_open(tmp_path: Path) -> None:
    write_shards(tmp_path, 1, train_tokens=[LENGTH + 1] * (OPEN_SHARDS + 20))
    windows, back = Windows(find_shards(tmp_path, "train"), LENGTH), np.arange(OPEN_SHARDS + 20)[::-1]
    assert windows.read(back).tolist() == token_windows(tmp_path, "train", LENGTH)[::-1]
    held = [entry for entry in psutil.Process().open_files() if Path(entry.path).parent == tmp_path]
    assert len(held) == OPEN_SHARDS


@pytest.mark.parametrize("warm", [False, True], ids=["first read", "others are open"])
def test_no_read_opens_more_shards_than_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, warm: bool
) -> None:
    """Each is told what will be read of it before any of its group is read."""
    count, told = 3 * OPEN_SHARDS + 5, []
    write_shards(tmp_path, 1, train_tokens=[2 * LENGTH + 1] * count)
    windows = Windows(find_shards(tmp_path, "train"), LENGTH)
    order = np.random.default_rng(0).permutation(2 * count)
    if warm:
        windows.read(order[:OPEN_SHARDS])
    for name in ("expect", "read"):
        original = getattr(OpenShard, name)
        monkeypatch.setattr(OpenShard, name, lambda *args, name=name, of=original: (told.append(name), of(*args)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(int(entry.name) for entry in Path("/dev/fd").iterdir()) + OPEN_SHARDS + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        read = windows.read(order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    everything = token_windows(tmp_path, "train", LENGTH)
    assert read.tolist() == [everything[number] for number in order]
    groups = [(name, len(list(calls))) for name, calls in itertools.groupby(told)]
    each = (OPEN_SHARDS, OPEN_SHARDS, OPEN_SHARDS, 5)
    assert groups == [(name, 2 * shards) for shards in each for name in ("expect", "read")]


def test_a_token_past_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    tokens[42] = 50257
    write_shard(tmp_path / "train_000000.bin", tokens)
    windows = Windows(find_shards(tmp_path, "train"), LENGTH)
    windows.read(np.arange(5))
    with pytest.raises(ValueError, match=r"train_000000\.bin: token id 50257 at position 42"):
        windows.read(np.array([5]))


def test_bad_data_in_one_ranks_share_is_told_by_that_rank(tmp_path: Path) -> None:
    """Of training, of a validation, and where the file is gone."""
    for split in ("train", "val"):
        tokens = np.arange(100, dtype=np.uint16)
        tokens[90] = 50257
        write_shard(tmp_path / f"{split}_000000.bin", tokens)
    windows = Windows(find_shards(tmp_path, "val"), LENGTH)
    data = ValidationData(windows=windows, val_tokens=96, micro_batch_size=2)
    list(data.batches(rank=0, world_size=2))
    with pytest.raises(OneRankError, match=r"val_000000\.bin: token id 50257 at position 90"):
        list(data.batches(rank=1, world_size=2))
    plan = BatchPlan(micro_batch_size=1, sequence_length=LENGTH, total_batch_size=12 * LENGTH)
    windows = Windows(find_shards(tmp_path, "train"), LENGTH)
    train = TrainData(windows, plan, rank=0, seed=3, device=torch.device("cpu"), first_step=1)
    with closing(train), pytest.raises(OneRankError, match=r"train_000000\.bin: token id"):
        train.next()
    gone = Windows(windows.shards, LENGTH)
    (tmp_path / "train_000000.bin").unlink()
    with pytest.raises(OneRankError, match=r"train_000000\.bin: No such file"):
        gone.read(np.array([0]))
