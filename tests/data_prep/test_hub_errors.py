"""What the `datasets` library and the hub refuse: one line that says what to do, whichever error they raise."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_prep_runs import documents, refused

from data_prep.hub import hub_source, resolved_revision
from data_prep.sources import DatasetStream, Source
from gpt2_ddp.system.errors import user_error


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "hf"
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def source(folder: Path, **changes: Any) -> Source:
    choice: dict[str, Any] = {"config": None, "split": "train", "revision": None, "streaming": False}
    return hub_source(str(folder), text_field="text", **choice | changes)


def refusal(folder: Path, **changes: Any) -> str:
    """The one line of the error that opening the source, or reading it all, ends with."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        read(folder, **changes)
    line = user_error(caught.value)
    assert line is not None, "it is the user's, not a fault of the program"
    return line


def read(folder: Path, **changes: Any) -> list[list[str | None]]:
    """The documents of each chunk."""
    found = source(folder, **changes)
    return [list(found.documents(chunk)) for chunk in found.chunks(0)]


def script_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / f"{folder.name}.py").write_text("import datasets\n\nclass Owt(datasets.GeneratorBasedBuilder): ...\n")
    return folder


def test_a_loading_script_alone_as_a_process(tmp_path: Path) -> None:
    said = refused("hub", script_folder(tmp_path / "owt"), "--out", tmp_path / "out")
    assert f"{tmp_path}/owt: " in said
    assert "owt.py" in said
    assert "--revision refs/convert/parquet" in said
    assert not (tmp_path / "out").exists()


def test_a_loading_script_alone_streamed(tmp_path: Path) -> None:
    said = refusal(script_folder(tmp_path / "owt"), streaming=True)
    assert "python -m data_prep hub OWNER/NAME --revision refs/convert/parquet --config C" in said


def test_the_parquet_copy_that_is_named_is_read(tmp_path: Path) -> None:
    """As that branch holds it: a folder a configuration, and in it one a split."""
    for config in ("plain_text", "other"):
        for split in ("train", "test"):
            (tmp_path / config / split).mkdir(parents=True)
            table = pa.table({"text": [f"{config} {split}"]})
            pq.write_table(table, tmp_path / config / split / "0000.parquet")
    for streaming in (False, True):
        assert read(tmp_path, config="plain_text", revision="refs/convert/parquet", streaming=streaming) == [
            ["plain_text train"]
        ]
    for config in (None, "nosuch"):
        told = refusal(tmp_path, config=config, revision="refs/convert/parquet")
        assert "its Parquet copy has other, plain_text: choose one by --config" in told


def test_what_save_to_disk_has_written(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert "written by save_to_disk; write it by to_parquet" in refusal(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_with_a_directory(streaming: bool, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    pq.write_table(pa.table({"id": [1], "body": ["a"], "text": ["b"]}), good / "a.parquet")
    assert "nosuch" in refusal(good, config="nosuch", streaming=streaming)
    assert "nosuch" in refusal(good, split="nosuch", streaming=streaming)
    with pytest.raises(ValueError, match=r"no text column 'id' \(it is int64, not text\); .* among body, text"):
        hub_source(str(good), config=None, split="train", revision=None, streaming=streaming, text_field="id")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(tmp_path / "empty", streaming=streaming)
    broken = tmp_path / "broken"
    broken.mkdir()
    pq.write_table(pa.table({"text": documents(50)}), broken / "a.parquet", compression="zstd")
    content = bytearray((broken / "a.parquet").read_bytes())
    content[1000:9000] = bytes(8000)
    (broken / "a.parquet").write_bytes(content)
    assert "zstd" in refusal(broken, streaming=streaming).lower(), "the cause, not only that generating failed"
    (broken / "a.parquet").write_bytes(b"PAR1 no")
    assert "broken" in refusal(broken, streaming=streaming)


def test_a_column_that_the_library_does_not_know_names_the_command_that_does(tmp_path: Path) -> None:
    months = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    path = tmp_path / "train.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema({"text": "str", "m": months.type})) as out:
        out.write_table(pa.table({"text": ["a"], "m": months}))
    for streaming in (False, True):
        assert "python -m data_prep text reads Parquet files" in refusal(tmp_path, streaming=streaming)


class Breaking:
    """A stream that ends with an error of some library."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def skip(self, _: int) -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), pa.ArrowInvalid("bad"), RuntimeError("odd")])
def test_a_stream_that_breaks_says_both_ways_out(error: Exception) -> None:
    stream = DatasetStream(name="name", revision="", stream=Breaking(error), field="text")
    with pytest.raises(ValueError, match="run the same command again to go on, and if it stops there again"):
        list(stream.chunks(0))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine that refuses in the ways of the real one, by the data set's name."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("/")[4]
            self.send_response({"private": 401, "gated": 403, "revision": 404, "broken": 500}[name])
            codes = {"private": "RepoNotFound", "gated": "GatedRepo", "revision": "RevisionNotFound"}
            if name in codes:
                self.send_header("X-Error-Code", codes[name])
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", with_endpoint(huggingface_hub.HfApi.__init__, address))
    yield
    server.shutdown()
    server.server_close()


def with_endpoint(original: Any, address: str) -> Any:
    return lambda self, **keywords: original(self, **{"endpoint": address} | keywords)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("private", ["not on the hub, or private", "HF_TOKEN", "hf auth login"]),
        ("gated", ["ask", "https://huggingface.co/datasets/owner/gated", "HF_TOKEN"]),
        ("revision", ["no --revision v2", "leave it out"]),
        ("broken", ["500", "give a directory"]),
    ],
)
def test_what_the_hub_refuses(name: str, told: list[str]) -> None:
    with pytest.raises(ValueError, match=f"owner/{name}: ") as caught:
        resolved_revision(f"owner/{name}", "v2")
    for phrase in told:
        assert phrase in str(caught.value)
