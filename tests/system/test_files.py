"""Whole files and held directories on file systems that have less than POSIX, and on disks that fail."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from data_prep_runs import COMMAND, texts_of, write_jsonl
from running import ROOT, checkpoint, environment, final_hashes, run, status, train, tree

from gpt2_ddp.checkpoint.choice import checkpoints, newest_good, set_aside
from gpt2_ddp.checkpoint.files import faults, write_checkpoint
from gpt2_ddp.system.files import flush, flush_directory, rename, replace_file, sole_use

POOR_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int fsync(int descriptor) {
    struct stat found;
    if (!fstat(descriptor, &found) && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(descriptor);
}

int flock(int descriptor, int operation) { errno = ENOLCK; return -1; }

int rename(const char *from, const char *to) {
    struct stat found;
    if (getenv("NO_RENAME_OVER") && (!stat(to, &found) || (!stat(from, &found) && S_ISDIR(found.st_mode)))) {
        errno = EPERM;
        return -1;
    }
    return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""
"""A shared library in place of a file system: directories are not flushed, nothing is locked; if NO_RENAME_OVER is in
the environment, no file is renamed over another and no directory at all."""


@pytest.fixture(scope="module")
def poor_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process whose file system has less than POSIX."""
    if which("gcc") is None:
        pytest.skip("needs gcc to make the shared library that takes the file system's place")
    folder = tmp_path_factory.mktemp("poor_disk")
    (folder / "poor.c").write_text(POOR_DISK)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "poor.so"), str(folder / "poor.c"), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(folder / "poor.so"), "NO_RENAME_OVER": "1"}


def test_a_trainer_saves_and_goes_on_as_usual(
    poor_disk: dict[str, str], clean_run: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    done = train(out_dir, data_dir, env=poor_disk)
    assert "could not save" not in done.stdout
    assert [faults(path) for path in checkpoints(out_dir / "checkpoints")] == [[], []]
    assert final_hashes(out_dir) == final_hashes(clean_run())
    (checkpoint(out_dir) / "manifest.json").unlink()
    done = train(out_dir, data_dir, env=poor_disk)
    assert "set aside as step_00000020.broken" in done.stdout
    assert "at step 10" in done.stdout
    assert [faults(path) for path in checkpoints(out_dir / "checkpoints")] == [[], []]
    assert final_hashes(out_dir) == final_hashes(clean_run())
    assert status(out_dir)["state"] == "finished"


def test_data_are_prepared_as_usual(poor_disk: dict[str, str], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "three.jsonl", ["one", "two", "three"])
    command = [*COMMAND, "text", str(file), "--out", str(tmp_path / "out"), "--val-tokens", "1", "--workers", "1"]
    done = run(command, env=poor_disk)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (texts_of(tmp_path / "out", "val"), texts_of(tmp_path / "out", "train")) == (["one"], ["two", "three"])
    assert run(command, env=poor_disk).returncode == 0


@pytest.mark.parametrize("name", ["EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EACCES", "EBADF", "EISDIR"])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_directory_that_cannot_be_flushed(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, call, getattr(errno, name), of_directories=True)
    flush_directory(tmp_path)
    replace_file(tmp_path / "file", "whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert write_checkpoint(tmp_path / "step_00000001", {"a.json": {"a": 1}}) > 0
    assert newest_good(tmp_path) == (tmp_path / "step_00000001", [])


def answer(monkeypatch: pytest.MonkeyPatch, call: str, number: int, *, of_directories: bool) -> None:
    """From now on `os.fsync` or `os.open` fails with `number`, of directories or of files."""
    original = getattr(os, call)

    def failing(which_one: Any, *arguments: Any, **keywords: Any) -> Any:
        if stat.S_ISDIR(os.stat(which_one).st_mode) == of_directories:  # noqa: PTH116  a descriptor, too
            raise OSError(number, os.strerror(number))
        return original(which_one, *arguments, **keywords)

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("of_directories", [True, False])
def test_a_disk_that_fails_is_an_error(
    number: int, of_directories: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")
    answer(monkeypatch, "fsync", number, of_directories=of_directories)
    with pytest.raises(OSError, match="file") as caught:
        replace_file(tmp_path / "file", "after")
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == ("after" if of_directories else "before")
    with pytest.raises(OSError, match=os.strerror(number)):
        write_checkpoint(tmp_path / "step_00000001", {"a.json": {"a": 1}})
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_cannot_be_flushed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "fsync", errno.EINVAL, of_directories=False)
    with open(tmp_path / "file", "wb") as file:
        file.write(b"some")
        flush(file)
        assert (tmp_path / "file").read_bytes() == b"some"


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("before")
    (tmp_path / "status.json.tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(path, "after")
    assert path.read_text() == "before"


def refusing(number: int, when: Callable[[Path, Path], bool]) -> Callable[[Any, Any], None]:
    """`os.rename` on a file system that answers `number` to the renames that `when` picks."""
    original = os.rename

    def failing(source: Any, target: Any) -> None:
        if when(Path(source), Path(target)):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        original(source, target)

    return failing


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.EBUSY, errno.EXDEV, errno.ENOSYS, errno.EPROTO])
@pytest.mark.parametrize("never", [False, True], ids=["over", "never"])
def test_without_a_rename_over_a_file_or_any(
    number: int, never: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = refusing(number, lambda source, target: never or source.is_dir() or target.exists())
    monkeypatch.setattr(os, "rename", patched)
    for text in ("first", "second"):
        replace_file(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    write_checkpoint(tmp_path / "step_00000001", {"a.json": {"a": 1}, "z.json": {"z": 1}})
    assert faults(tmp_path / "step_00000001") == []
    assert set_aside(tmp_path / "step_00000001", "broken").name == "step_00000001.broken"
    assert sorted(tree(tmp_path)) == [
        *("file", "step_00000001.broken/a.json", "step_00000001.broken/manifest.json", "step_00000001.broken/z.json")
    ]


def test_a_folder_copied_in_part_is_a_broken_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without renames the manifest comes last; a copy that the disk refuses is taken away."""
    monkeypatch.setattr(os, "rename", refusing(errno.ENOSYS, lambda *_: True))
    fsync, seen = os.fsync, []

    def full(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "/step_00000001/" in name:
            seen.append(Path(name).name)
            if Path(name).name == "manifest.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "step_00000001", {"z.json": {"z": 1}, "a.json": {"a": 1}})
    assert seen == ["a.json", "z.json", "manifest.json"]
    assert not list(tmp_path.iterdir())


def test_a_rename_that_is_refused_for_good_reason_is_an_error(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    before = tree(tmp_path)
    with pytest.raises(OSError, match="not empty"):
        rename(tmp_path / "one", tmp_path / "two")
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "none", tmp_path / "three")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EBADF", "EACCES", "EPERM"])
def test_a_directory_that_cannot_be_locked_is_granted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_use(tmp_path, "in use"), sole_use(tmp_path, "in use"):
        replace_file(tmp_path / "file", "x")


def test_a_directory_has_one_holder_until_its_process_dies(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from gpt2_ddp.system.files import sole_use\n"
        "with sole_use(Path(sys.argv[1]), 'in use'): print('held', flush=True); time.sleep(60)"
    )
    command = [COMMAND[0], "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use"), sole_use(tmp_path, "in use"):
            pass
        holder.kill()
        with sole_use(tmp_path, "in use", patience=10.0):
            assert not list(tmp_path.iterdir())
