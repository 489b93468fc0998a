"""Any bytes as a shard or a manifest: something consistent, or one clear error."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import manifest_for, shard_bytes

from gpt2_ddp.data.directory import find_shards
from gpt2_ddp.data.manifest import read_manifest, write_manifest

MUTATED = st.builds(
    lambda whole, at, new, cut: (whole[:at] + new + whole[at + len(new) :])[:cut],
    st.just(shard_bytes()),
    st.integers(0, 1030),
    st.binary(max_size=16),
    st.integers(0, 1040),
)
NPY_HEADERS = st.text("{}()[]'\"descr:<u2fortran_order,FalseTrueshape0123456789 \n\\", max_size=200).map(
    lambda text: b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + b"\1\0"
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["train_0.bin", "train_0.npy"]), st.one_of(st.binary(max_size=2000), MUTATED, NPY_HEADERS))
def test_any_bytes_are_a_shard_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, contents: bytes
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / name).write_bytes(contents)
    try:
        (shard,) = find_shards(directory, "train")
    except ValueError as error:
        refused = str(error)
    else:
        assert shard.open().tobytes() == contents[shard.offset :]
        return
    assert name in refused


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("source", "revision", "settings", "documents", "shards", "complete", "next_chunk", "unfinished", "tokenizer")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FIELDS),
    JSON | st.just([{"name": "../train_000000.bin", "tokens": 3, "sha256": "0" * 64}]),
    st.booleans(),
)
def test_a_manifest_with_any_field_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any, drop: bool
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "train_000000.bin").write_bytes(shard_bytes())
    write_manifest(directory, manifest_for(directory))
    whole = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**whole, field: value} if not drop else {field: value}))
    try:
        manifest = read_manifest(directory)
        find_shards(directory, "train")
    except ValueError as error:
        refused = str(error)
    else:
        assert manifest
        assert all(re.fullmatch(r"(train|val)_\d+\.bin", record.name) for record in manifest.shards)
        return
    assert str(directory) in refused
