"""Broken checkpoints are seen, said and set aside, and the run ends at the weights of one that nothing disturbed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from drivers import warm
from running import checkpoint, final_hashes, metrics, tree, wait_until

from eval.convert import Convert
from eval.val_loss import ValLoss
from gpt2_ddp.system.errors import UserError

FILES = (
    "config.json",
    "manifest.json",
    "merges.txt",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer_config.json",
    "trainer_state.json",
    "vocab.json",
)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncate": truncate, "flip": flip_a_byte, "delete": Path.unlink}


@pytest.fixture(scope="module")
def clean(shared_folder: Path, data_dir: Path) -> Path:
    return warm.clean_run(shared_folder, data_dir)


@pytest.fixture(scope="module")
def stopped(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 8, with checkpoints of steps 4 and 8."""
    out_dir = tmp_path_factory.mktemp("stopped") / "run"
    warm.train(out_dir, data_dir, faults={"stop_after": {"step": 8}}, status=75)
    return out_dir


def test_every_file_of_a_checkpoint_is_damaged_below(stopped: Path) -> None:
    assert sorted(path.name for path in checkpoint(stopped, 8).iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_costs_no_more_than_the_steps_since_the_one_before(
    clean: Path, stopped: Path, data_dir: Path, tmp_path: Path, damage: str, name: str
) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(stopped, out_dir)
    DAMAGES[damage](checkpoint(out_dir, 8) / name)
    damaged = tree(checkpoint(out_dir, 8))
    done = warm.train(out_dir, data_dir)
    [said] = [line for line in done.stdout.splitlines() if "is broken" in line]
    assert "step_00000008" in said
    assert name in said
    assert "set aside as step_00000008.broken" in said
    assert f"resuming {out_dir} from {checkpoint(out_dir, 4)} at step 4" in done.stdout
    assert tree(out_dir / "checkpoints" / "step_00000008.broken") == damaged
    assert final_hashes(out_dir) == final_hashes(clean)
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))


def test_where_all_are_broken_nothing_is_touched(stopped: Path, data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(stopped, out_dir)
    truncate(checkpoint(out_dir, 4) / "optimizer.safetensors")
    (checkpoint(out_dir, 8) / "manifest.json").unlink()
    before = tree(out_dir)
    done = warm.train(out_dir, data_dir, status=2)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: every checkpoint in ")
    assert "step_00000008: manifest.json is missing" in line
    assert "step_00000004: optimizer.safetensors has " in line
    assert tree(out_dir) == before


def test_pruning_neither_counts_nor_keeps_a_broken_one(data_dir: Path, tmp_path: Path) -> None:
    """The checkpoint of step 8 rots while the run goes on: that of step 4 is kept in its place, as long as needed."""
    out_dir = tmp_path / "run"
    longer = ("--max-steps", "16", "--keep-checkpoints", "2")
    faults = {"hold": {"where": "step", "step": 12}, "stop_after": {"step": 12}}
    trainer = warm.start(out_dir, data_dir, *longer, faults=faults)
    wait_until((out_dir / "held").exists)
    wait_until(checkpoint(out_dir, 8).exists)
    flip_a_byte(checkpoint(out_dir, 8) / "model.safetensors")
    (out_dir / "go").touch()
    assert trainer.wait().returncode == 75
    names = sorted(path.name for path in (out_dir / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008.broken", "step_00000012"]
    warm.train(out_dir, data_dir, *longer)
    names = sorted(path.name for path in (out_dir / "checkpoints").iterdir())
    assert names == ["step_00000012", "step_00000016"]


def test_weights_that_changed_are_neither_scored_nor_passed_on_nor_begun_with(
    clean: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Of other files, such as the optimizer's, an evaluation takes no notice."""
    out_dir = shutil.copytree(clean, tmp_path / "run")
    flip_a_byte(checkpoint(out_dir) / "optimizer.safetensors")

    def scored(model: Path) -> ValLoss:
        return ValLoss(model=str(model), data_dir=data_dir, val_tokens=64, device="cpu", dtype="float32")

    scored(out_dir).run()
    flip_a_byte(checkpoint(out_dir) / "model.safetensors")
    broken = f"{checkpoint(out_dir)} is broken \\(model.safetensors does not have the SHA-256 it was written with\\)"
    for command in (scored(out_dir), Convert(source=str(out_dir), target=tmp_path / "model")):
        with pytest.raises(UserError, match=broken):
            command.run()
    assert not (tmp_path / "model").exists()
    done = warm.train(tmp_path / "new", data_dir, f"--init-from={out_dir}", status=2)
    assert re.match(f"error: {broken}: name another checkpoint; if you changed it yourself, remove", done.stderr)
    (checkpoint(out_dir) / "manifest.json").write_text('{"name": "of another program"}')
    scored(checkpoint(out_dir)).run()
