"""Packed text, and text at an address, makes the shards of the same text as a file here."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import documents, manifest, refused, texts_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from running import sha256

from data_prep import files, formats, output
from data_prep.commands import Text
from data_prep.encoding import EncodedChunk
from data_prep.files import Files
from data_prep.formats import DOCUMENT_BYTES, packed_pieces
from gpt2_ddp.system.errors import UserError

CHUNK = 2 * DOCUMENT_BYTES


def in_two_members(contents: bytes) -> bytes:
    """As `cat a.gz b.gz` makes one."""
    return gzip.compress(contents[:1000], 1) + gzip.compress(contents[1000:], 1)


def zstandard(contents: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(contents, asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": in_two_members, ".zst": zstandard}


pytestmark = pytest.mark.usefixtures("tokenized_here")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, formats):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book and short documents, of which each is several chunks."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "b.txt").write_text("\n\n".join(documents(90)))
    write_jsonl(folder / "a.jsonl", documents(60))
    return folder


def packed(folder: Path, suffix: str, out: Path) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        (out / (path.name + suffix)).write_bytes(PACKERS[suffix](path.read_bytes()))
    return out


def shards(source: object, out: Path, **flags: Any) -> dict[str, str]:
    """SHA-256 of the shards that `data_prep text` makes."""
    Text(paths=(str(source),), out=out, shard_tokens=20_000, val_fraction=0.1, workers=1, **flags).run()
    return {path.name: sha256(path) for path in out.glob("*.bin")}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_text_makes_the_shards_of_the_text_wherever_it_was_interrupted(
    suffix: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shards(texts, tmp_path / "plain")
    source, out = packed(texts, suffix, tmp_path / "packed"), tmp_path / "out"
    write = output.ShardWriter.write
    stops = iter((1, 2, 4, 5))

    def interrupted(writer: output.ShardWriter, chunk: EncodedChunk) -> None:
        if writer.manifest.next_chunk == stop:
            raise KeyboardInterrupt
        write(writer, chunk)

    monkeypatch.setattr(output.ShardWriter, "write", interrupted)
    monkeypatch.setattr(output, "COMMIT_TOKENS", 1)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            shards(source, out)
        assert manifest(out)["next_chunk"] == stop
    stop = -1
    assert shards(source, out) == plain
    assert len(plain) > 5


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 90_000), st.sampled_from(["\n\n", "\n", " ", "\r\n", "é"])), max_size=8),
    suffix=st.sampled_from([*PACKERS]),
    kind=st.sampled_from([".txt", ".jsonl"]),
)
def test_documents_are_those_of_the_unpacked_file(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, str]], suffix: str, kind: str
) -> None:
    pieces = ["é" * (length // 2) + separator for length, separator in parts] or ["a"]
    path = tmp_path_factory.mktemp("pieces") / f"a{kind}"
    lines = "".join(json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in pieces)
    path.write_bytes(("".join(pieces) if kind == ".txt" else lines).encode())
    packed_path = path.with_name(path.name + suffix)
    packed_path.write_bytes(PACKERS[suffix](path.read_bytes()))
    found = [
        [text for chunk in source.chunks(0) for text in source.documents(chunk)]
        for source in (Files(paths=(str(each),), text_field="text") for each in (path, packed_path))
    ]
    assert found[0] == found[1]


def test_what_a_packed_file_is_by_its_name(tmp_path: Path) -> None:
    for name in ("notes.gz", "more.txt.gz", "last.txt.zst"):
        (tmp_path / name).write_bytes(PACKERS[Path(name).suffix](name.encode()))
    for name in ("a.tar.gz", "b.parquet.gz"):
        (tmp_path / name).write_bytes(b"never opened")
    source = Files(paths=(str(tmp_path),), text_field="text")
    source.check()
    found = [text for chunk in source.chunks(0) for text in source.documents(chunk)]
    assert found == ["last.txt.zst", "more.txt.gz", "notes.gz"]
    assert source.left_out() == "1 .parquet.gz, 1 .tar.gz"


def flipped(contents: bytes) -> bytes:
    return contents[:-6] + bytes([contents[-6] ^ 1]) + contents[-5:]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".gz", lambda contents: contents[:-2000]),
        (".gz", lambda contents: contents[:-5]),
        (".gz", flipped),
        (".gz", lambda _: b"no gzip at all"),
        (".zst", lambda contents: contents[:-2000]),
        (".zst", lambda _: b"no zstd at all"),
    ],
)
def test_a_file_that_was_cut_short_is_told_before_anything_is_written(
    suffix: str, damage: Callable[[bytes], bytes], texts: Path, tmp_path: Path
) -> None:
    source = packed(texts, suffix, tmp_path / "packed")
    last = source / f"b.txt{suffix}"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UserError, match=rf"b\.txt\{suffix}: cut short or damaged \(.*\); get it again") as told:
        shards(source, tmp_path / "out")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cut short or damaged"):  # where it was not looked for, as at an address
        list(packed_pieces(last))


def test_what_was_begun_stands_where_an_address_ends_early(texts: Path, tmp_path: Path, memory: Any) -> None:
    """It is not read beforehand; what was tokenized is committed when its turn comes."""
    contents = in_two_members((texts / "b.txt").read_bytes())
    memory.pipe("/cut/b.txt.gz", contents[:-2000])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"memory:///cut/b\.txt\.gz: cut short or damaged"):
        shards("memory://cut", out)
    assert not manifest(out)["complete"]
    assert manifest(out)["next_chunk"] >= 1


def test_a_command_that_meets_a_cut_file_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-9])
    told = refused("text", tmp_path / "a.txt.gz", "--out", tmp_path / "out", "--workers", 1)
    assert told.startswith(f"error: {tmp_path / 'a.txt.gz'}: cut short or damaged (EOFError")


def test_errors_name_the_line_and_the_byte(tmp_path: Path) -> None:
    lines = b'{"text": "fine"}\n' * 20_000 + b"\n{broken\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 20002: not JSON"):
        shards(tmp_path / "a.jsonl.gz", tmp_path / "out")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\n" * 300_000 + b"\xff", 1))
    with pytest.raises(UserError, match=r"a\.txt\.gz: not UTF-8 text at byte 300000"):
        shards(tmp_path / "a.txt.gz", tmp_path / "other")


def test_a_bomb_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that unpacks to a thousand times its size is read in pieces; as one line of JSON it is refused."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(b"a" * (1 << 20)) for _ in range(60)) + packer.flush()
    for name in ("a.txt.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(bomb)
    monkeypatch.setattr(formats, "LINE_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        assert sum(piece.stop - piece.start for piece in packed_pieces(tmp_path / "a.txt.gz")) == 60 << 20
        with pytest.raises(UserError, match=r"b\.jsonl\.gz, line 1: more than 1,048,576 bytes; split it, or unpack"):
            list(packed_pieces(tmp_path / "b.jsonl.gz"))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in this process's memory, empty."""
    held = fsspec.filesystem("memory")
    held.store.clear()
    held.pseudo_dirs[:] = [""]
    yield held
    held.store.clear()


def test_addresses_make_the_shards_of_the_same_files_here(texts: Path, tmp_path: Path, memory: Any) -> None:
    pq.write_table(pa.table({"text": documents(40)}), tmp_path / "c.parquet", row_group_size=15)
    here = tmp_path / "here"
    (here / "deep").mkdir(parents=True)
    for path, name in ((texts / "a.jsonl", "deep/a.jsonl"), (texts / "b.txt", "b.txt"), (tmp_path / "c.parquet",) * 2):
        contents = path.read_bytes()
        target = here / (name if isinstance(name, str) else name.name)
        target.write_bytes(contents)
        memory.pipe(f"/texts/{target.relative_to(here)}", contents)
    memory.pipe("/texts/.hidden.txt", b"\xff")
    memory.pipe("/texts/page.html", b"\xff")
    expected = shards(here, tmp_path / "1")
    assert shards("memory://texts", tmp_path / "2") == expected
    assert manifest(tmp_path / "2")["source"] == "memory://texts, field text"
    assert Files(paths=("memory://texts",), text_field="text").left_out() == "1 .html"
    assert shards("memory://texts/b.txt", tmp_path / "3") == shards(here / "b.txt", tmp_path / "4")
    assert shards("memory://texts/**/*.jsonl", tmp_path / "5") == shards(here / "deep", tmp_path / "6")
    memory.pipe("/packed/b.txt.gz", in_two_members((texts / "b.txt").read_bytes()))
    assert shards("memory://packed", tmp_path / "7") == shards(here / "b.txt", tmp_path / "8")


def test_an_address_that_changed_is_another_version(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/a.txt", b"some words")
    shards("memory://a.txt", tmp_path)
    assert texts_of(tmp_path, "train") == ["some words"]
    memory.pipe("/a.txt", b"more words")
    with pytest.raises(UserError, match="was prepared with its version"):
        shards("memory://a.txt", tmp_path)


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (("memory://none/here",), "memory://none/here: no such file, folder or bucket"),
        (("memory://there/*.jsonl",), r"memory://there/\*\.jsonl: no file there"),
        (
            ("memory://there/page.html",),
            "no .txt, .jsonl, .parquet file in memory://there/page.html, which holds 1 .html",
        ),
        (("memory://there", "memory://there/a.txt"), "memory:///there/a.txt: given twice"),
        (("nosuch://there",), "nosuch://there: ValueError: Protocol not known: nosuch"),
        (("zip://a.txt::memory://there/a.zip",), "addresses within addresses"),
    ],
)
def test_addresses_that_cannot_be_read(addresses: tuple[str, ...], said: str, memory: Any) -> None:
    memory.pipe("/there/a.txt", b"words")
    memory.pipe("/there/page.html", b"words")
    with pytest.raises(UserError, match=said):
        Files(paths=addresses, text_field="text")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(UserError, match=rf"s3://b/a\.txt: .* pip install s3fs=={fsspec.__version__}$"):
        Files(paths=("s3://b/a.txt",), text_field="text")
    with pytest.raises(UserError, match=r"abfs://b/a\.txt: .* pip install adlfs$"):
        Files(paths=("abfs://b/a.txt",), text_field="text")


def test_what_a_server_answers_is_told_in_one_line(texts: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b.txt", (texts / "b.txt").read_bytes())
    source = Files(paths=("memory://b.txt",), text_field="text")
    [chunk, *_] = source.chunks(0)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the token\nhas expired")

    monkeypatch.setattr(type(memory), "open", refuse)
    with pytest.raises(
        UserError, match=r"memory:///b\.txt: RuntimeError: the token has expired; .* same command goes on"
    ):
        list(source.documents(chunk))
