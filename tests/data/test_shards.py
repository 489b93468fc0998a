"""The shard format: what is written, what is read, and what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import ROOT, run

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from gpt2_ddp.data.shards import OpenShard, Shard, check_tokens, write_shard
from gpt2_ddp.data.windows import fingerprint

TOKENS = np.arange(5000, dtype=np.uint16)


def shard_bytes(count: int = 3, magic: int = 20240520, version: int = 1, tokens: bytes = b"\1\0\2\0\3\0") -> bytes:
    """A shard built from the format's description alone."""
    return struct.pack("<256i", magic, version, count, *[0] * 253) + tokens


def manifest_for(directory: Path, **changes: Any) -> Manifest:
    records = tuple(
        ShardRecord(name=path.name, tokens=(path.stat().st_size - 1024) // 2, sha256="0" * 64)
        for path in sorted(directory.glob("*.bin"))
    )
    fields: dict[str, Any] = {
        "source": "a test",
        "revision": "1",
        "settings": {"shard_tokens": 10, "val_fraction": None},
        "documents": {"train": 1, "val": 1},
        "shards": records,
        "complete": True,
        "next_chunk": 1,
        "unfinished": {"train": 0, "val": 0},
    }
    return Manifest(**fields | changes)


def test_a_written_shard_is_header_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "train_000000.bin"
    write_shard(path, TOKENS)
    assert path.read_bytes() == shard_bytes(5000, tokens=struct.pack("<5000H", *range(5000)))
    (shard,) = find_shards(tmp_path, "train")
    assert shard == Shard(path=path, tokens=5000)
    tokens = shard.open()
    assert tokens.dtype == np.uint16
    assert (tokens == TOKENS).all()
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["train_000000.bin"]


def test_directories_of_other_projects_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin", "train.bin.part"):
        (tmp_path / name).write_bytes(shard_bytes())
    (tmp_path / "retrieval_train_000001.bin").write_bytes(shard_bytes())
    np.save(tmp_path / "edufineweb_train_000001.npy", TOKENS)
    np.save(tmp_path / "edufineweb_val_000000.npy", TOKENS[:7])
    (tmp_path / "notes.txt").write_text("not a shard")
    train = find_shards(tmp_path, "train")
    assert [shard.path.name for shard in train] == [
        "edufineweb_train_000001.npy",
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "retrieval_train_000001.bin",
    ]
    assert (train[0].open() == TOKENS).all()
    assert train[1].open().tolist() == [1, 2, 3]
    assert [shard.tokens for shard in find_shards(tmp_path, "val")] == [7, 3]


def refuse(directory: Path, split: Any = "train") -> str:
    with pytest.raises(ValueError, match=re.escape(str(directory))) as caught:
        find_shards(directory, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_data_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    for name in ("demo", "shakespeare", "fineweb-edu"):
        command = f"python -m data_prep {name} --out {tmp_path}/{name}"
        assert command in refuse(tmp_path / name)
        (tmp_path / name).mkdir()
        assert command in refuse(tmp_path / name)
    for folder in (tmp_path, tmp_path / "none"):  # the demo is another text than the one that was wanted
        assert refuse(folder).endswith("python -m data_prep --help lists how to prepare it")


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (shard_bytes(magic=20240801), "magic number 20240801, a token shard has 20240520"),
        (shard_bytes(version=2), "version 2 of the format, this reads 1"),
        (shard_bytes(4), "says 4 tokens, its 1030 bytes hold 3"),
        (shard_bytes(-1), "says -1 tokens"),
        (shard_bytes(3, tokens=b"\1\0\2\0\3"), "says 3 tokens"),
        (shard_bytes(0, tokens=b""), "holds no tokens"),
        (shard_bytes()[:500], "shorter than a shard's header"),
        (b"", "shorter than a shard's header"),
    ],
)
def test_a_bad_shard_is_refused_by_name(contents: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "train_000000.bin").write_bytes(shard_bytes())
    (tmp_path / "train_000001.bin").write_bytes(contents)
    message = refuse(tmp_path)
    assert said in message
    assert "train_000001.bin" in message


def save_npy(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    "make",
    [
        save_npy(TOKENS.astype(np.int32)),
        save_npy(TOKENS.reshape(50, 100)),
        save_npy(np.array([{}], dtype=object)),
        save_npy(np.uint16(3)),
        lambda path: path.write_bytes(b"\x93NUMPY\2\0\xff\xff\xff\xff{"),
        lambda path: path.write_bytes(b"\x93NUMPY\1\0\x80\0" + b"(" * 128),
        lambda path: path.mkdir(),
        os.mkfifo,
    ],
)
def test_a_bad_npy_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x_train_0.npy")
    assert "x_train_0.npy" in refuse(tmp_path)


def test_no_shard_of_the_split(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", TOKENS)
    assert "no val shard" in refuse(tmp_path, "val")
    (tmp_path / "train_val.bin").write_bytes(shard_bytes())
    assert "both train and val" in refuse(tmp_path)


def test_the_directory_holds_what_its_manifest_says(tmp_path: Path) -> None:
    for name in ("train_000000.bin", "train_000001.bin", "val_000000.bin"):
        write_shard(tmp_path / name, TOKENS)
    write_manifest(tmp_path, manifest_for(tmp_path, complete=False))
    assert "did not finish" in refuse(tmp_path)
    manifest = manifest_for(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert len(find_shards(tmp_path, "train")) == 2
    (tmp_path / "train_000001.bin").rename(tmp_path / "train_000002.bin")
    assert "train_000001.bin" in refuse(tmp_path)
    (tmp_path / "train_000002.bin").unlink()
    write_shard(tmp_path / "train_000001.bin", TOKENS[:-1])
    assert "5000 tokens by the manifest, 4999 here" in refuse(tmp_path)


def test_a_token_past_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    shard = Shard(path=tmp_path / "train_000000.bin", tokens=5000)
    check_tokens(shard, np.array([[0, 50256]], np.uint16))
    check_tokens(shard, np.array([], np.uint16))
    with pytest.raises(ValueError, match=r"train_000000\.bin: token id 50257 at position 103,"):
        check_tokens(shard, np.array([[1, 2], [3, 50257]], np.uint16), start=100)


def test_the_fingerprint_tells_contents_apart_and_not_places(tmp_path: Path) -> None:
    def of(name: str, *shards: np.ndarray[Any, Any]) -> str:
        for index, tokens in enumerate(shards):
            (tmp_path / name).mkdir(exist_ok=True)
            write_shard(tmp_path / name / f"train_{index:06d}.bin", tokens)
        return fingerprint(find_shards(tmp_path / name, "train"))

    large = np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint16)
    first, last = large.copy(), large.copy()
    first[0] ^= 1
    last[-1] ^= 1
    prints = [
        of("a", large, TOKENS),
        of("b", TOKENS, large),
        of("c", large),
        of("d", first, TOKENS),
        of("e", last, TOKENS),
        of("f", large[:-1], TOKENS),
        of("g", large, TOKENS[:1]),
    ]
    assert len(set(prints)) == len(prints)
    assert of("elsewhere", large, TOKENS) == prints[0]


def test_the_largest_shard_costs_no_more_than_a_small_one(tmp_path: Path) -> None:
    most = 2**31 - 1
    with open(tmp_path / "train_000000.bin", "wb") as file:
        file.write(shard_bytes(most, tokens=b""))
        file.truncate(1024 + 2 * most)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from gpt2_ddp.data.windows import fingerprint; from gpt2_ddp.data.directory import find_shards\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); shards = find_shards(Path(sys.argv[1]), 'train'); fingerprint(shards)\n"
        "print(shards[0].open()[-1], shards[0].tokens, (peak() - before) // 1024)"
    )
    done = run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    last, tokens, grown = map(int, done.stdout.split())
    assert (last, tokens) == (0, most)
    assert grown < 64, "MiB"


@pytest.mark.parametrize(
    "contents",
    [
        b"[" * 200_000,
        b'{"shards":' * 100_000,
        b"\xff\xfe\x00",
        b"9" * 10_000,
        b"{}",
        b"[]",
        b"",
        b'{"a": NaN}',
        None,
    ],
)
def test_a_manifest_that_is_not_one_is_refused(contents: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "train_000000.bin").write_bytes(shard_bytes())
    if contents is None:
        with open(tmp_path / "manifest.json", "wb") as file:
            file.truncate(1 << 34)
    else:
        (tmp_path / "manifest.json").write_bytes(contents)
    assert "manifest.json" in refuse(tmp_path)


def test_a_manifest_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train_000000.bin").write_bytes(shard_bytes())
    os.mkfifo(tmp_path / "manifest.json")
    assert "not a regular file" in refuse(tmp_path)


def test_a_shard_that_shrinks_later_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", TOKENS)
    (shard,) = find_shards(tmp_path, "train")
    opened, row = OpenShard(shard), np.empty(10, np.uint16)
    opened.read(4990, row)
    assert row.tolist() == list(range(4990, 5000))
    os.truncate(shard.path, 1024 + 2 * 4995)
    with pytest.raises(ValueError, match="no longer holds its 5000 tokens"):
        opened.read(4990, row)
    with pytest.raises(ValueError, match="no longer holds its 5000 tokens"):
        shard.open()


def test_writing_again_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "train_000000.bin"
    (tmp_path / "train_000000.bin.part").write_bytes(b"left by a killed process" * 1000)
    write_shard(path, TOKENS[:10])
    write_shard(path, TOKENS)
    digest = hashlib.sha256(shard_bytes(5000, tokens=TOKENS.tobytes())).hexdigest()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
