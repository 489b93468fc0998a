"""Data sets through the `datasets` library, for real, on local Parquet files; and what is said without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import documents, kill_group, manifest, prepare, refused, start, texts_of
from running import sha256, wait_until

from data_prep.hub import opened, rows, write_hellaswag

FLAGS = ("--shard-tokens", 50_000, "--val-tokens", 20_000, "--text-field", "body")
EXAMPLE = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts pulling up roofing."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `datasets` reads: two splits, one in two files."""
    folder = tmp_path_factory.mktemp("dataset")
    texts = documents(420)
    for name, part in (("train-0", texts[:200]), ("train-1", texts[200:400]), ("test-0", texts[400:])):
        pq.write_table(pa.table({"id": range(len(part)), "body": part}), folder / f"{name}.parquet")
    return folder


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def shards(out: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in out.glob("*.bin")}


def test_mapped_streamed_and_interrupted_give_the_same_shards(dataset: Path, tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    prepare("hub", dataset, "--out", mapped, *FLAGS, "--workers", 1)
    assert texts_of(mapped, "val") + texts_of(mapped, "train") == documents(400)
    for attempt in range(5):  # a fast machine may be done before the signal comes
        streamed = tmp_path / f"streamed{attempt}"
        arguments = ("hub", dataset, "--streaming", "--out", streamed, *FLAGS, "--workers", 2)
        process = start(*arguments)
        wait_until(lambda out=streamed, run=process: manifest(out).get("next_chunk") or run.poll() is not None)
        kill_group(process)
        if not manifest(streamed)["complete"]:
            break
    assert manifest(streamed)["next_chunk"]
    assert not manifest(streamed)["complete"], "never in the middle"
    prepare(*arguments)
    assert shards(streamed) == shards(mapped)
    assert len(shards(mapped)) > 4
    assert str(dataset) in manifest(mapped)["source"]


def test_one_split_of_it(dataset: Path, tmp_path: Path) -> None:
    prepare("hub", dataset, "--split", "test", "--out", tmp_path, *FLAGS)
    assert texts_of(tmp_path, "val") + texts_of(tmp_path, "train") == documents(420)[400:]


def test_what_is_not_there_is_said_in_one_line(dataset: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "'text'; choose --text-field among body" in refused("hub", dataset, *out)
    assert "nosplit" in refused("hub", dataset, *out, *FLAGS, "--split", "nosplit")
    assert "not text" in refused("hub", dataset, *out, "--text-field", "id")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("hub", tmp_path / "empty", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["hub SomeOwner/some-name", "fineweb-edu", "hellaswag"])
def test_without_a_network_it_says_so(command: str, tmp_path: Path) -> None:
    said = refused(*command.split(), "--out", tmp_path / "out")
    assert "no network to the Hugging Face hub" in said
    assert not (tmp_path / "out").exists()


def hellaswag_directory(folder: Path, *changes: dict[str, Any]) -> Path:
    rows = [EXAMPLE | change for change in changes]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation-0.parquet")
    return folder


def test_hellaswag_as_json_lines(tmp_path: Path) -> None:
    source = hellaswag_directory(tmp_path / "source", {}, {"ind": 25, "label": "0", "ctx_b": ""})
    done = prepare("hellaswag", "--dataset", source, "--out", tmp_path / "out")
    path = tmp_path / "out" / "hellaswag_val.jsonl"
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    fields = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label", "source_id")
    assert first == {**{field: EXAMPLE[field] for field in fields}, "label": 3}
    assert (second["ind"], second["label"], second["ctx_b"]) == (25, 0, "")
    assert f"--data {path}" in done.stdout
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"label": ""}, {"label": "4"}, {"endings": ["one"]}])
def test_another_data_set_is_not_taken_for_hellaswag(change: dict[str, Any], tmp_path: Path) -> None:
    source = hellaswag_directory(tmp_path / "source", {}, change)
    with pytest.raises(ValueError, match="row 1: label"):
        write_hellaswag(str(source), split="validation", revision=None, path=tmp_path / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
    assert len(rows(opened(str(source), config=None, revision=""), str(source), split="validation")) == 2
