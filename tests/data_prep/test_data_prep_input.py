"""What data preparation is given, and what it says of it: any type of text, what is left out, too little of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import manifest, run_here, texts_of, write_jsonl
from drivers import warm
from running import checkpoint, metrics, tree, write_shards

from data_prep import output
from data_prep.commands import Hub, Shards, Text
from data_prep.encoding import EncodedChunk
from data_prep.files import Files
from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import Manifest, ShardRecord, write_manifest
from gpt2_ddp.system import files

TYPES: dict[str, Any] = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
}
TEXTS = ["first", None, "zweites äöü", "", "日本語"]
KEPT = [text for text in TEXTS if text]


pytestmark = pytest.mark.usefixtures("tokenized_here")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf")
    datasets.disable_progress_bars()


def write_parquet(folder: Path, kind: Any) -> Path:
    folder.mkdir()
    values = TEXTS if not str(kind).count("binary") else [text and text.encode() for text in TEXTS]
    plain = pa.array(values, pa.string() if isinstance(kind, pa.DictionaryType) else kind)
    column = plain.cast(kind) if isinstance(kind, pa.DictionaryType) else plain
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": column}), folder / "train.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_text_of_any_arrow_type(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_parquet(tmp_path / "data", TYPES[name])
    assert pq.read_schema(folder / "train.parquet").field("text").type == TYPES[name]
    assert run_here(Text(paths=(str(folder),), out=tmp_path / "text", val_fraction=0)) == KEPT
    for streaming in (False, True):
        out = tmp_path / f"hub{streaming}"
        assert run_here(Hub(dataset=str(folder), out=out, val_fraction=0, streaming=streaming)) == KEPT
    assert capsys.readouterr().out.count("left out: 2 documents without text\n") == 3


class Tagged(pa.ExtensionType):
    """A type that extends strings, as other libraries make them."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "a.test")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Tagged:
        return cls()


def test_text_of_a_type_that_extends_strings(tmp_path: Path) -> None:
    array = pa.ExtensionArray.from_storage(Tagged(), pa.array(TEXTS))
    pa.register_extension_type(Tagged())
    try:
        pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
        assert pq.read_schema(tmp_path / "a.parquet").field("text").type == Tagged()
        assert run_here(Text(paths=(str(tmp_path / "a.parquet"),), out=tmp_path / "out", val_fraction=0)) == KEPT
    finally:
        pa.unregister_extension_type("a.test")


@pytest.mark.parametrize("streaming", [None, False, True])
def test_bytes_that_are_no_text_are_named_by_their_row(streaming: bool | None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": [b"good", b"b\xffd"]}), folder / "train.parquet")
    command: Shards = Text(paths=(str(folder),), out=tmp_path / "out")
    if streaming is not None:
        command = Hub(dataset=str(folder), out=tmp_path / "out", streaming=streaming)
    with pytest.raises(ValueError, match="row 1: not UTF-8 text at byte 1 of it; convert it"):
        run_here(command)


def test_a_string_column_that_was_never_checked(tmp_path: Path) -> None:
    good = pa.array([b"g", b"\xff"])
    column = pa.Array.from_buffers(pa.string(), 2, good.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0, rows 0 to 1: not UTF-8 text"):
        run_here(Text(paths=(str(tmp_path / "a.parquet"),), out=tmp_path / "out"))


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ["one", None, "two", ""])
    for name in ("b.jsonl.bz2", "deep/c.jsonl.bz2", "t.tar.gz", "d.TXT", "README.md", ".hidden", "Makefile"):
        (folder / name).write_bytes(b"x")
    (folder / "empty.txt").touch()
    (folder / "linked").symlink_to(folder / "deep")
    assert run_here(Text(paths=(str(folder),), out=tmp_path / "out", val_fraction=0)) == ["one", "two"]
    told = capsys.readouterr().out
    listed = "2 .jsonl.bz2, 1 .tar.gz, 1 .md, 1 .TXT, 1 empty, 1 hidden, 1 linked folder, 1 without a suffix"
    assert sorted(listed.split(", ")) == sorted(told.split("left out: ")[1].split(" (unpack")[0].split(", "))
    assert "left out: 2 documents without text\n" in told
    run_here(Text(paths=(str(folder / "a.jsonl"),), out=tmp_path / "one", val_fraction=0))
    assert "jsonl.bz2" not in capsys.readouterr().out


def test_a_folder_with_files_alone_that_are_packed_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").touch()
    with pytest.raises(ValueError, match=r"no \.txt, \.jsonl, \.parquet file in .*, which holds 1 \.jsonl\.xz"):
        Files(paths=(str(tmp_path),), text_field="text")
    with pytest.raises(ValueError, match=r"a\.jsonl\.xz: not a file that ends in .*; unpack it first"):
        Files(paths=(str(tmp_path / "a.jsonl.xz"),), text_field="text")


@pytest.mark.parametrize("flags", [{}, {"val_tokens": 1000}, {"val_fraction": 0.5}])
def test_too_little_text_for_a_validation_split_is_training_data(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one short text")
    command = Text(paths=(str(tmp_path / "a.txt"),), out=tmp_path / "out", shard_tokens=2, **flags)
    command.run()
    assert texts_of(command.out, "train") == ["one short text"]
    assert manifest(command.out)["documents"] == {"train": 1, "val": 0}
    assert [shard.tokens for shard in find_shards(command.out, "train")] == [2, 2]
    assert sorted(path.name for path in command.out.iterdir()) == [
        *("manifest.json", "train_000000.bin", "train_000001.bin")
    ]
    assert "too little text for a validation split: all of it is training data" in capsys.readouterr().out
    before = tree(command.out)
    command.run()
    assert tree(command.out) == before


def test_a_long_text_file_trains_and_its_short_rest_validates(tmp_path: Path) -> None:
    paragraphs = "".join(f"Paragraph {number} of a book.\n\n" for number in range(2800))
    (tmp_path / "a.txt").write_text(paragraphs)
    run_here(Text(paths=(str(tmp_path / "a.txt"),), out=tmp_path / "out"))
    [long], [rest] = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert long + rest == paragraphs
    assert 0 < 5 * len(rest) < len(long)


@pytest.mark.parametrize(("fraction", "in_val"), [(0.999999, "bcd"), (1e-9, "b")])
def test_the_first_text_trains_and_the_second_validates_wherever_they_come_again(
    fraction: float, in_val: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fraction, and also where the preparation is interrupted."""
    texts = list("aabcdacbda")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1)  # a chunk of one document each
    write = output.ShardWriter.write

    def interrupted(writer: output.ShardWriter, chunk: EncodedChunk) -> None:
        if writer.manifest.next_chunk == stop:
            raise KeyboardInterrupt
        write(writer, chunk)

    for stop in (1, 2, 3, 6):
        out = tmp_path / str(stop)
        command = Text(paths=(str(tmp_path / "a.parquet"),), out=out, shard_tokens=1, workers=1, val_fraction=fraction)
        with monkeypatch.context() as patch:
            patch.setattr(output.ShardWriter, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                command.run()
        assert manifest(out)["next_chunk"] == stop
        command.run()
        assert texts_of(out, "val") == [text for text in texts if text in in_val]
        assert texts_of(out, "train") == [text for text in texts if text not in in_val]


@pytest.mark.parametrize("written", [1, 2, 3])
def test_killed_while_the_shards_become_training_data(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says so first; whatever rename is the last, a restart does the others."""
    (tmp_path / "a.txt").write_text("one short text")
    command = Text(paths=(str(tmp_path / "a.txt"),), out=tmp_path / "out", shard_tokens=1, val_tokens=1000)
    renames = iter(range(100))

    def rename(source: Path, target: Path) -> None:
        if source.name.startswith("val") and source.suffix == ".bin" and next(renames) + 1 == written:
            raise KeyboardInterrupt
        files.rename(source, target)

    monkeypatch.setattr(output, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        command.run()
    monkeypatch.setattr(output, "rename", files.rename)
    assert run_here(command) == ["one short text"]
    assert not list(command.out.glob("val*"))


def test_parts_of_an_attempt_that_came_to_nothing_are_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Text(paths=(str(write_jsonl(tmp_path / "a.jsonl", ["a", "b"])),), out=tmp_path / "out", val_fraction=0)
    with monkeypatch.context() as patch:
        patch.setattr(output.ShardWriter, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.run()
    assert (first.out / "train_000000.bin.part").exists()
    (tmp_path / "b.txt").write_text("one short text")
    Text(paths=(str(tmp_path / "b.txt"),), out=first.out, val_tokens=1000).run()
    assert texts_of(first.out, "train") == ["one short text"]
    assert sorted(path.name for path in first.out.iterdir()) == ["manifest.json", "train_000000.bin"]
    (first.out / "manifest.json").unlink()
    (first.out / "train_000000.bin").rename(first.out / "train_000000.bin.part")
    with pytest.raises(ValueError, match=r"holds train_000000\.bin\.part, which was not made here"):
        first.run()


def test_a_pattern_below_a_hidden_folder_at_an_address(tmp_path: Path) -> None:
    (tmp_path / ".raw" / ".hidden").mkdir(parents=True)
    for name in ("a.txt", ".b.txt", ".hidden/c.txt"):
        (tmp_path / ".raw" / name).write_text(name)
    for number, pattern in enumerate(("*.txt", "?.txt", "[a].txt", "**")):
        command = Text(paths=(f"file://{tmp_path}/.raw/{pattern}",), out=tmp_path / str(number), val_fraction=0)
        assert run_here(command) == ["a.txt"]
    with pytest.raises(ValueError, match="no file there"):
        Files(paths=(f"file://{tmp_path}/.raw/*/c.txt",), text_field="text")


def test_data_without_a_validation_split_train_without_validation(tmp_path: Path) -> None:
    """Unless another --val-every than the default asks for it, whose error says what to do."""
    data_dir = write_shards(tmp_path / "data", val_tokens=())
    documents: dict[Any, int] = {"train": 1, "val": 0}
    records = tuple(
        ShardRecord(name=shard.path.name, tokens=shard.tokens, sha256="0" * 64)
        for shard in find_shards(data_dir, "train")
    )
    told = Manifest(
        source="", revision="", settings={}, documents=documents, shards=records, complete=True, next_chunk=1,
        unfinished={"train": 0, "val": 0},
    )  # fmt: skip
    write_manifest(data_dir, told)
    refusal = warm.train(tmp_path / "run", data_dir, "--max-steps", "1", "--val-every", "5", status=2)
    mend = f"train without by --val-every 0, or delete {data_dir} and prepare it again, of several documents"
    assert mend in refusal.stderr
    done = warm.train(tmp_path / "run", data_dir, "--max-steps", "1", "--val-every", "250")
    assert f"{data_dir} has no validation split: training without validation" in done.stdout
    assert checkpoint(tmp_path / "run", 1).exists()
    assert not metrics(tmp_path / "run", "val")
    (data_dir / "manifest.json").unlink()
    refusal = warm.train(tmp_path / "run", data_dir, "--max-steps", "2", "--val-every", "250", status=2)
    assert mend in refusal.stderr
