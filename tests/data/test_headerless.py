"""nanoGPT's `train.bin` and `val.bin`, written as its own script writes them: ids of uint16 and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drivers import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from running import metrics
from test_shards import refuse, shard_bytes

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.shards import Split, write_shard
from gpt2_ddp.data.windows import Windows, fingerprint

DOCUMENT = [40, 588, 262, 995, 13, 50256]
"""A text's ids and `<|endoftext|>` after them, as nanoGPT's OpenWebText."""


def write_as_nanogpt(folder: Path, train: list[int], val: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, ids in (("train.bin", train), ("val.bin", val)):
        array = np.memmap(folder / name, dtype=np.uint16, mode="w+", shape=(len(ids),))
        array[:] = ids
        array.flush()
    return folder


def test_a_run_on_them_sees_what_it_would_see_in_shards(tmp_path: Path) -> None:
    small = [number % 300 for number in DOCUMENT]  # the tiny model's vocabulary
    train, val = small * 300, small * 40
    ours, theirs = tmp_path / "shards", write_as_nanogpt(tmp_path / "nanogpt", train, val)
    ours.mkdir()
    ids_of: dict[Split, list[int]] = {"train": train, "val": val}
    for split, ids in ids_of.items():
        write_shard(ours / f"{split}_000000.bin", np.array(ids, np.uint16))
        pair = [find_shards(folder, split) for folder in (ours, theirs)]
        assert fingerprint(pair[0]) == fingerprint(pair[1])
        windows = [Windows(shards, 16) for shards in pair]
        assert torch.equal(*(each.read(np.arange(len(each))) for each in windows))
        assert len(windows[0]) == (len(ids) - 1) // 16
    warm.train(tmp_path / "run", theirs, "--max-steps", "2", "--val-every", "2")
    assert metrics(tmp_path / "run", "val")[-1]["tokens"] == (len(val) - 1) // 8 * 8


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (np.array(DOCUMENT * 9, "<u4").tobytes(), "these are ids of 32 bits, or none; write them as uint16"),
        (bytes(4000), "these are ids of 32 bits, or none"),
        (np.array(DOCUMENT, "<u2").tobytes() + b"\1", "13 bytes without a header are no whole number of uint16 ids"),
        (b"", "shorter than a shard's header"),
        (b"\1", "shorter than a shard's header"),
        (shard_bytes(magic=20240801), "magic number 20240801"),
        (shard_bytes(version=2), "version 2 of the format"),
        (shard_bytes(4), "says 4 tokens, its 1030 bytes hold 3"),
    ],
)
def test_what_is_no_such_file(contents: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(contents)
    message = refuse(tmp_path)
    assert said in message
    assert str(tmp_path / "train.bin") in message


def test_ids_of_an_alphabet_are_refused(tmp_path: Path) -> None:
    """Those of `shakespeare_char` would train as well as any, and mean other words."""
    write_as_nanogpt(tmp_path, [18, 47, 56, 57, 58], [1, 58])
    assert len(find_shards(tmp_path, "train")) == 1
    (tmp_path / "meta.pkl").write_bytes(b"never opened")
    assert re.search(r"train\.bin: by meta\.pkl beside it.*python -m data_prep text FILE --out DIR", refuse(tmp_path))


def test_shards_with_a_header_may_have_the_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.bin", np.array(DOCUMENT, np.uint16))
    (tmp_path / "meta.pkl").touch()
    [shard] = find_shards(tmp_path, "train")
    assert shard.open().tolist() == DOCUMENT


def test_no_other_name_goes_without_a_header(tmp_path: Path) -> None:
    write_as_nanogpt(tmp_path, DOCUMENT * 200, DOCUMENT)
    (tmp_path / "train.bin").rename(tmp_path / "train_000000.bin")
    assert "magic number 38535208" in refuse(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_any_bytes_are_ids_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, contents: bytes) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "train.bin").write_bytes(contents)
    try:
        (shard,) = find_shards(directory, "train")
    except ValueError as error:
        refused = str(error)
    else:
        assert shard.open().tobytes() == contents
        return
    assert str(directory / "train.bin") in refused
