"""The order of the data (design section 5), against readings of the shard files that share no code with it."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import write_shards

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.loader import TrainData, ValidationData
from gpt2_ddp.data.order import chained_hash, permute
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.windows import Windows, require_one_step

LENGTH = 8


def order(n: int, *, seed: int = 0, epoch: int = 0) -> list[int]:
    return permute(np.arange(n), n=n, seed=seed, epoch=epoch).tolist()


def token_windows(folder: Path, split: str, length: int = LENGTH) -> list[list[int]]:
    """All windows of a split, read from the bytes of its files."""
    found = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        tokens = np.fromfile(path, "<u2")[512:].tolist()
        starts = range(0, len(tokens) - length, length)
        found += [tokens[start : start + length + 1] for start in starts]
    return found


def train_data(
    folder: Path, *, total: int = 96, micro: int = 1, rank: int = 0, world_size: int = 1, seed: int = 3, first: int = 1
) -> TrainData:
    plan = BatchPlan(micro_batch_size=micro, sequence_length=LENGTH, total_batch_size=total, world_size=world_size)
    windows = Windows(find_shards(folder, "train"), LENGTH)
    return TrainData(windows, plan, rank=rank, seed=seed, device=torch.device("cpu"), first_step=first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose ends leave tails of every kind: 25 + 0 + 12 + 1 windows of 8 tokens."""
    sizes = (205, 8, 97, 9)
    return write_shards(tmp_path_factory.mktemp("data"), 1, train_tokens=sizes, val_tokens=(60, 45))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_permute_takes_every_place_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed=seed, epoch=epoch)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1024, 4097, 100_003])
def test_permute_at_the_edges_of_powers_of_two(n: int) -> None:
    assert sorted(order(n)) == list(range(n))


def test_the_order_never_changes_between_versions() -> None:
    assert order(10, seed=1337) == [7, 8, 4, 5, 6, 9, 1, 0, 2, 3]
    places = permute(np.array([0, 1, 2, 10**9, 10**12 - 1]), n=10**12, seed=42, epoch=7)
    assert places.tolist() == [64547068157, 160286821140, 781030502889, 784755823367, 785877711933]


def test_seed_and_epoch_give_unrelated_orders() -> None:
    n = 5000
    orders = [order(n, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)] + [list(range(n))]
    for one, other in itertools.combinations(orders, 2):
        agreeing = sum(a == b for a, b in zip(one, other, strict=True))
        assert agreeing < 12  # one is expected by chance
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    steps = np.diff(orders[0])
    assert len(np.unique(steps)) > 0.6 * n  # neighbours do not stay together


@given(n=st.integers(1, 10**15), data=st.data())
@settings(max_examples=50)
def test_permute_of_many_is_permute_of_each(n: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(index, n=n, seed=5, epoch=2)
    assert together.tolist() == [int(permute(np.array([i]), n=n, seed=5, epoch=2)[0]) for i in index]
    assert permute(index.reshape(1, -1, 1), n=n, seed=5, epoch=2).ravel().tolist() == together.tolist()
    assert together.min() >= 0
    assert together.max() < n


@given(
    micro=st.integers(1, 40), length=st.integers(1, 1024), total=st.integers(1, 10**6), world_size=st.integers(1, 16)
)
def test_an_illegal_batch_names_the_nearest_legal_ones(micro: int, length: int, total: int, world_size: int) -> None:
    numbers = {"micro_batch_size": micro, "sequence_length": length, "world_size": world_size}
    unit = micro * length * world_size
    if total % unit == 0:
        plan = BatchPlan(total_batch_size=total, **numbers)
        assert plan.grad_accum_steps * unit == total
        assert plan.sequences_per_step * length == total
        return
    with pytest.raises(ValueError, match=f"{total} is not a multiple of {unit} .*: use ") as refused:
        BatchPlan(total_batch_size=total, **numbers)
    named = [int(word) for word in str(refused.value).split("use ")[1].split(" or ")]
    legal = [number for number in (total // unit * unit, total // unit * unit + unit) if number]
    assert named == legal
    for number in named:
        BatchPlan(total_batch_size=number, **numbers)


def test_windows_are_those_of_the_files_and_never_cross_a_shard(folder: Path) -> None:
    windows = Windows(find_shards(folder, "train"), LENGTH)
    expected = token_windows(folder, "train")
    assert len(windows) == len(expected) == 25 + 0 + 12 + 1
    read = windows.read(np.arange(len(windows)))
    assert read.dtype == torch.int64
    assert read.tolist() == expected
    backwards = np.arange(len(windows))[::-1]
    assert windows.read(backwards).tolist() == expected[::-1]


def test_every_window_comes_once_an_epoch(folder: Path) -> None:
    n = len(token_windows(folder, "train"))  # 38 windows; a step takes 12, so steps span two epochs
    with closing(train_data(folder)) as data:
        stream = np.concatenate([data.step_windows(step) for step in range(1, 20)])
    assert len(stream) == 19 * 12 == 6 * n
    epochs = stream.reshape(6, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    expected = [int(permute(np.array([g % n]), n=n, seed=3, epoch=g // n)[0]) for g in range(19 * 12)]
    assert stream.tolist() == expected


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_step_has_the_same_micro_batches_for_any_number_of_ranks(folder: Path, micro: int) -> None:
    sequences = token_windows(folder, "train")
    for step in (1, 4):
        seen = []
        for world_size in (1, 2, 4):
            parts = []
            for rank in range(world_size):
                with closing(train_data(folder, total=192, micro=micro, rank=rank, world_size=world_size)) as data:
                    batch = data.load(step)
                    assert batch.tokens.shape == (24 // micro // world_size, micro, LENGTH + 1)
                    parts += batch.tokens.tolist()
                    assert batch.windows.tolist() == data.step_windows(step).tolist()
            seen.append(parts)
            # rank by rank, micro-step by micro-step, these are the step's sequences in their global order
            assert list(itertools.chain.from_iterable(parts)) == [sequences[w] for w in batch.windows]
        assert seen[0] == seen[1] == seen[2]


def test_inputs_and_targets_are_one_token_apart(folder: Path) -> None:
    with closing(train_data(folder, micro=3)) as data:
        batch = data.load(1)
        pairs = list(batch.micro_batches(torch.device("cpu")))
    assert len(pairs) == 4
    for (ids, targets), tokens in zip(pairs, batch.tokens, strict=True):
        assert torch.equal(ids, tokens[:, :-1])
        assert torch.equal(targets, tokens[:, 1:])


def test_seeking_is_iterating(folder: Path) -> None:
    with closing(train_data(folder)) as data:
        walked = [data.next() for _ in range(9)]
    assert [batch.step for batch in walked] == list(range(1, 10))
    with closing(train_data(folder, first=8)) as data:
        jumped = [data.next() for _ in range(2)]
    for one, other in zip(walked[7:], jumped, strict=True):
        assert one.step == other.step
        assert torch.equal(one.tokens, other.tokens)
        assert one.windows.tolist() == other.windows.tolist()


def test_what_was_waited_for_the_reader_is_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TrainData.load
    monkeypatch.setattr(TrainData, "load", lambda *args: (time.sleep(0.1), load(*args))[1])
    with closing(train_data(folder)) as data:
        data.next()
        data.next()
        seconds, batches = data.waited()
        assert (seconds > 0.05, batches) == (True, 2)
        assert data.waited() == (0, 0)


def test_data_hash_is_the_chain_that_the_design_says(folder: Path) -> None:
    with closing(train_data(folder)) as data:
        found = ""
        expected = ""
        for step in range(1, 6):
            windows = data.step_windows(step)
            found = chained_hash(found, windows)
            numbers = b"".join(int(w).to_bytes(8, "little") for w in windows)
            expected = hashlib.sha256(expected.encode("ascii") + numbers).hexdigest()
            assert found == expected


def test_validation_reads_the_same_windows_for_any_number_of_ranks(folder: Path) -> None:
    windows = Windows(find_shards(folder, "val"), LENGTH)
    everything = token_windows(folder, "val")
    assert len(everything) == 7 + 5
    for val_tokens, count in ((LENGTH * 9, 9), (LENGTH * 9 + 7, 9), (10**9, 12)):
        data = ValidationData(windows=windows, val_tokens=val_tokens, micro_batch_size=2)
        assert data.tokens == count * LENGTH
        for world_size in (1, 2, 3, 4, 16):
            shares = [list(data.batches(rank=rank, world_size=world_size)) for rank in range(world_size)]
            pairs = list(itertools.chain.from_iterable(shares))
            assert all(1 <= len(ids) <= 2 for ids, _ in pairs)
            ids = [row for inputs, _ in pairs for row in inputs.tolist()]
            targets = [row for _, wanted in pairs for row in wanted.tolist()]
            assert ids == [window[:-1] for window in everything[:count]]
            assert targets == [window[1:] for window in everything[:count]]


def test_too_little_data_for_a_step_is_refused(folder: Path) -> None:
    windows = Windows(find_shards(folder, "train"), LENGTH)
    numbers = {"micro_batch_size": 1, "sequence_length": LENGTH}
    require_one_step(windows, BatchPlan(total_batch_size=38 * LENGTH, **numbers))
    with pytest.raises(ValueError, match="holds 38 training windows of 8 tokens, and one step needs 39"):
        require_one_step(windows, BatchPlan(total_batch_size=39 * LENGTH, **numbers))


def test_the_reader_pins_memory_by_way_of_its_own_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object, str]] = []

    def spy(name: str) -> Callable[[object], object]:
        return lambda it: calls.append((name, str(it), threading.current_thread().name)) or it

    monkeypatch.setattr(torch.cuda, "set_device", spy("set_device"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: spy("pin")("a batch") and tensor)
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        with closing(replaced(train_data(folder), device)) as data:
            data.next()
            data.next()
    first, *others = calls
    assert first == ("set_device", "cuda:3", "prefetch_0")
    assert len(others) >= 2
    assert set(others) == {("pin", "a batch", "prefetch_0")}


def replaced(data: TrainData, device: torch.device) -> TrainData:
    """The same batches for another device."""
    return TrainData(data.windows, data.plan, rank=data.rank, seed=data.seed, device=device, first_step=1)
