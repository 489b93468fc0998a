"""Saves that fail cost a checkpoint and nothing else; saves that work hardly keep training waiting."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drivers import warm
from drivers.live_bytes import LiveBytes
from running import checkpoint, final_hashes, metrics, status, wait_until
from safetensors.torch import load_file

from gpt2_ddp.checkpoint import choice
from gpt2_ddp.checkpoint import writer as saver
from gpt2_ddp.checkpoint.choice import prune
from gpt2_ddp.checkpoint.files import faults, write_checkpoint
from gpt2_ddp.model.gpt import GPT, GPTConfig
from gpt2_ddp.model.huggingface import to_hf


@pytest.fixture(scope="module")
def clean(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir)


def saved(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def test_training_goes_on_while_a_save_is_being_written(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """The save of step 4 does not end until step 7 is logged; what it holds is step 4."""
    out_dir = tmp_path / "run"
    trainer = warm.start(out_dir, data_dir, faults={"hold_save": {"step": 4}})
    wait_until(lambda: [entry for entry in metrics(out_dir) if entry["step"] == 7])
    assert saved(out_dir) == ["step_00000004.tmp"]
    (out_dir / "go").touch()
    assert trainer.wait().returncode == 0
    assert final_hashes(out_dir, 4) == final_hashes(clean, 4)
    assert final_hashes(out_dir) == final_hashes(clean)
    first, second, _ = metrics(out_dir, "checkpoint")
    assert (first["step"], second["step"]) == (4, 8)
    assert first["blocked_seconds"] < first["seconds"] / 2
    files = checkpoint(out_dir, 4).iterdir()
    assert first["bytes"] == sum(path.stat().st_size for path in files if path.name != "manifest.json")


def test_a_save_that_never_ends_leaves_out_the_next_ones(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    """The next is given half of --timeout; only the last waits for as long as it takes."""
    out_dir = tmp_path / "run"
    flags = ("--timeout", "0.2", "--checkpoint-every", "2")
    trainer = warm.start(out_dir, data_dir, *flags, faults={"hold_save": {"step": 4}})
    wait_until(lambda: [entry for entry in metrics(out_dir) if entry["step"] == 12])
    time.sleep(1)  # ten times as long as the others were given
    (out_dir / "go").touch()
    done = trainer.wait()
    assert done.returncode == 0
    for step in (6, 8, 10):
        assert f"step {step} | could not save: the save before it is still being written" in done.stdout
    assert saved(out_dir) == ["step_00000002", "step_00000004", "step_00000012"]
    assert final_hashes(out_dir) == final_hashes(clean)


def test_a_save_that_fails_is_said_and_the_next_one_tried(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    done = warm.train(tmp_path / "run", data_dir, faults={"no_space": {"steps": [8]}})
    said = "step 8 | could not save: [Errno 28] No space left on device; the older checkpoints are untouched"
    assert said in done.stdout
    assert saved(tmp_path / "run") == ["step_00000004", "step_00000012"]
    assert final_hashes(tmp_path / "run") == final_hashes(clean)
    assert [entry["step"] for entry in metrics(tmp_path / "run", "checkpoint")] == [4, 12]


def test_an_old_checkpoint_that_cannot_go_is_no_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another process has a file of it open on NFS."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"step_{step:08d}", {"config.json": b"{}"})

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rmdir", busy)
    prune(tmp_path, 2)
    assert [faults(tmp_path / name) == [] for name in ("step_00000002", "step_00000003")] == [True, True]


def test_a_checkpoint_that_was_just_written_is_read_again_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 1558M are 56 GB, which a run that is to end has no time for."""
    read: list[str] = []
    monkeypatch.setattr(choice, "faults", lambda path: read.append(path.name) or faults(path))
    write_checkpoint(tmp_path / "step_00000001", {"model.safetensors": {"w": torch.zeros(2)}})
    saves = saver.CheckpointWriter(tmp_path, keep=3, enabled=True, patience=60)
    for step in (2, 3, 4):
        saves.save(step, lambda: {"model.safetensors": {"w": torch.ones(2)}})
        saves.reports(wait=True)
    assert read == ["step_00000001"]  # once, of an earlier start
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"torn")
    saves.save(5, lambda: {"model.safetensors": {"w": torch.ones(2)}})
    saves.reports(wait=True)
    saves.close()
    assert read == ["step_00000001", "step_00000003"]
    assert sorted(path.name for path in choice.checkpoints(tmp_path)) == [f"step_{step:08d}" for step in (2, 4, 5)]


@pytest.mark.parametrize("stop", [False, True], ids=["finished", "stopped"])
def test_a_last_save_that_fails_is_a_failure(clean: Path, data_dir: Path, tmp_path: Path, stop: bool) -> None:
    out_dir, last = tmp_path / "run", 10 if stop else 12
    failing = {"no_space": {"steps": [last]}, **({"stop_after": {"step": last}} if stop else {})}
    done = warm.train(out_dir, data_dir, faults=failing, status=1)
    assert f"the last checkpoint, of step {last}, is not saved: [Errno 28] No space left on device" in done.stderr
    assert (status(out_dir)["state"], status(out_dir)["step"]) == ("failed", last)
    assert saved(out_dir) == ["step_00000004", "step_00000008"]
    warm.train(out_dir, data_dir)
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


def test_a_save_holds_one_snapshot_and_the_writer_one_tensor_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices are transposed by the writer's thread, one after the other."""
    model = GPT(GPTConfig(block_size=32, vocab_size=512, n_layer=8, n_head=2, n_embd=32)).init_weights(0)
    files = {"model.safetensors": to_hf(model.state_dict())}
    weights = {name: tensor.clone() for name, tensor in files["model.safetensors"].items()}
    snapshot = sum(tensor.nbytes for tensor in weights.values())
    caller, writer = LiveBytes(), LiveBytes()
    write_checkpoint = saver.write_checkpoint

    def watched(*args: Any) -> int:
        with writer:
            return write_checkpoint(*args)

    monkeypatch.setattr(saver, "write_checkpoint", watched)
    saves = saver.CheckpointWriter(tmp_path, keep=0, enabled=True, patience=60)
    with caller:
        saves.save(1, lambda: files)
    with torch.no_grad():
        model.wte.weight.fill_(0)  # training goes on
    [report] = saves.reports(wait=True)
    saves.close()
    assert report.error is None
    assert caller.peak == 2 * snapshot  # the weights and their copies
    assert snapshot < writer.peak <= snapshot + max(tensor.nbytes for tensor in weights.values())
    found = load_file(tmp_path / "step_00000001" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_delays_saves_and_lines_and_loses_none(shared_folder: Path, data_dir: Path, tmp_path: Path) -> None:
    """From step 6 to step 38 no byte is free, on the disk that has the checkpoints, the metrics and the status."""
    longer = ("--max-steps", "40")
    clean = warm.clean_run(shared_folder, data_dir, *longer)
    with small_disk(tmp_path / "disk", "16m") as disk:
        done = warm.train(disk / "run", data_dir, *longer, faults={"fill_disk": {"step": 6, "until": 38}})
        assert "step 8 | could not save: [Errno 28] No space left on device" in done.stdout
        assert "step 36 | could not save: [Errno 28] No space left on device" in done.stdout
        assert "metrics.jsonl: No space left on device; its lines wait in memory" in done.stderr
        assert saved(disk / "run") == ["step_00000004", "step_00000040"]
        assert [faults(checkpoint(disk / "run", step)) for step in (4, 40)] == [[], []]
        assert final_hashes(disk / "run") == final_hashes(clean)
        assert [entry["step"] for entry in metrics(disk / "run")] == list(range(1, 41))
        assert status(disk / "run")["state"] == "finished"


def test_a_disk_that_stays_full_fails_at_the_last_save(clean: Path, data_dir: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        done = warm.train(disk / "run", data_dir, faults={"fill_disk": {"step": 6}}, status=1)
        assert "the last checkpoint, of step 12, is not saved" in done.stderr
        assert saved(disk / "run") == ["step_00000004"]
        (disk / "run" / "filler").unlink()
        warm.train(disk / "run", data_dir)
        assert final_hashes(disk / "run") == final_hashes(clean)
        assert [entry["step"] for entry in metrics(disk / "run")] == list(range(1, 13))
