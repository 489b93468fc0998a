"""A run on a drive that promises nothing: what was torn there is passed over, what is good stays until replaced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from drivers import warm
from running import checkpoint, copy_until, final_hashes, metrics, tree, wait_until

from gpt2_ddp.checkpoint import mirror as mirroring
from gpt2_ddp.checkpoint.choice import SUPERSEDED, checkpoints, set_aside
from gpt2_ddp.checkpoint.files import MANIFEST, faults, step_name, write_checkpoint
from gpt2_ddp.checkpoint.mirror import Mirror, fetch, kept


def save(run: Path, *steps: int, letter: bytes = b"a") -> Path:
    for step in steps:
        write_checkpoint(run / "checkpoints" / step_name(step), {"a.bin": letter * 999, "z.json": {"step": step}})
        (run / "metrics.jsonl").write_text("".join(f'{{"step": {at}}}\n' for at in range(1, step + 1)))
    return run


def steps(run: Path) -> list[int]:
    """Of the checkpoints that are whole."""
    return [int(path.name[5:]) for path in checkpoints(run / "checkpoints") if not faults(path)]


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """No renaming of folders nor over a file, no flushing of directories."""
    rename, fsync = os.rename, os.fsync

    def refuse_rename(source: object, target: object) -> None:
        if Path(str(source)).is_dir() or Path(str(target)).exists():
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        rename(str(source), str(target))

    def refuse_fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", refuse_rename)
    monkeypatch.setattr(os, "fsync", refuse_fsync)


@pytest.mark.usefixtures("no_rename")
def test_there_and_back_without_renames(tmp_path: Path) -> None:
    run, drive, said = tmp_path / "run", tmp_path / "drive", list[str]()
    mirror = Mirror(run, drive, count=2)
    assert mirror.update() == []
    for step in (2, 4, 6):
        save(run, step)
        assert mirror.update() == [f"copied {step_name(step)} to {drive}"]
        assert mirror.update() == []
    assert steps(drive) == [6, 4]
    assert tree(drive / "checkpoints" / step_name(6)) == tree(run / "checkpoints" / step_name(6))
    shutil.rmtree(run)
    before = tree(drive)
    fetch(drive, run, say=said.append)
    assert (steps(run), tree(drive), (run / "metrics.jsonl").read_text()) == (
        [6], before, (drive / "metrics.jsonl").read_text(),
    )  # fmt: skip
    fetch(drive, run, say=said.append)
    assert said == [
        f"fetched {drive}/checkpoints/{step_name(6)}",
        f"{run} is at {step_name(6)}, {drive} at {step_name(6)}: nothing to fetch",
    ]


TEARS: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a file that has not come": lambda path: (path / "a.bin").unlink(),
    "half a file": lambda path: (path / "a.bin").write_bytes(b"a" * 500),
    "a file of zeros": lambda path: (path / "a.bin").write_bytes(bytes(999)),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_copy_is_passed_over_and_replaced_when_the_run_is_there_again(tmp_path: Path, tear: str) -> None:
    run, drive, said = save(tmp_path / "run", 2, 4), tmp_path / "drive", list[str]()
    Mirror(run, drive, count=2).update()
    TEARS[tear](drive / "checkpoints" / step_name(4))
    new = tmp_path / "new"
    fetch(drive, new, say=said.append)
    assert steps(new) == [2]
    assert f"{step_name(4)} is not whole" in said[0]
    Mirror(new, drive, count=2).update()
    assert steps(drive) == [2]
    assert [path.name for path in (drive / "checkpoints").iterdir()] == [step_name(2)]
    save(new, 4)
    Mirror(new, drive, count=2).update()
    assert steps(drive) == [4, 2]


def test_an_interrupted_copy_leaves_the_one_before_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file in turn, with count 1, where the one before would be the first to go."""
    run, drive = save(tmp_path / "run", 2), tmp_path / "drive"
    mirror, copyfileobj = Mirror(run, drive, count=1), shutil.copyfileobj
    mirror.update()
    save(run, 4)
    for fatal in range(3):
        left = [fatal]

        def failing(source: object, target: object, length: int, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left[0] -= 1
            copyfileobj(source, target, length)  # type: ignore[misc]

        monkeypatch.setattr(shutil, "copyfileobj", failing)
        with pytest.raises(OSError, match="Input/output"):
            mirror.update()
        assert steps(drive) == [2]
        assert faults(drive / "checkpoints" / step_name(4))
    monkeypatch.undo()
    assert mirror.update() == [f"copied {step_name(4)} to {drive}"]
    assert steps(drive) == [4]


def test_a_disk_that_keeps_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, drive = save(tmp_path / "run", 2), tmp_path / "drive"
    monkeypatch.setattr(
        shutil, "copyfileobj", lambda source, target, _: target.write(source.read().replace(b"a", b"b"))
    )
    with pytest.raises(OSError, match="is not what was copied"):
        Mirror(run, drive, count=2).update()


def test_a_run_that_begins_anew_does_not_write_over_the_one_on_the_drive(tmp_path: Path) -> None:
    drive = save(tmp_path / "drive", 8)
    before, mirror = tree(drive), Mirror(save(tmp_path / "run", 2), drive, count=2)
    [line] = mirror.update()
    assert line.startswith(f"warning: {drive} is at {step_name(8)}, ahead of")
    assert mirror.update() == []
    assert tree(drive) == before
    said = list[str]()
    fetch(tmp_path / "nothing", tmp_path / "run", say=said.append)
    assert said == [f"no whole checkpoint in {tmp_path / 'nothing'}: the run begins"]


@pytest.mark.parametrize("again", [b"a", b"b"], ids=["the same bytes", "others"])
@pytest.mark.parametrize("seen", [6, 8, 10])
def test_a_run_that_went_back_replaces_what_it_left_behind(tmp_path: Path, again: bytes, seen: int) -> None:
    run, drive, said = save(tmp_path / "run", 6, 8, 10), tmp_path / "drive", list[str]()
    mirror = Mirror(run, drive, count=2)
    mirror.update()
    for step in (8, 10):
        set_aside(run / "checkpoints" / step_name(step), SUPERSEDED)
    fetch(drive, run, say=said.append)
    assert said == [f"{run} has gone back to before {step_name(10)} of {drive}: nothing to fetch"]
    for step in (6, 8, 10):
        if step > 6:
            save(run, step, letter=again)
        if step >= seen:
            assert "warning" not in "".join(mirror.update())
            assert mirror.update() == []
            assert steps(drive) == steps(run)[:2]
            for path in checkpoints(drive / "checkpoints"):
                assert tree(path) == tree(run / "checkpoints" / path.name)
    fetch(drive, run, say=said.append)
    assert said[1:] == [f"{run} is at {step_name(10)}, {drive} at {step_name(10)}: nothing to fetch"]


@pytest.mark.usefixtures("no_rename")
def test_a_prolonged_run_does_not_have_all_that_its_copies_have(tmp_path: Path) -> None:
    """Fetched were the last and the one to go on from: what the drive has between them is of the shorter run."""
    drive, run = save(tmp_path / "drive", 4, 6, 8, 10), save(tmp_path / "run", 6)
    (run / "checkpoints" / f"{step_name(10)}.finished").mkdir()
    for file in (drive / "checkpoints" / step_name(10)).iterdir():
        shutil.copy(file, run / "checkpoints" / f"{step_name(10)}.finished")
    assert Mirror(run, drive, count=2).update() == []
    assert steps(drive) == [6, 4]
    assert not faults(drive / "checkpoints" / f"{step_name(10)}.finished")


def test_while_the_run_goes_on_its_checkpoints_come_over_and_a_refusal_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drive, said, copy = tmp_path / "run", tmp_path / "drive", list[str](), mirroring._copy_checkpoint
    refusals = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def refusing_once(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        copy(source, target)

    monkeypatch.setattr(mirroring, "_copy_checkpoint", refusing_once)
    with kept(run, drive, every=0.01, say=said.append):
        save(run, 2)
        wait_until(lambda: steps(drive) == [2])
        save(run, 4)
        wait_until(lambda: steps(drive) == [4, 2])
    with kept(run, drive, every=1000, say=said.append):
        save(run, 6)
    assert steps(drive) == [6, 4]
    assert "No space left" in said[0]
    assert said[1:] == [f"copied {step_name(step)} to {drive}" for step in (2, 4, 6)]


def test_a_trainer_goes_on_from_a_fetched_run_as_if_it_had_not_ended(
    shared_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    clean = warm.clean_run(shared_folder, data_dir)
    [*_, end] = sorted(int(path.name[5:]) for path in checkpoints(clean / "checkpoints"))
    first = sorted(int(path.name[5:]) for path in checkpoints(clean / "checkpoints"))[0]
    Mirror(copy_until(clean, tmp_path / "before", first), tmp_path / "drive", count=2).update()
    fetch(tmp_path / "drive", tmp_path / "run", say=str)
    done = warm.train(tmp_path / "run", data_dir)
    assert f"at step {first}" in done.stdout
    assert final_hashes(tmp_path / "run", end) == final_hashes(clean, end)
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, end + 1))
    assert checkpoint(tmp_path / "run", end).is_dir()
