"""Which version of a data set is read: by a hub on this machine, whose branches move on, and without a network."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import manifest, run_here

from data_prep import output, sources
from data_prep.commands import Hub
from data_prep.encoding import EncodedChunk
from gpt2_ddp.system.errors import UserError

COPY = "refs/convert/parquet"
NAME = "owner/name"

pytestmark = pytest.mark.usefixtures("tokenized_here")


def table(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


class FakeHub:
    """Commits of one data set, and the branches that name them."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.asked = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        number = f"{len(self.files) + 1:040x}"
        self.files[number], self.branches[branch] = files, number
        return number

    def tree(self, commit: str, folder: str, *, recursive: bool = False) -> list[dict[str, Any]]:
        prefix, found = f"{folder}/" if folder else "", dict[str, dict[str, Any]]()
        for path, contents in self.files[commit].items():
            parts = path.removeprefix(prefix).split("/") if path.startswith(prefix) else []
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                place = prefix + "/".join(parts[:depth])
                found[place] = {"type": "directory", "path": place, "oid": "0"}
            if parts and (recursive or len(parts) == 1):
                found[path] = {"type": "file", "path": path, "oid": "0", "size": len(contents)}
        return list(found.values())

    def answer(self, address: str, asked: bytes) -> tuple[int, str, bytes]:
        """Status, commit and contents."""
        self.asked += 1
        path, query = urlsplit(address).path, urlsplit(address).query
        api, _, rest = path.partition(f"/datasets/{NAME}")
        kind, _, rest = rest.removeprefix("/").partition("/")
        revision, _, place = rest.partition("/")
        revision, place = unquote(revision or "main"), unquote(place)
        commit = self.branches.get(revision, revision)
        if commit not in self.files:
            return 404, "", b"RevisionNotFound"
        if kind in ("", "revision"):
            return 200, commit, json.dumps({"id": NAME, "sha": commit}).encode()
        if kind == "tree":
            found = self.tree(commit, place, recursive="ecursive=true" in query.lower())
            return (200, commit, json.dumps(found).encode()) if found else (404, commit, b"EntryNotFound")
        if kind == "paths-info":
            everything = self.tree(commit, "", recursive=True)
            wanted = json.loads(asked)["paths"]
            return 200, commit, json.dumps([entry for entry in everything if entry["path"] in wanted]).encode()
        there = not api and kind == "resolve" and place in self.files[commit]
        return (200, commit, self.files[commit][place]) if there else (404, commit, b"EntryNotFound")


def server_for(hub: FakeHub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, commit, contents = hub.answer(self.path, asked)
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha256(contents).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(contents)))
            if status == 404:
                self.send_header("X-Error-Code", contents.decode())
            self.end_headers()
            self.wfile.write(contents if self.command != "HEAD" else b"")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    found = FakeHub()
    server = server_for(found)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    datasets.disable_progress_bars()
    yield found
    server.shutdown()
    server.server_close()
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def _a_row_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_ROWS", 1)
    monkeypatch.setattr(sources, "STREAM_ROWS", 1)


def preparation(out: Path, **choices: Any) -> Hub:
    return Hub(**{"dataset": NAME, "out": out, "val_fraction": 0, "shard_tokens": 1} | choices)


def interrupt(command: Hub) -> None:
    """Run it until its first chunk is committed."""
    write = output.ShardWriter.write

    def one(writer: output.ShardWriter, chunk: EncodedChunk) -> None:
        if writer.manifest.next_chunk:
            raise KeyboardInterrupt
        write(writer, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output.ShardWriter, "write", one)
        with pytest.raises(KeyboardInterrupt):
            command.run()
    assert manifest(command.out)["next_chunk"] == 1


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_begun_goes_on_with_its_version(hub: FakeHub, tmp_path: Path, streaming: bool) -> None:
    first = hub.commit("main", {"train.parquet": table("a", "b", "c")})
    command = preparation(tmp_path / "out", streaming=streaming)
    interrupt(command)
    second = hub.commit("main", {"train.parquet": table("x", "y")})
    told = f"prepared with version {first}, and --revision main is {second}; leave it out or give --revision {first} to"
    with pytest.raises(UserError, match=told):
        replace(command, revision="main").run()
    shutil.copytree(command.out, tmp_path / "other")
    assert run_here(command) == ["a", "b", "c"]
    assert run_here(replace(command, out=tmp_path / "other", revision=first)) == ["a", "b", "c"]
    asked = hub.asked
    assert run_here(command) == ["a", "b", "c"]
    assert hub.asked == asked, "a directory that is complete needs no network"
    assert run_here(replace(command, out=tmp_path / "new")) == ["x", "y"]
    assert manifest(tmp_path / "new")["revision"] == second


def test_without_a_network_the_copy_in_the_cache_has_its_version(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.commit("main", {"train.parquet": table("a", "b")})
    command = preparation(tmp_path / "out")
    preparation(tmp_path / "cached").run()
    with monkeypatch.context() as patch:
        offline(patch)
        interrupt(command)
    assert manifest(command.out)["revision"] == first
    shutil.copytree(command.out, tmp_path / "other")
    with monkeypatch.context() as patch:
        offline(patch)
        assert run_here(replace(command, out=tmp_path / "other")) == ["a", "b"]
    second = hub.commit("main", {"train.parquet": table("x", "y")})
    preparation(tmp_path / "newer").run()
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(UserError, match=f"cache is version {second}, not {first}; run this where there is a net"):
            command.run()
    assert run_here(command) == ["a", "b"]


def test_the_parquet_copy_of_a_data_set(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("main", {"name.py": b""})
    splits = [(config, split) for config in ("one", "two") for split in ("train", "test")]
    hub.commit(COPY, {f"{config}/{split}/0000.parquet": table(config, split) for config, split in splits})
    command = preparation(tmp_path / "out", revision=COPY)
    with pytest.raises(UserError, match="its Parquet copy has one, two: choose one by --config"):
        command.run()
    chosen = replace(command, config="two")
    interrupt(chosen)
    shutil.copytree(chosen.out, tmp_path / "other")
    hub.commit(COPY, {"two/train/0000.parquet": table("x", "y")})
    assert run_here(chosen) == ["two", "train"]
    assert run_here(replace(chosen, revision=None, out=tmp_path / "other")) == ["two", "train"]
    assert run_here(replace(chosen, out=tmp_path / "new")) == ["x", "y"]


def test_a_parquet_copy_of_the_first_part_alone_says_so(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(COPY, {"only/partial-train/0000.parquet": table("a", "b"), "only/test/0000.parquet": table("c")})
    command = preparation(tmp_path / "out", revision=COPY)
    assert run_here(command) == ["a", "b"]
    assert f"{NAME}: its Parquet copy holds only the first part of only, in partial-train\n" in capsys.readouterr().out
    assert run_here(replace(command, out=tmp_path / "test", split="test")) == ["c"]
    assert "first part" not in capsys.readouterr().out
    offline(monkeypatch)
    with pytest.raises(UserError, match="its Parquet copy is read with a network only"):
        replace(command, out=tmp_path / "offline").run()
