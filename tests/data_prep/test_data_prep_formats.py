"""However a file is cut into pieces, its documents are the same, each once."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import files, formats
from data_prep.files import Files
from data_prep.formats import (
    DOCUMENT_BYTES,
    ParquetRows,
    Piece,
    json_documents,
    parquet_pieces,
    text_documents,
)
from data_prep.split import ValidationSplit, whole_documents
from gpt2_ddp.model.vocabulary import EOT

SEPARATORS = ["\n\n", "\n", " ", "\r\n\r\n", "日本", "é", ""]


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 90_000), st.sampled_from(SEPARATORS)), min_size=1, max_size=6),
    chunk=st.integers(1, 4),
)
def test_a_text_file_is_cut_into_all_of_itself(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, str]], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = "".join("é" * (length // 2) + separator for length, separator in parts)
    path.write_bytes(text.encode())
    size = len(text.encode())
    step = chunk * DOCUMENT_BYTES
    pieces = [Piece(path=path, start=start, stop=min(start + step, size)) for start in range(0, size, step)]
    found = [document for piece in pieces for document in text_documents(piece)]
    assert "".join(found) == text
    assert all(len(document.encode()) <= 2 * DOCUMENT_BYTES for document in found)
    whole = Piece(path=path, start=0, stop=size)
    assert [document for document in found if document] == [part for part in text_documents(whole) if part]


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\n\n"]), min_size=12, max_size=12),
    cuts=st.lists(st.integers(1, 400), max_size=8),
    last=st.booleans(),
)
def test_every_line_is_in_one_piece(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ends: list[str], cuts: list[int], last: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text}) + end for text, end in zip(texts, ends, strict=False)]
    contents = "".join(lines) if last else "".join(lines).rstrip("\r\n")
    path.write_text(contents, newline="")
    bounds = sorted({0, len(contents), *(cut for cut in cuts if cut < len(contents))})
    pieces = [Piece(path=path, start=start, stop=stop) for start, stop in pairwise(bounds)]
    assert [text for piece in pieces for text in json_documents(piece, "text")] == texts


@settings(max_examples=30, deadline=None)
@given(
    group=st.integers(100, 3000),
    rows=st.integers(1, 6000),
    piece_bytes=st.integers(100, 20_000),
    taken=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_a_worker_finds_its_rows_whichever_it_gets(
    tmp_path_factory: pytest.TempPathFactory, group: int, rows: int, piece_bytes: int, taken: list[bool]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    pq.write_table(
        pa.table({"id": range(rows), "text": [f"row {row}" for row in range(rows)]}), path, row_group_size=group
    )
    reader = ParquetRows(path, "text")
    assert [piece.row_group for piece in parquet_pieces(path, "text")] == list(range(math.ceil(rows / group)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PARQUET_BYTES", piece_bytes)
        pieces = list(parquet_pieces(path, "text"))
    cut = rows > 1 and pq.read_metadata(path).row_group(0).total_byte_size > piece_bytes
    assert len(pieces) > math.ceil(rows / group) or not cut
    seen = 0
    for number, piece in enumerate(pieces):
        first = piece.row_group * group + piece.start
        assert first == seen
        seen = piece.row_group * group + piece.stop
        if not taken[number % len(taken)]:
            continue
        assert list(reader.take(piece)) == [f"row {row}" for row in range(first, seen)]
        if number % 5 == 0:
            assert list(reader.take(piece)) == [f"row {row}" for row in range(first, seen)]
    assert seen == rows


def test_text_cut_otherwise_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are counted to go on after an interruption, so the count must be of the same ones."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    before = Files(paths=(str(tmp_path),), text_field="text").revision
    assert Files(paths=(str(tmp_path),), text_field="text").revision == before
    monkeypatch.setattr(files, "PARQUET_BYTES", files.PARQUET_BYTES // 2)
    assert Files(paths=(str(tmp_path),), text_field="text").revision != before


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=20), shard=st.integers(1, 12))
def test_documents_are_found_again_across_shards(lengths: list[int], shard: int) -> None:
    documents = [np.array([50256, *range(length - 1)], np.uint16) for length in lengths]
    tokens = np.concatenate([np.array([], np.uint16), *documents])
    shards = [tokens[start : start + shard] for start in range(0, len(tokens), shard)]
    assert [found.tolist() for found in whole_documents(shards, EOT)] == [document.tolist() for document in documents]


@settings(max_examples=50, deadline=None)
@given(
    digests=st.lists(st.integers(0, 5) | st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    cut=st.integers(0, 40),
    tokens=st.sampled_from([None, 0, 1, 25, 1000]),
    fraction=st.sampled_from([0.0, 0.25, 0.9]),
)
def test_equal_documents_share_a_split_however_they_arrive(
    digests: list[int], cut: int, tokens: int | None, fraction: float
) -> None:
    def chosen(*bounds: int) -> list[bool]:
        split = ValidationSplit(tokens=tokens, fraction=fraction, trained=[], taken=[])
        parts = [np.array(digests[start:stop], np.uint64) for start, stop in pairwise(bounds)]
        return [bool(value) for part in parts for value in split.choose(np.full(len(part), 10), part)]

    at_once = chosen(0, len(digests))
    assert chosen(0, min(cut, len(digests)), len(digests)) == at_once
    assert len(set(zip(digests, at_once, strict=True))) == len(set(digests))
    if tokens is None:
        first, second = digests[0], next((digest for digest in digests if digest != digests[0]), None)
        below = [digest < fraction * 2**64 or (fraction > 0 and digest == second) for digest in digests]
        assert at_once == [low and digest != first for low, digest in zip(below, digests, strict=True)]
    else:
        assert at_once[0] == (tokens > 0)
        assert sum(at_once) * 10 >= min(tokens, 10 * len(digests))
