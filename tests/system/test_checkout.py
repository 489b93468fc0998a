"""Which commit a run was made by: in a real repository, beside one, and without git."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from drivers import warm
from running import ROOT

from gpt2_ddp.system.checkout import commit_and_diff


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout


def test_a_file_of_a_checkout_has_its_commit_and_what_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    package = tmp_path / "package"
    package.mkdir()
    module, installed = package / "train.py", package / "lib.py"
    for file in (module, tmp_path / "notes.txt"):
        file.write_text("old\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert commit_and_diff(module) == (commit, "")
    module.write_text("new\n")
    (tmp_path / "notes.txt").write_text("new\n")
    found, diff = commit_and_diff(module)
    assert found == commit
    assert "-old\n+new\n" in diff
    assert "notes" not in diff
    installed.write_text("in a repository, and not of it\n")
    assert commit_and_diff(installed) == (None, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_and_diff(module) == (None, "")


def test_a_run_tells_the_commit_of_each_start(shared_folder: Path, data_dir: Path) -> None:
    run = warm.clean_run(shared_folder, data_dir)
    [start] = json.loads((run / "config.json").read_text())["starts"]
    commit, diff = commit_and_diff(ROOT / "gpt2_ddp" / "train.py")
    assert start["commit"] == commit
    assert (run / "uncommitted_0.diff").exists() == bool(diff)
