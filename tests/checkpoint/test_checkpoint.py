"""Checkpoints: whole or not there, verified byte by byte, and open to other tools."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from running import checkpoint, metrics, run, sha256, tree

from gpt2_ddp.checkpoint.choice import checkpoints, newest_good, prune, set_aside
from gpt2_ddp.checkpoint.files import faults, read_tensors, step_name, write_checkpoint
from gpt2_ddp.checkpoint.writer import CheckpointWriter
from gpt2_ddp.data.tokenizer import load_tokenizer
from gpt2_ddp.model.gpt import GPT
from gpt2_ddp.model.huggingface import load_model
from gpt2_ddp.system.files import read_json

TENSORS = {
    "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(12, dtype=torch.float32).view(3, 4).t(),
    "bfloat16": torch.tensor([1.5, math.nan, -math.inf], dtype=torch.bfloat16),
    "float16": torch.tensor([[65504.0]], dtype=torch.float16),
    "int64": torch.tensor([-1, 2**62]),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "of names: ü, \"quoted\"": torch.ones(2),
}  # fmt: skip
FILES = {"model.safetensors": TENSORS, "state.json": {"step": 3, "text": "é"}, "vocab.json": b"\x00\xff{}"}


def written(folder: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(folder / step_name(step), FILES | {"trainer_state.json": {"step": step}})
    return folder


def test_safetensors_are_read_back_by_the_library(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", FILES)
    with safetensors.safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (found, tensor)]
            assert as_bytes[0] == as_bytes[1], name
    plain = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    size = len(safetensors.torch.save(plain, {"format": "pt"}))
    assert abs((tmp_path / "c" / "model.safetensors").stat().st_size - size) < 64  # no gaps, no second copy
    assert (tmp_path / "c" / "vocab.json").read_bytes() == b"\x00\xff{}"
    assert json.loads((tmp_path / "c" / "state.json").read_text()) == {"step": 3, "text": "é"}


def test_the_manifest_has_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path / "c", FILES)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    others = [path for path in (tmp_path / "c").iterdir() if path.name != "manifest.json"]
    assert manifest["files"] == {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in others}
    assert size == sum(path.stat().st_size for path in others)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert faults(tmp_path / "c") == []


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "vocab.json", "manifest.json"])
def test_one_changed_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, 1) / step_name(1)
    file = path / name
    good = file.read_bytes()
    for position in {*range(0, len(good), max(1, len(good) // 40)), len(good) - 1}:
        for bit in (1, 128):
            file.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
            if not (name == "manifest.json" and good[position : position + 1].isspace()):
                assert faults(path), (position, bit)
    file.write_bytes(good)
    assert faults(path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "vocab.json", "manifest.json"])
def test_missing_and_short_files_are_named(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, 1) / step_name(1)
    good = (path / name).read_bytes()
    for content in (good[:-1], good[: len(good) // 2], b"", good + b"\0"):
        (path / name).write_bytes(content)
        if name != "manifest.json" or content != good[:-1]:  # JSON without its last newline is whole
            assert len(faults(path)) == 1
            assert name in faults(path)[0]
    (path / name).unlink()
    assert faults(path) == [f"{name} is missing"]
    (path / name).mkdir()
    assert len(faults(path)) == 1
    assert name in faults(path)[0]


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "..", ".", "", "sub/file", "link", "a\0b", "x" * 300],
    ids=lambda name: name[:20],
)
def test_a_manifest_reaches_no_file_outside(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, 1) / step_name(1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (path / "link").symlink_to(secret)
    manifest = read_json(path / "manifest.json")
    manifest["files"] = {name: {"size": 6, "sha256": sha256(secret)}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert len(faults(path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", '{"version": 1}', '{"version": 1, "files": {}}', '{"version": 1, "files": []}',
        '{"version": 1, "files": {"a": 1}}', '{"version": 1, "files": {"a": {"size": "x", "sha256": ""}}}',
        '{"version": 1, "files": {"a": {"size": Infinity, "sha256": ""}}}',
        '{"version": 1, "files": {"a": {"size": 1e999, "sha256": ""}}}',
        '{"version": 2, "files": {"state.json": {"size": 1, "sha256": ""}}}', "[" * 100_000, "\udcff",
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_a_manifest_that_is_none_is_a_fault(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, 1) / step_name(1)
    (path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert len(faults(path)) == 1
    assert "manifest.json" in faults(path)[0]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_the_newest_good_one_is_found_and_broken_ones_are_set_aside(tmp_path: Path) -> None:
    written(tmp_path, 5, 10, 15, 100_000_020)
    (tmp_path / "step_00000030.tmp").mkdir()
    flip_a_byte(tmp_path / step_name(100_000_020) / "model.safetensors")
    (tmp_path / step_name(15) / "vocab.json").unlink()
    good = tree(tmp_path / step_name(10)), tree(tmp_path / step_name(5))
    found, said = newest_good(tmp_path)
    assert found == tmp_path / step_name(10)
    assert len(said) == 2
    assert "step_100000020 is broken (model.safetensors does not have the SHA-256" in said[0]
    assert "step_00000015 is broken (vocab.json is missing); set aside as step_00000015.broken" in said[1]
    assert checkpoints(tmp_path) == [tmp_path / step_name(10), tmp_path / step_name(5)]
    assert (tree(tmp_path / step_name(10)), tree(tmp_path / step_name(5))) == good
    assert (tmp_path / "step_00000015.broken" / "model.safetensors").exists()
    assert newest_good(tmp_path) == (found, [])
    assert newest_good(tmp_path / "nothing") == (None, [])


def test_where_all_are_broken_none_is_touched(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    for step in (1, 2):
        flip_a_byte(tmp_path / step_name(step) / "state.json")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"every checkpoint .* is broken .*step_00000002: state.json .*step_00000001"):
        newest_good(tmp_path)
    assert tree(tmp_path) == before


def test_pruning_keeps_good_ones_and_counts_no_broken_one(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4, 5)
    flip_a_byte(tmp_path / step_name(4) / "model.safetensors")
    (tmp_path / step_name(5) / "link").symlink_to("nowhere")
    prune(tmp_path, 2)
    assert checkpoints(tmp_path) == [tmp_path / step_name(5), tmp_path / step_name(3)]
    assert faults(tmp_path / step_name(5)) == faults(tmp_path / step_name(3)) == []
    prune(tmp_path, 9)
    assert len(checkpoints(tmp_path)) == 2


def test_names_to_set_aside_never_collide(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(set_aside(written(tmp_path, 7) / step_name(7), "broken").name)
    assert names == ["step_00000007.broken", "step_00000007.broken-2", "step_00000007.broken-3"]
    assert checkpoints(tmp_path) == []


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from gpt2_ddp.checkpoint.files import step_name, write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
write_checkpoint(Path(sys.argv[1]) / step_name(2), {"a.json": {}, "model.safetensors": {"w": torch.ones(100, 100)}})
"""


def test_a_save_that_the_disk_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    before = tree(written(tmp_path, 1))
    done = run([sys.executable, "-c", FULL_DISK, str(tmp_path)])
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [step_name(1)]


def test_a_background_save_is_a_snapshot_and_saves_wait_for_each_other(tmp_path: Path) -> None:
    weights = torch.zeros(2_000_000)
    writer = CheckpointWriter(tmp_path, keep=2, enabled=True, patience=60)
    for step in range(1, 5):
        weights.fill_(step)
        writer.save(step, lambda: {"model.safetensors": {"w": weights}})
    weights.fill_(-1)
    reports = writer.reports(wait=True)
    writer.close()
    assert [(report.step, report.error) for report in reports] == [(step, None) for step in range(1, 5)]
    assert all(report.bytes > 8_000_000 and report.seconds > 0 for report in reports)
    assert checkpoints(tmp_path) == [tmp_path / step_name(4), tmp_path / step_name(3)]
    for step in (3, 4):
        assert torch.equal(
            read_tensors(tmp_path / step_name(step) / "model.safetensors")["w"], torch.full_like(weights, step)
        )


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=0, enabled=False, patience=60)
    writer.save(1, lambda: pytest.fail("nobody asked for the files"))
    assert writer.reports(wait=True) == []
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file is in the way")
    writer = CheckpointWriter(folder, keep=0, enabled=True, patience=60)
    writer.save(1, lambda: FILES)
    [failed] = writer.reports(wait=True)
    folder.unlink()
    writer.save(2, lambda: FILES)
    [good] = writer.reports(wait=True)
    writer.close()
    assert failed.error
    assert (good.step, good.error) == (2, None)
    assert faults(folder / step_name(2)) == []


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff" * 64, b"[" * 10**6, b"\0\0\0\0\0\0\0\1{}"], ids=len)
def test_broken_files_are_a_users_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.file").write_bytes(content)
    for read in (read_json, read_tensors):
        with pytest.raises(ValueError, match=r"x\.file"):
            read(tmp_path / "x.file")


def test_a_runs_checkpoints_are_complete_and_told_of(clean_run: Callable[..., Path]) -> None:
    out_dir = clean_run()
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
             "optimizer.safetensors", "trainer_state.json", "manifest.json"}  # fmt: skip
    told = metrics(out_dir, "checkpoint")
    assert [entry["step"] for entry in told] == [10, 20]
    for entry in told:
        path = checkpoint(out_dir, entry["step"])
        assert {file.name for file in path.iterdir()} == names
        assert faults(path) == []
        assert entry["bytes"] == sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
        assert entry["blocked_seconds"] >= 0
        assert entry["seconds"] > 0
    state = read_json(checkpoint(out_dir) / "trainer_state.json")
    last = metrics(out_dir)[-1]
    assert (state["step"], state["tokens_seen"], state["data_hash"]) == (20, last["tokens_seen"], last["data_hash"])
    assert not any(file.suffix in (".pt", ".pth", ".bin", ".pkl") for file in out_dir.rglob("*"))


def test_transformers_opens_a_checkpoint_directory_as_it_stands(clean_run: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = shutil.copytree(checkpoint(clean_run()), tmp_path / "anywhere")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "Ünïcode, tabs\tand\n\n  spaces; it's 1234567 tokens <|endoftext|> 你好 🙂"
    ids = load_tokenizer().encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    ours: GPT = load_model(path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        found = ours(torch.tensor([ids]))
    assert expected.shape == found.shape == (1, len(ids), 50304)
    assert float((expected - found).abs().max()) < 1e-4
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
