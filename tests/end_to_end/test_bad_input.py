"""What a user can get wrong: one line that says what, where and the mend, status 2, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drivers import warm
from running import checkpoint, run, train_command, tree, write_shards

from gpt2_ddp.data.order import permute
from gpt2_ddp.data.shards import write_shard
from gpt2_ddp.system.hardware import choose_device

Change = Callable[[Path], object]
TRAIN = "train_000001.bin"


@pytest.fixture(scope="module")
def finished(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir)


def assert_one_line(stderr: str, phrases: list[str]) -> None:
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr
    for phrase in phrases:
        assert phrase in stderr


def refused(out_dir: Path, data_dir: Path, *flags: str, told: list[str]) -> None:
    """The trainer ends with status 2 and one line that has all of `told`, and every file is as it was."""
    before = tree(out_dir), tree(data_dir)
    done = warm.train(out_dir, data_dir, *flags, status=2)
    assert_one_line(done.stderr, told)
    assert done.stdout == ""
    assert (tree(out_dir), tree(data_dir)) == before


def set_header(field: int, value: int) -> Change:
    def change(data_dir: Path) -> None:
        path = data_dir / TRAIN
        content = np.fromfile(path, np.uint8)
        content[:1024].view("<i4")[field] = value
        content.tofile(path)

    return change


def cut_a_byte(data_dir: Path) -> None:
    path = data_dir / TRAIN
    path.write_bytes(path.read_bytes()[:-1])


def remove(pattern: str) -> Change:
    def change(data_dir: Path) -> None:
        for path in data_dir.glob(pattern):
            path.unlink()

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shutil.rmtree, ["no data directory at", "python -m data_prep --help lists how to prepare it"]),
        (remove("*"), ["no token shards", "python -m data_prep"]),
        (set_header(0, 7), [TRAIN, "magic number 7", "20240520"]),
        (set_header(1, 2), [TRAIN, "version 2"]),
        (set_header(2, 10**9), [TRAIN, "its header says 1000000000 tokens", "hold 2000"]),
        (set_header(2, -1), [TRAIN, "-1 tokens"]),
        (cut_a_byte, [TRAIN, "its header says 2000 tokens"]),
        (lambda data_dir: (data_dir / TRAIN).write_bytes(b"short"), [TRAIN, "shorter than"]),
        (lambda data_dir: (data_dir / "manifest.json").write_text("{"), ["manifest.json", "not a manifest"]),
        (remove("val*"), ["no val shard", "prepare it again", "--val-every 0"]),
        (remove("train*"), ["no train shard"]),
        (lambda data_dir: write_shard(data_dir / "val_000000.bin", np.arange(5, dtype=np.uint16)), ["--val-every 0"]),
    ],
    ids=["missing", "empty", "magic", "version", "count", "negative-count", "size", "short", "manifest", "no-val",
         "no-train", "val-too-short"],
)  # fmt: skip
def test_broken_data(tmp_path: Path, change: Change, told: list[str]) -> None:
    data_dir = write_shards(tmp_path / "data")
    change(data_dir)
    refused(tmp_path / "run", data_dir, "--val-every=5", told=told)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--total-batch-size=100"], ["--total-batch-size 100", "multiple of 16", "use 96 or 112"]),
        (["--sequence-length=65"], ["--sequence-length 65", "the model's 64"]),
        (["--total-batch-size=8192"], ["623 training windows of 8 tokens", "one step needs 1024", "prepare more data"]),
        (["--model=gpt5"], ["unknown model 'gpt5'", "gpt2-medium"]),
        (["--max-steps=few"], ["--max-steps", "few"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--init-from=/nowhere"], ["no model '/nowhere'"]),
        (["--resume=/nowhere"], ["cannot resume from /nowhere", "manifest.json is missing"]),
        (["--hellaswag-every=1", "--hellaswag-data=/nowhere"], ["/nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_flags_that_cannot_be(tmp_path: Path, data_dir: Path, flags: list[str], told: list[str]) -> None:
    refused(tmp_path / "run", data_dir, *flags, told=told)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_hellaswag_file_with_a_bad_line_says_which(tmp_path: Path, data_dir: Path) -> None:
    good = {"ctx_a": "A", "ctx_b": "", "ctx": "A", "activity_label": "B", "ind": 1, "label": 1,
            "endings": ["a", "b", "c", "d"], "split": "val"}  # fmt: skip
    file = tmp_path / "hellaswag.jsonl"
    for bad in ("{", json.dumps(good | {"label": 7}), json.dumps(good | {"endings": ["a"]}), "[]"):
        file.write_text("\n".join([json.dumps(good), json.dumps(good), bad, json.dumps(good)]) + "\n")
        told = ["hellaswag.jsonl", "line 3"]
        refused(tmp_path / "run", data_dir, "--hellaswag-every=1", f"--hellaswag-data={file}", told=told)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model=gpt2-nano"], ["is another run", "--model is gpt2-nano, the run has gpt2-tiny", "--out-dir"]),
        (["--seed=1"], ["--seed is 1, the run has 1337"]),
        (["--sequence-length=16"], ["--sequence-length is 16, the run has 8"]),
        (["--total-batch-size=32"], ["--total-batch-size is 32, the run has 64"]),
        (["--resume=never"], ["holds a run", "--resume is never", "--out-dir"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_run_directory_of_another_run(
    finished: Path, data_dir: Path, tmp_path: Path, flags: list[str], told: list[str]
) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    refused(out_dir, data_dir, "--max-steps=20", *flags, told=told)


def test_the_run_directory_of_other_data(finished: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    refused(out_dir, write_shards(tmp_path / "data", seed=9), told=["is another run", "--data-dir", "not those"])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("way", ["auto", "PATH"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (flip_a_byte, "does not have the SHA-256"),
    ],
    ids=["missing", "short", "altered"],
)
def test_no_good_checkpoint_is_left(
    finished: Path, data_dir: Path, tmp_path: Path, damage: Change, told: str, way: str
) -> None:
    out_dir = shutil.copytree(finished, tmp_path / "run")
    for path in (out_dir / "checkpoints").iterdir():
        damage(path / "model.safetensors")
    flags = [f"--resume={checkpoint(out_dir, 8) if way == 'PATH' else way}", "--max-steps=20"]
    names = ["step_00000008"] if way == "PATH" else ["step_00000004", "step_00000008", "step_00000012", "is broken"]
    refused(out_dir, data_dir, *flags, told=["model.safetensors ", told, *names])


def test_weights_of_another_size(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "run", data_dir, f"--init-from={finished}", "--model=gpt2-nano", told=["is no gpt2-nano"])


@pytest.fixture
def one_mebibyte(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_output_directory(one_mebibyte: Path, data_dir: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(one_mebibyte)], check=True)
    done = warm.train(one_mebibyte / "run", data_dir, status=2)
    assert_one_line(done.stderr, ["Read-only file system", str(one_mebibyte)])


def test_a_full_output_directory(one_mebibyte: Path, data_dir: Path) -> None:
    for folder in ("run", "run/checkpoints"):
        (one_mebibyte / folder).mkdir()
    (one_mebibyte / "filler").write_bytes(bytes(shutil.disk_usage(one_mebibyte).free))
    before = tree(one_mebibyte)
    done = warm.train(one_mebibyte / "run", data_dir, "--model=gpt2-nano", status=2)
    assert_one_line(done.stderr, [f"{one_mebibyte}/run: no space for a checkpoint of gpt2-nano", "which takes 38 MiB"])
    assert {name: value for name, value in tree(one_mebibyte).items() if name in before} == before


@pytest.mark.parametrize("place", ["/proc/no/run", "FILE/run"])
def test_a_place_where_no_directory_can_be(tmp_path: Path, data_dir: Path, place: str) -> None:
    (tmp_path / "FILE").write_text("a file")
    out_dir = Path(place.replace("FILE", str(tmp_path / "FILE")))
    done = warm.train(out_dir, data_dir, status=2)
    assert_one_line(done.stderr, [str(out_dir.parent)])


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    for requested in ("auto", "cuda"):
        assert choose_device(requested, local_rank=1, local_world_size=2) == torch.device("cuda", 1)
        with pytest.raises(ValueError, match=r"4 ranks on .*, which has 2 GPUs: start 2 with --nproc_per_node=2"):
            choose_device(requested, local_rank=0, local_world_size=4)


def own_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_two_ranks_say_it_once(tmp_path: Path, data_dir: Path) -> None:
    done = warm.fork_small(tmp_path / "run", data_dir, "--total-batch-size=96", nproc=2, status=2)
    expected = (
        "error: --total-batch-size 96 is not a multiple of 64 = micro-batch 2 x 16 tokens x 2 ranks: use 64 or 128"
    )
    assert own_lines(done.stderr) == [expected]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("nproc", [0, 2])
def test_a_token_past_the_vocabulary(tmp_path: Path, nproc: int) -> None:
    """It is found when it is read: by the last rank alone, in the first step, which no rank completes."""
    out_dir = tmp_path / "run"
    data_dir = write_shards(tmp_path / "data", train_tokens=(129,))  # one step takes all eight windows
    last = int(permute(np.array([7]), n=8, seed=1337, epoch=0)[0])
    tokens = np.arange(129, dtype=np.uint16)
    tokens[16 * last + 5] = 60_000
    write_shard(data_dir / "train_000000.bin", tokens)
    done = run(train_command(out_dir, data_dir, nproc=2)) if nproc else warm.fork_small(out_dir, data_dir, status=2)
    assert done.returncode == (1 if nproc else 2)
    [line] = own_lines(done.stderr)
    assert f"train_000000.bin: token id 60000 at position {16 * last + 5}, past GPT-2's vocabulary of 50257" in line
    assert "To enable traceback" not in done.stderr  # torchrun's own summary knows the error
    assert not list((out_dir / "checkpoints").glob("step_*"))
