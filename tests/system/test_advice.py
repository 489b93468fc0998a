"""Errors whose advice is followed once, to the letter: it must lead out."""

from __future__ import annotations

import json
import lzma
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import texts_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.commands import HellaSwag, Shards, Text
from eval.model_choice import ModelChoice, open_model
from gpt2_ddp.bench import command as bench
from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.data.shards import Shard, write_shard
from gpt2_ddp.data.windows import Windows, require_one_step

TEXTS = ["one text", "another text", "a third"]


pytestmark = pytest.mark.usefixtures("tokenized_here")


def advice(failing: Callable[[], object], pattern: str) -> re.Match[str]:
    """What the error of `failing` says, which must match `pattern` somewhere."""
    with pytest.raises(ValueError, match=pattern) as caught:
        failing()
    found = re.search(pattern, str(caught.value))
    assert found is not None
    return found


def command(tmp_path: Path, **changes: Any) -> Text:
    file = tmp_path / "texts.jsonl"
    if not file.exists():
        write_jsonl(file, TEXTS)
    return Text(**{"paths": (str(file),), "out": tmp_path / "data", "val_tokens": 1, "shard_tokens": 5} | changes)


def read(data_dir: Path) -> None:
    """As the trainer does: both splits, every token."""
    for split in ("train", "val"):
        shards = find_shards(data_dir, split)  # type: ignore[arg-type]
        Windows(shards, 1).read(np.arange(len(Windows(shards, 1))))


def set_bytes(name: str, at: int, value: int) -> Callable[[Path], object]:
    def change(data_dir: Path) -> None:
        content = np.fromfile(data_dir / name, np.uint8)
        content[at : at + 2] = value
        content.tofile(data_dir / name)

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "magic": set_bytes("train_000000.bin", 0, 0),
    "version": set_bytes("train_000000.bin", 4, 9),
    "count": set_bytes("train_000000.bin", 8, 9),
    "vocabulary": set_bytes("train_000000.bin", 1026, 255),
    "short": lambda data_dir: (data_dir / "train_000000.bin").write_bytes(b"short"),
    "gone": lambda data_dir: (data_dir / "train_000000.bin").unlink(),
    "no train": lambda data_dir: [path.unlink() for path in data_dir.glob("train*")],
    "no val": lambda data_dir: [path.unlink() for path in data_dir.glob("val*")],
    "more": lambda data_dir: shutil.copy(data_dir / "train_000000.bin", data_dir / "train_000009.bin"),
    "manifest": lambda data_dir: (data_dir / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data(damage: str, tmp_path: Path) -> None:
    """To prepare it again is not enough: a directory that is complete by its manifest is left as it is."""
    prepared = command(tmp_path)
    prepared.run()
    DAMAGES[damage](prepared.out)
    found = advice(lambda: read(prepared.out), r"delete (\S+) and prepare it again")
    assert found[1] == str(prepared.out)
    shutil.rmtree(found[1])
    prepared.run()
    read(prepared.out)


@pytest.mark.parametrize("damage", ["count", "short", "gone", "no val", "manifest"])
def test_damaged_data_prepared_again_at_once(damage: str, tmp_path: Path) -> None:
    prepared = command(tmp_path)
    prepared.run()
    DAMAGES[damage](prepared.out)
    shutil.rmtree(advice(prepared.run, r"delete (\S+) and prepare it again")[1])
    prepared.run()
    read(prepared.out)


def test_a_manifest_that_is_none_deleted_alone(tmp_path: Path) -> None:
    prepared = command(tmp_path)
    prepared.run()
    DAMAGES["manifest"](prepared.out)
    Path(advice(lambda: read(prepared.out), r"(\S+): not a manifest .*; delete it to train on")[1]).unlink()
    read(prepared.out)


def test_no_data_at_all(tmp_path: Path) -> None:
    found = advice(lambda: read(tmp_path / "demo"), r"python -m data_prep (demo) --out (\S+)")
    command(tmp_path, out=Path(found[2])).run()  # the demo, by another text
    read(tmp_path / "demo")


@pytest.mark.parametrize(("name", "new"), [("tokens.bin", "train.bin"), ("train_val.bin", "train.bin")])
def test_shards_with_names_that_do_not_tell_the_split(name: str, new: str, tmp_path: Path) -> None:
    write_shard(tmp_path / name, np.arange(9, dtype=np.uint16))
    advice(lambda: find_shards(tmp_path, "train"), f"{name}.* rename it")
    (tmp_path / name).rename(tmp_path / new)
    assert [shard.path.name for shard in find_shards(tmp_path, "train")] == [new]


def test_no_validation_split_in_data_from_elsewhere(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.bin", np.arange(9, dtype=np.uint16))
    flag, value = advice(lambda: find_shards(tmp_path, "val"), r"(--val-every) (0)").groups()
    assert (flag, TrainConfig(val_every=int(value)).val_every) == ("--val-every", 0)


def test_an_unfinished_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = command(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.output.ShardWriter.finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared.run()
    advice(lambda: read(prepared.out), "run the same data_prep command again")
    prepared.run()
    read(prepared.out)


@pytest.mark.parametrize("way", ["another", "delete"])
def test_a_directory_of_other_settings(way: str, tmp_path: Path) -> None:
    command(tmp_path).run()
    other = command(tmp_path, shard_tokens=4)
    advice(other.run, "choose another --out, or delete it")
    if way == "delete":
        shutil.rmtree(other.out)
    else:
        other = replace(other, out=tmp_path / "another")
    other.run()
    read(other.out)


def test_a_directory_of_other_shards_is_refused_before_the_source_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "x_train.bin", np.arange(9, dtype=np.uint16))
    with monkeypatch.context() as patch:
        patch.setattr(Text, "source", lambda _: pytest.fail("the source was opened first"))
        advice(command(tmp_path).run, "choose another --out")
    command(tmp_path, out=tmp_path / "another").run()


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_another_field(kind: str, tmp_path: Path) -> None:
    rows = [{"text": {"a": 1}, "id": 3, "body": "first", "title": "second"}]
    path = tmp_path / f"a{kind}"
    if kind == ".jsonl":
        path.write_text(json.dumps(rows[0]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    chosen = command(tmp_path, paths=(str(path),), val_tokens=None)
    for field, text in (("body", "first"), ("title", "second")):
        found = advice(chosen.run, r"no text (?:column|in) 'text' \(.*\); choose --text-field among (.*)$")
        assert found[1].replace("'", "").split(", ") == ["body", "title"]
        other = replace(chosen, text_field=field, out=tmp_path / field)
        other.run()
        assert texts_of(other.out, "train") == [text]


def test_no_field_with_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": {"a": "deep"}}\n')
    chosen = command(tmp_path, paths=(str(path),), val_tokens=None)
    advice(chosen.run, r"no text in 'text' \(an object\); no other field holds text.*: write the texts into a field")
    path.write_text('{"text": "deep"}\n')
    chosen.run()
    assert texts_of(chosen.out, "train") == ["deep"]


@pytest.mark.parametrize(("name", "encoding"), [("a.txt", "latin-1"), ("a.txt", "utf-16"), ("a.jsonl", "utf-16")])
def test_text_that_is_not_utf_8(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(('{"text": "Straße"}\n' if name == "a.jsonl" else "Straße").encode(encoding))
    chosen = command(tmp_path, paths=(str(path),), val_tokens=None)
    found = advice(chosen.run, r"not UTF-8 text.*; convert it, for instance by: (iconv .*)$")
    if shutil.which("iconv") is None:
        pytest.skip("needs iconv, which the advice names")
    path.write_bytes(subprocess.run([*found[1].split(), str(path)], check=True, capture_output=True).stdout)
    chosen.run()
    assert texts_of(chosen.out, "train") == ["Straße"]


def test_packed_files(tmp_path: Path) -> None:
    packed = tmp_path / "in" / "a.txt.xz"
    packed.parent.mkdir()
    packed.write_bytes(lzma.compress(b"text"))
    for argument in (packed, packed.parent):
        chosen = command(tmp_path, paths=(str(argument),), val_tokens=None, out=tmp_path / "out" / argument.name)
        advice(chosen.run, "unpack it first" if argument == packed else r"holds 1 \.txt\.xz")
    packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    chosen.run()
    assert texts_of(chosen.out, "train") == ["text"]


def test_a_path_given_twice(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    advice(command(tmp_path, paths=(str(file), str(file))).run, "given twice")
    advice(command(tmp_path, paths=(str(file), str(tmp_path))).run, "given twice, also as part of")
    command(tmp_path, paths=(str(file),)).run()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    length=st.sampled_from([8, 64, 1024]),
    micro=st.sampled_from([1, 4]),
    micro_steps=st.integers(1, 8),
    ranks=st.integers(1, 3),
)
def test_too_little_data_for_a_step(tokens: list[int], length: int, micro: int, micro_steps: int, ranks: int) -> None:
    shards = [Shard(path=Path("data/train.bin"), tokens=count) for count in tokens]
    plan = BatchPlan(
        micro_batch_size=micro,
        sequence_length=length,
        total_batch_size=length * micro * micro_steps * ranks,
        world_size=ranks,
    )
    windows = Windows(shards, length)
    if len(windows) >= plan.sequences_per_step:
        return require_one_step(windows, plan)
    if max(tokens) <= ranks:
        advice(lambda: require_one_step(windows, plan), "prepare more data$")
        return None
    flags = advice(lambda: require_one_step(windows, plan), r"or give (--.*)$")[1].split()
    values = {name[2:].replace("-", "_"): int(value) for name, value in zip(flags[::2], flags[1::2], strict=True)}
    followed = replace(plan, **values)
    return require_one_step(Windows(shards, followed.sequence_length), followed)


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 5000), micro=st.integers(1, 5), length=st.integers(1, 100), ranks=st.integers(1, 5))
def test_a_batch_that_does_not_divide(total: int, micro: int, length: int, ranks: int) -> None:
    def plan(size: int) -> BatchPlan:
        return BatchPlan(micro_batch_size=micro, sequence_length=length, total_batch_size=size, world_size=ranks)

    if total % (micro * length * ranks) == 0:
        plan(total)
        return
    for size in re.findall(r"\d+", advice(lambda: plan(total), r"use (\d+(?: or \d+)?)$")[1]):
        assert plan(int(size)).grad_accum_steps >= 1


def test_numbers_that_could_not_be_written_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    choice = ModelChoice(model="nowhere", device="cpu", json=tmp_path / "file" / "numbers.json")
    with pytest.raises(NotADirectoryError, match="file"), open_model(choice):
        pass
    with pytest.raises(NotADirectoryError, match="file"):
        bench.require_places(bench.Bench(json=tmp_path / "file" / "numbers.json"))
    bench.require_places(bench.Bench(json=tmp_path / "new" / "numbers.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib"):
        bench.require_places(bench.Bench(plot=tmp_path / "ladder.png"))


@pytest.mark.parametrize("make", [command, lambda _, **changes: HellaSwag(dataset="x", **changes)])
def test_a_place_that_cannot_be_written_is_refused_before_the_source_is_read(
    make: Callable[..., Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Text, "source", lambda _: pytest.fail("the source was opened first"))
    with pytest.raises(NotADirectoryError, match="file"):
        make(tmp_path, out=tmp_path / "file" / "out").run()
