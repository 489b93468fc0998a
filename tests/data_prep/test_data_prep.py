"""Text to shards, against the tokens of each document one at a time."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import (
    documents,
    expected_tokens,
    manifest,
    prepare,
    refused,
    split_tokens,
    texts_of,
    write_jsonl,
)
from running import run, sha256, tree

from data_prep.commands import Demo, Shakespeare
from data_prep.files import Files
from data_prep.prepare import Settings
from gpt2_ddp.build.evaluations import Yardsticks
from gpt2_ddp.build.settling import open_sources, plan_batches
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.directory import find_shards


def read_all(path: str) -> list[str | None]:
    """Every document under `path`, read in this process."""
    files = Files(paths=(path,), text_field="text")
    return [text for chunk in files.chunks(0) for text in files.documents(chunk)]


BOOK = "\n\n".join(f"Chapter {number}.\n{text}" for number, text in enumerate(documents(60)))
"""A .txt file of several chunks' documents: about 350 kB."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds in nested folders, and some that are none of them."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = documents(300)
    (folder / "b").mkdir()
    write_jsonl(folder / "a.jsonl", texts[:120])
    for number in range(5):
        (folder / "b" / f"{number}.txt").write_text(texts[120 + number][:60_000])
    (folder / "b" / "book.txt").write_text(BOOK)
    pq.write_table(pa.table({"id": range(175), "text": texts[125:]}), folder / "c.parquet", row_group_size=60)
    (folder / "b" / ".hidden.txt").write_text("not this")
    (folder / "README.md").write_text("nor this")
    return folder


def test_demo_is_the_language_reference_by_topic(tmp_path: Path) -> None:
    done = prepare("demo", "--out", tmp_path, "--workers", 1)
    texts = [topics[name] for name in sorted(topics)]
    lengths = [len(expected_tokens([text])) for text in texts]
    in_val = next(count for count in range(len(texts)) if sum(lengths[:count]) >= 10_000)
    assert split_tokens(tmp_path, "val") == expected_tokens(texts[:in_val])
    assert split_tokens(tmp_path, "train") == expected_tokens(texts[in_val:])
    assert f"python train_gpt2.py --data-dir {tmp_path}" in done.stdout
    config = TrainConfig(data_dir=tmp_path)  # whose other defaults are right for it
    [validation] = open_sources(config, plan_batches(config, world_size=8), Yardsticks()).evaluations
    assert validation.name == "val"
    assert "tokens/s" in done.stderr
    for record in manifest(tmp_path)["shards"]:
        assert sha256(tmp_path / record["name"]) == record["sha256"]
    before = tree(tmp_path)
    assert "tokenized" not in prepare("demo", "--out", tmp_path).stdout
    assert tree(tmp_path) == before


def test_files_of_all_kinds_in_order_and_alike_with_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        flags = ("--val-tokens", 30_000, "--shard-tokens", 100_000, "--workers", workers)
        prepare("text", corpus, "--out", tmp_path / str(workers), *flags)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    texts = documents(300)
    found = texts_of(tmp_path / "1", "val") + texts_of(tmp_path / "1", "train")
    book = found[125:-175]
    assert found[:125] + found[-175:] == texts
    assert "".join(book) == BOOK
    assert all(10_000 < len(part) < 140_000 for part in book[:-1])
    sizes = [shard.tokens for shard in find_shards(tmp_path / "1", "train")]
    assert set(sizes[:-1]) == {100_000}
    assert manifest(tmp_path / "1")["documents"] == {
        "train": len(texts_of(tmp_path / "1", "train")),
        "val": len(texts_of(tmp_path / "1", "val")),
    }


def test_no_text_is_in_both_splits(tmp_path: Path) -> None:
    texts = documents(40) * 3 + documents(80)
    write_jsonl(tmp_path / "texts.jsonl", texts)
    for number, flags in enumerate((("--val-fraction", 0.3), ("--val-tokens", 20_000))):
        out = tmp_path / str(number)
        done = prepare("text", tmp_path / "texts.jsonl", "--out", out, "--shard-tokens", 50_000, *flags)
        assert f"{min(psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))} process" in done.stderr
        train, val = texts_of(out, "train"), texts_of(out, "val")
        assert sorted(train + val) == sorted(texts)
        assert not set(train) & set(val)
        assert val == [text for text in texts if text in set(val)]
        if flags[0] == "--val-fraction":
            assert (texts[0], texts[1]) == (train[0], val[0])
            assert 10 < len(set(val)) < 40
        else:
            first = next(n for n in range(len(texts)) if len(expected_tokens(texts[:n])) >= 20_000)
            assert set(val) == set(texts[:first])


def test_odd_documents(tmp_path: Path) -> None:
    texts: list[object] = ["first", "", None, "a <|endoftext|> b", "\ud83d alone", "\r\n dos\r\n", "日本語 👩‍👩‍👧"]
    out = tmp_path / "out with spaces"
    odd, marked = write_jsonl(tmp_path / "odd.jsonl", texts), tmp_path / "z.txt"
    marked.write_bytes(b"\xef\xbb\xbfwith a byte order mark\r\n")
    done = prepare("text", odd, marked, "--out", out, "--val-fraction", 0)
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == ["--data-dir", str(out)]
    kept = ["first", "a <|endoftext|> b", "\ufffd alone", "\r\n dos\r\n", "日本語 👩‍👩‍👧", "with a byte order mark\r\n"]
    assert split_tokens(out, "train") == expected_tokens(kept)
    assert manifest(out)["documents"] == {"train": 6, "val": 0}


def test_patterns_and_another_field(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("x/2.jsonl", "x/1.jsonl", "x/1.txt"):
        (tmp_path / name).write_text('{"body": "' + name + '"}\n\n')
    pattern = tmp_path / "**" / "*.jsonl"
    prepare("text", pattern, "--text-field", "body", "--out", tmp_path / "out", "--val-fraction", "0")
    assert texts_of(tmp_path / "out", "train") == ["x/1.jsonl", "x/2.jsonl"]


def test_shakespeare_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(BOOK)
    prepare("shakespeare", "--file", tmp_path / "input.txt", "--out", tmp_path / "out")
    assert "".join(texts_of(tmp_path / "out", "val") + texts_of(tmp_path / "out", "train")) == BOOK
    assert "no network" in refused("shakespeare", "--out", tmp_path / "other")
    for command in (Demo, Shakespeare):
        assert f"{command.default_val_tokens:,}" in prepare("shakespeare", "--help").stdout


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "bad.jsonl, line 2: no text in 'text'; choose"),
        ("bad.jsonl", b'{"text": 3}\n', "line 1: no text in 'text'"),
        ("bad.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("bad.jsonl", b"[" * 100_000, "line 1: "),
        ("bad.txt", b"good \xff bad", "bad.txt: not UTF-8 text at byte 5"),
        ("bad.txt", b"\n" * 300_000 + b"\xff", "bad.txt: not UTF-8 text at byte 300000"),
        ("bad.parquet", b"PAR1 no", "bad.parquet: not a whole Parquet file"),
        ("file.csv", b"a,b", "no .txt, .jsonl, .parquet file"),
    ],
)
def test_a_bad_file_is_named(name: str, contents: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_all(str(tmp_path))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": documents(50)}), path, compression="zstd")
    contents = bytearray(path.read_bytes())
    contents[1000:9000] = bytes(8000)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file"):
        read_all(str(path))
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ValueError, match="choose --text-field among body"):
        read_all(str(path))


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n{"text": \n')
    out = ("--out", tmp_path / "out", "--workers", 1)
    assert "a.jsonl, line 4: not JSON (Expecting value" in refused("text", file, *out)
    assert "given twice" in refused("text", tmp_path, file, *out)
    assert "choose one" in refused("text", file, *out, "--val-tokens", 1, "--val-fraction", 0.1)
    new = ("--out", tmp_path / "new", "--workers", 1)
    file.write_text('{"text": ""}\n')
    assert "no document with text" in refused("text", file, *new)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("shard_tokens", "val_tokens", "val_fraction"), [(0, 1, None), (2**31, 1, None), (9, -1, None), (9, None, 1.0)]
)
def test_settings_that_cannot_be(shard_tokens: int, val_tokens: int | None, val_fraction: float | None) -> None:
    with pytest.raises(ValueError, match="should be"):
        Settings(shard_tokens=shard_tokens, val_tokens=val_tokens, val_fraction=val_fraction)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """The peak of the largest process, for one .txt file and for one six times as long."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'data_prep', *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    peaks = []
    for size in (4, 24):
        file = tmp_path / f"{size}.txt"
        with open(file, "w") as text:
            for number in range(size * 2000):
                text.write(f"{number} " + "some words of a long text " * 20 + ("\n\n" if number % 50 == 0 else "\n"))
        flags = ["--out", str(tmp_path / str(size)), "--shard-tokens", "1000000"]
        done = run([sys.executable, "-c", code, "text", str(file), *flags])
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        file.unlink()
    assert peaks[1] < peaks[0] + 25, "MiB"
