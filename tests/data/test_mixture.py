"""Several data directories mixed by weight: the order against one that is made by walking through it from its start."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recomputed import token_windows
from running import describe, write_shards

from gpt2_ddp.build.config_file import parse_flags
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.mixture import Mixture, deal, find_validation, open_mixture, share_validation
from gpt2_ddp.data.order import permute
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.sources import Source, data_source, said_of_mixture, sources_of

LENGTH = 8
MASK = (1 << 64) - 1
WEIGHTS = st.lists(st.integers(1, 10_000), min_size=2, max_size=6)


def keys(seed: int, number: int) -> list[int]:
    digest = hashlib.sha512(f"gpt2_ddp mixture {seed} {number}".encode()).digest()
    return [int.from_bytes(digest[start : start + 8], "little") for start in (0, 8)]


def splitmix(x: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor & MASK
    return x ^ x >> 31


def walked(weights: Sequence[int], seed: int, count: int) -> list[int]:
    """The sources of `count` sequences at least, in lists: the lightest source takes one of each stretch of them."""
    dealt: dict[int, int] = {}
    left, whole = list(range(count + 8 * sum(weights) // min(weights))), sum(weights)
    lightest_first = sorted(range(len(weights)), key=lambda number: (weights[number], number))
    for number in lightest_first[:-1]:
        stretch, end, kept = Fraction(whole, weights[number]), 0, []
        for j in range(len(left)):
            start, end = end, math.ceil((j + 1) * stretch)
            if end > len(left):
                break
            chosen = splitmix(j ^ keys(seed, number)[0]) % (end - start)
            dealt[left[start + chosen]] = number
            kept += [place for place in left[start:end] if place not in dealt]
        left, whole = kept, whole - weights[number]
    dealt |= dict.fromkeys(left, lightest_first[-1])
    whole_until = next(place for place in range(len(dealt) + 1) if place not in dealt)
    assert whole_until >= count
    return [dealt[place] for place in range(count)]


def walked_windows(mixture: Mixture, seed: int, count: int) -> list[int]:
    """The numbers of the first `count` windows, each source counting those that it is dealt."""
    found, given = [], [0] * len(mixture.counts)
    for source in walked(mixture.weights, seed, count):
        n, index = mixture.counts[source], given[source]
        own = permute(np.array([index % n]), n=n, seed=keys(seed, source)[1], epoch=index // n)
        found.append(sum(mixture.counts[:source]) + int(own[0]))
        given[source] += 1
    return found


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 2**40))
@settings(max_examples=25, deadline=None)
def test_the_order_is_the_one_that_is_walked(weights: list[int], seed: int) -> None:
    expected = walked(weights, seed, 200)
    sources, dealt = deal(np.arange(200), weights, seed)
    assert sources.tolist() == expected
    before = [[expected[:place].count(number) for place in range(200)] for number in range(len(weights))]
    assert dealt.tolist() == before


@given(weights=WEIGHTS, seed=st.integers(0, 2**63), start=st.integers(0, 10**11))
@example(weights=[49_999_999, 50_000_001], seed=1, start=10**11)
@example(weights=[99_999_999, 1], seed=1, start=10**11)
@settings(max_examples=60, deadline=None)
def test_each_source_has_its_share_up_to_any_place(weights: list[int], seed: int, start: int) -> None:
    """Within K - 1 sequences, also far away; and one source alone takes each sequence."""
    places = np.arange(start, start + 300)
    sources, dealt = deal(places, weights, seed)
    assert dealt.sum(0).tolist() == places.tolist()
    assert np.diff(dealt).T.tolist() == np.eye(len(weights), dtype=int)[sources[:-1]].tolist()
    whole = sum(weights)
    for weight, counts in zip(weights, dealt, strict=True):
        assert abs(counts * whole - weight * places).max() < (len(weights) - 1) * whole
    alone = [deal(places[[at]], weights, seed)[1].ravel().tolist() for at in (0, 7, 299)]
    assert alone == [dealt[:, at].tolist() for at in (0, 7, 299)]


def test_the_order_never_changes_between_versions() -> None:
    assert "".join(map(str, deal(np.arange(40), [7, 3], 1337)[0])) == "1000010100100001000100010100011000100001"
    assert deal(np.array([10**10]), [50, 1, 30], 42)[1].ravel().tolist() == [6172839506, 123456790, 3703703704]


def test_seeds_deal_in_different_orders() -> None:
    orders = [deal(np.arange(3000), [1, 1], seed)[0] for seed in range(3)]
    agreeing = [float((one == other).mean()) for one, other in pairwise(orders)]
    assert all(0.45 < share < 0.55 for share in agreeing)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """38 and 10 windows of 8 tokens to train on, 12 and 5 to validate with."""
    parent = tmp_path_factory.mktemp("mixture")
    first = write_shards(parent / "a", 1, train_tokens=(205, 8, 97, 9), val_tokens=(60, 45))
    return [first, write_shards(parent / "b", 2, train_tokens=(81,), val_tokens=(41,))]


def mixture_of(folders: Sequence[Path], *weights: str, total: int = 96) -> Mixture:
    plan = BatchPlan(micro_batch_size=1, sequence_length=LENGTH, total_batch_size=total)
    return open_mixture(words(folders, *weights), plan)


def words(folders: Sequence[Path], *weights: str) -> tuple[str, ...]:
    return tuple(f"{folder}:{weight}" for folder, weight in zip(folders, weights, strict=True))


def test_windows_are_those_of_the_sources_each_epoch_after_epoch(folders: list[Path]) -> None:
    mixture = mixture_of(folders, "0.6", "0.4")
    everything = [*token_windows(folders[0], "train", LENGTH), *token_windows(folders[1], "train", LENGTH)]
    assert mixture.counts == [38, 10]
    steps = [mixture.of_step(step, count=12, seed=3) for step in range(1, 13)]
    stream = np.concatenate(steps)
    assert stream.tolist() == walked_windows(mixture, 3, 144)
    assert mixture.read(stream).tolist() == [everything[window] for window in stream]
    for epoch in np.split((stream[stream >= 38] - 38)[:50], 5):
        assert sorted(epoch) == list(range(10))
    assert mixture.of_step(9, count=12, seed=3).tolist() == steps[8].tolist()
    assert mixture.given(144, seed=3) == [
        {"data_dir": str(folders[0]), "windows": 87, "tokens": 696, "epochs": 2.2895},
        {"data_dir": str(folders[1]), "windows": 57, "tokens": 456, "epochs": 5.7},
    ]


def test_sources_of_equal_size_have_orders_of_their_own(folders: list[Path], tmp_path: Path) -> None:
    twin = write_shards(tmp_path / "twin", 9, train_tokens=(205, 8, 97, 9))
    stream = mixture_of([folders[0], twin], "1", "1").of_step(1, count=76, seed=3)
    assert stream[stream < 38].tolist() != (stream[stream >= 38] - 38).tolist()


def test_a_fingerprint_is_of_tokens_weights_and_their_order_not_of_places(folders: list[Path], tmp_path: Path) -> None:
    moved = [folder.rename(tmp_path / folder.name) for folder in folders]
    there = mixture_of(moved, "7", "3").fingerprint()
    for folder, place in zip(moved, folders, strict=True):
        folder.rename(place)
    assert mixture_of(folders, "0.7", "0.3").fingerprint() == there
    others = [mixture_of(folders, "0.6", "0.4"), mixture_of(folders[::-1], "0.3", "0.7"), mixture_of(folders[:1], "1")]
    assert len({there, *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    ("given_words", "expected"),
    [
        (("a:0.7", "b:0.3"), [("a", 7), ("b", 3)]),
        (("a:70", "b:30.0"), [("a", 7), ("b", 3)]),
        (("a:.5", "b:1.", "c:0.25"), [("a", 2), ("b", 4), ("c", 1)]),
        (("C:/x:2", "memory://y:0.000001"), [("C:/x", 2_000_000), ("memory://y", 1)]),
    ],
)
def test_the_weight_is_what_follows_the_last_colon(given_words: tuple[str, ...], expected: list[object]) -> None:
    config = parse_flags(["--data-dir", *given_words])
    assert config.data_dir == given_words
    assert [(str(source.path), source.weight) for source in sources_of(config.data_dir)] == [
        (str(Path(str(path))), weight) for path, weight in expected
    ]


def test_one_path_is_taken_as_it_stands_and_the_last_flag_wins(tmp_path: Path) -> None:
    assert parse_flags(["--data-dir", "C:0.7"]).data_dir == Path("C:0.7")
    assert sources_of(Path("C:0.7")) == (Source(path=Path("C:0.7"), weight=1),)
    mixed = ["--data-dir", "a:1", "b:2"]
    assert parse_flags([*mixed, "--data-dir=c"]).data_dir == Path("c")
    assert parse_flags(["--data-dir=c", *mixed]).data_dir == ("a:1", "b:2")
    file = tmp_path / "run.toml"
    file.write_text('data-dir = ["a:1", "b:2"]\nseed = 3\n')
    config = parse_flags([f"--config={file}"])
    assert (config.data_dir, config.seed) == (("a:1", "b:2"), 3)
    assert config.to_json()["data_dir"] == ("a:1", "b:2")
    assert parse_flags([f"--config={file}", "--data-dir", "c"]).data_dir == Path("c")
    assert said_of_mixture(config.data_dir) == ["the data is a mixture: 33.3333% a, 66.6667% b"]
    assert said_of_mixture(Path("c")) == []


@pytest.mark.parametrize(
    ("given_words", "told"),
    [
        (["a:0.7", "b"], "--data-dir b: each of several folders needs its weight"),
        (["a", "b"], "--data-dir a: each of several"),
        (["a:0.7", "b:0"], "--data-dir b:0: each of several folders needs its weight, a positive number"),
        (["a:0.7", "b:-1"], "--data-dir b:-1: "),
        (["a:0.7", "b:nan"], "--data-dir b:nan: "),
        (["a:0.7", "b:1e3"], "--data-dir b:1e3: "),
        (["a:0.7", ":0.3"], "--data-dir :0.3: "),
        (["a:0.7", "./a:0.3"], "names ./a twice"),
        (["a:0.123456789", "b:1"], "too many digits"),
        ([], "--data-dir: name a folder"),
    ],
)
def test_a_mixture_that_is_none_is_refused_in_one_line(given_words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        parse_flags(["--max-steps=0", "--data-dir", *given_words])
    assert "\n" not in str(refused.value)
    assert "--max-steps 0 must be at least 1" in str(refused.value)


def test_sources_that_cannot_be_mixed_are_refused_by_name(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{folders[1]} holds 10 training windows .*a step takes 11: prepare more"):
        mixture_of(folders, "0.5", "0.5", total=22 * LENGTH)
    mixture_of(folders, "0.5", "0.5", total=20 * LENGTH)
    with pytest.raises(ValueError, match=f"no data directory at {tmp_path}/c"):
        mixture_of([folders[0], tmp_path / "c"], "0.5", "0.5")
    short = write_shards(tmp_path / "short", train_tokens=(5,), val_tokens=(5,))
    with pytest.raises(ValueError, match=rf"{short} holds 0 training windows of 8 tokens"):
        mixture_of([folders[0], short], "0.9", "0.1")
    other = describe(write_shards(tmp_path / "other"), tokenizer="another")
    for find in (lambda: mixture_of([folders[0], other], "1", "1"), lambda: find_validation((f"{other}:1", "b:1"))):
        with pytest.raises(ValueError, match=r"by '(gpt2|another)' and \S+ by '(gpt2|another)': a mixture"):
            find()


def test_each_source_is_validated_by_its_share(folders: list[Path]) -> None:
    def shares(weights: Sequence[str], val_tokens: int) -> list[int]:
        shards = find_validation(words(folders, *weights))
        parts = share_validation(shards, sequence_length=LENGTH, val_tokens=val_tokens, micro_batch_size=2)
        assert list(parts) == [str(folder) for folder in folders]
        return [part.sequences for part in parts.values()]

    assert shares(("0.75", "0.25"), 8 * LENGTH + 3) == [6, 2]
    assert shares(("0.7", "0.3"), 8 * LENGTH) == [5, 3]
    assert shares(("0.99", "0.01"), 8 * LENGTH) == [7, 1]
    assert shares(("0.5", "0.5"), 10**9) == [5, 5]  # the second holds no more, and the shares stay
    assert shares(("0.9", "0.1"), 10**9) == [11, 2]
    assert shares(("0.9", "0.1"), LENGTH - 1) == [0, 0]


def test_what_a_mixture_is_made_of_is_told_in_a_list(folders: list[Path], tmp_path: Path) -> None:
    described = describe(write_shards(tmp_path / "data"), source="books")
    assert data_source(described) == "books"
    assert data_source(folders[0]) is None
    assert data_source((f"{described}:1", f"{folders[0]}:1")) == ["books", None]
    assert TrainConfig(data_dir=folders[0]).to_json()["data_dir"] == str(folders[0])
