"""Where data preparation writes: nothing that was there before is read as its own, written over, or lost with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import run_here, tokenize_here, write_jsonl
from running import tree

from data_prep.commands import SHAKESPEARE, HellaSwag, Hub, Shakespeare, Shards, Text
from data_prep.encoding import OwnEncoder
from data_prep.tokenizers import TrainTokenizer
from gpt2_ddp.data import own_tokenizer as own
from gpt2_ddp.data.manifest import read_manifest, write_manifest

pytestmark = pytest.mark.usefixtures("tokenized_here")


def test_what_is_written_lies_apart_from_what_is_read(tmp_path: Path) -> None:
    texts, link = tmp_path / "in" / "texts", tmp_path / "link"
    texts.mkdir(parents=True)
    link.symlink_to(texts)
    pq.write_table(pa.table({"text": ["a text"]}), texts / "train.parquet")
    linked = tmp_path / "links" / "a.parquet"
    linked.parent.mkdir()
    linked.symlink_to(texts / "train.parquet")
    before = tree(tmp_path)
    named, file = str(texts), str(texts / "train.parquet")
    for paths, out, how in [
        ((named,), texts, "is"), ((named,), link, "is"), ((named,), link / "out", "lies in"),
        ((named,), tmp_path, "holds"), ((file,), link, "holds"), ((file,), tmp_path / "in", "holds"),
        ((f"file://{file}",), texts, "holds"), ((str(linked),), linked.parent, "holds"),
        ((f"{tmp_path}/in/*",), texts, "holds"), ((f"{tmp_path}/in/*/*.parquet",), texts, "holds"),
    ]:  # fmt: skip
        commands: list[Shards] = [Text(paths=paths, out=out)]
        commands += [Hub(dataset=named, out=out)] if paths == (named,) else []
        commands += [Shakespeare(file=Path(file), out=out)] if paths == (file,) else []
        for command in commands:
            with pytest.raises(ValueError, match=rf"--out {out} {how} .*, which is read: choose an --out apart from"):
                command.run()
    with pytest.raises(ValueError, match=rf"--out {texts} is {texts}, which is read"):
        HellaSwag(dataset=named, out=texts).run()
    assert tree(tmp_path) == before


def test_a_pattern_that_matches_what_was_prepared_beside_the_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    command = Text(paths=(f"{tmp_path}/*",), out=tmp_path / "data")
    assert run_here(command) == run_here(command) == ["a text"]


def test_shakespeare_keeps_its_text_beside_its_shards(tmp_path: Path) -> None:
    (tmp_path / SHAKESPEARE).write_text("a text")
    for file in (None, tmp_path / SHAKESPEARE):
        assert run_here(Shakespeare(out=tmp_path, file=file)) == ["a text"]


def test_a_tokenizer_of_the_user_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a preparation has put beside its shards is: until there are some, it can be asked for another one."""
    text, theirs, settings = tmp_path / "a.txt", tmp_path / "theirs", tmp_path / "settings" / "tokenizer_config.json"
    text.write_text("some words of a text")
    made = TrainTokenizer(paths=(str(text),), out=theirs, vocab_size=260)
    made.run()
    (theirs / settings.name).write_text('{"eos_token": "<|endoftext|>", "model_max_length": 512}')
    settings.parent.mkdir()
    settings.write_text("{}")
    before = tree(tmp_path)
    for there in (theirs / "tokenizer.json", settings):
        with pytest.raises(ValueError, match=f"{there} would be written over; choose another --out"):
            Text(paths=(str(text),), out=there.parent, tokenizer=str(theirs)).run()
    with pytest.raises(ValueError, match=f"{settings} is there already; choose another --out"):
        replace(made, out=settings.parent).run()
    assert tree(tmp_path) == before
    tokenize_here(monkeypatch, OwnEncoder(theirs))
    command = Text(paths=(str(text),), out=tmp_path / "data", tokenizer=str(theirs))
    command.run()
    first = tree(command.out)
    for path in command.out.glob("*.bin"):
        path.unlink()
    begun = read_manifest(command.out)
    assert begun is not None
    write_manifest(command.out, replace(begun, tokenizer="sha256:0", shards=(), complete=False, next_chunk=0))
    (command.out / "tokenizer.json").write_text("of a preparation that was interrupted at its start")
    command.run()
    assert tree(command.out) == first


def test_the_copy_of_a_tokenizer_goes_with_what_came_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, theirs = write_jsonl(tmp_path / "a.jsonl", [""]), tmp_path / "theirs"
    (tmp_path / "b.txt").write_text("some words of a text")
    TrainTokenizer(paths=(str(tmp_path / "b.txt"),), out=theirs, vocab_size=260).run()
    tokenize_here(monkeypatch, OwnEncoder(theirs))
    command = Text(paths=(str(file),), out=tmp_path / "out", tokenizer=str(theirs))
    with pytest.raises(ValueError, match="no document with text"):
        command.run()
    assert not list(command.out.iterdir())
    write_jsonl(file, ["some words"])
    command.run()
    assert {"manifest.json", "tokenizer.json", "tokenizer_config.json"} < {path.name for path in command.out.iterdir()}


def test_documents_begin_with_one_token_before_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, file = tmp_path / "theirs", tmp_path / "a.txt"
    file.write_text("some words of a text")
    TrainTokenizer(paths=(str(file),), out=theirs, vocab_size=260).run()
    tokenize_here(monkeypatch, OwnEncoder(theirs))
    command = Text(paths=(str(file),), out=tmp_path / "out", tokenizer=str(theirs))
    command.run()
    begun = read_manifest(command.out)
    assert begun is not None
    write_manifest(command.out, replace(begun, complete=False))
    (theirs / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    own.own_tokenizer.cache_clear()  # as in another process
    with pytest.raises(ValueError, match=r"prepared with the token that begins documents, id 0, now asked for \d+;"):
        command.run()


def test_each_split_of_hellaswag_has_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    texts = dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "ctx", "source_id"), "a text")
    for number, split in enumerate(("train", "validation")):
        row = texts | {"ind": number, "endings": ["a", "b", "c", "d"], "label": "0"}
        pq.write_table(pa.Table.from_pylist([row]), source / f"{split}.parquet")
    command = HellaSwag(dataset=str(source), out=out)
    command.run()
    val = (out / "hellaswag_val.jsonl").read_bytes()
    replace(command, split="train").run()
    replace(command, split="train[:1]").run()
    names = ["hellaswag_train.jsonl", "hellaswag_train_1.jsonl", "hellaswag_val.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    command.run()
    assert (out / names[-1]).read_bytes() == val
    (out / names[-1]).write_text("of another data set")
    with pytest.raises(ValueError, match=r"hellaswag_val\.jsonl is there with other contents; choose another --out"):
        command.run()
    assert (out / names[-1]).read_text() == "of another data set"
