"""launch/Dockerfile without Docker: what lints it finds nothing, and the files that it copies are enough to train with.

That it builds, and what a GPU does in it, is not tested.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from architecture import PACKAGES
from running import ROOT, environment

DOCKERFILE = ROOT / "launch" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(words[0], words[1]) for words in (line.split(maxsplit=1) for line in joined.splitlines())]


def context(folder: Path) -> Path:
    """The tracked files that Dockerfile.dockerignore leaves; its rules are names at the top, and one of any depth."""
    rules = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert [rule for rule in rules if rule and rule[0] not in "#!"] == ["*", "**/__pycache__"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.split("/")[0] in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    assert all((folder / name).exists() for name in kept)
    return folder


def copied(source: Path, image: Path, words: str) -> None:
    """As COPY does it: files into a folder, or a folder's contents into a folder."""
    *names, target = words.split()
    for name in names:
        assert (source / name).exists(), name
        if (source / name).is_dir():
            shutil.copytree(source / name, image / target, dirs_exist_ok=True)
        else:
            (image / target).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, image / target)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_image_has_what_a_command_needs_and_pip_is_held_to_the_tested_versions(tmp_path: Path) -> None:
    source, image = context(tmp_path / "context"), tmp_path / "image"
    installed = False
    for name, words in instructions():
        if name == "COPY":
            copied(source, image, words)
        elif name == "RUN" and "pip install" in words:
            assert re.search(r" -c launch/constraints\.txt .*-e \"\.\[offline,plot\]\"$", words)
            needed = ("launch/constraints.txt", "setup.cfg", "pyproject.toml", "README.md", "gpt2_ddp/__init__.py")
            assert [file for file in needed if not (image / file).is_file()] == []
            assert not (image / "gpt2_ddp" / "train.py").exists()  # a change of the code does not install again
            installed = True
    assert installed
    assert [name for name, _ in instructions()].count("FROM") == 1
    missing = [
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not (image / path.relative_to(ROOT)).is_file()
    ]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [path for path in missing if str(path) in tracked] == []

    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    assert entry == ["python", "-m", "launch", "--"]
    command = [sys.executable, *entry[1:-1], "--cpu", "--dry-run", "--", "--config", "launch/gpt2_124m_t4.toml"]
    env = environment() | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=image, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-m gpt2_ddp.train --config launch/gpt2_124m_t4.toml" in done.stdout
