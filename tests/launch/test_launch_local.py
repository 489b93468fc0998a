"""launch/local.sh and launch/setup.sh as a user calls them, for a few steps and in places of their own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from gpt2_ddp.config import TrainConfig
from gpt2_ddp.data.plan import BatchPlan
from gpt2_ddp.model.gpt import model_config
from gpt2_ddp.system import cli

SHORT = (
    "--model",
    "gpt2-nano",
    "--max-steps",
    "3",
    "--device",
    "cpu",
    "--val-every",
    "3",
    "--val-tokens",
    "256",
    "--total-batch-size",
    "1024",
)


@pytest.mark.skipif(
    not (ROOT / ".venv" / "installed-test").exists(), reason="bash tests/run.sh makes the .venv that local.sh needs"
)
def test_local_goes_from_text_to_a_sample(tmp_path: Path) -> None:
    data, run = tmp_path / "the data", tmp_path / "the run"
    environment = {**os.environ, "DATA_DIR": str(data), "RUN_DIR": str(run)}
    command = ["bash", ROOT / "launch" / "local.sh", *SHORT]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 3)
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = run / "report.html"
    assert f"wrote {report}: open it in a browser" in first.stdout
    assert "finished at step 3 of 3" in report.read_text()
    assert "The import statement" in first.stdout
    assert "at step 1, " in first.stdout


def test_the_first_command_is_less_than_a_minute_of_work_and_fits_eight_ranks() -> None:
    """Of two cores at 0.3 TFLOP/s, which leaves the rest of three minutes to what is no matmul, and to slower ones."""
    script = (ROOT / "launch" / "local.sh").read_text().replace("\\\n", " ")
    line = next(line for line in script.splitlines() if "-m launch -- --model" in line)
    words = [word for word in shlex.split(line.partition(" -- ")[2]) if word != "$@"]
    config = cli.parse(TrainConfig, "", words)
    work = model_config(config.model).flops_per_token(config.sequence_length)
    assert work * config.total_batch_size * config.max_steps < 60 * 0.3e12
    BatchPlan(
        micro_batch_size=1,
        sequence_length=config.sequence_length,
        total_batch_size=config.total_batch_size,
        world_size=8,
    )


STAND_IN = """#!/bin/sh
echo "$*" >>asked
case "$*" in
"-m launch "*)
  mkdir -p "${RUN_DIR:=runs/local}"
  echo '{"state": "'$STATE'", "step": 3}' >"$RUN_DIR/status.json"
  ;;
"-c import json"*) exec "$PYTHON" "$@" ;;
esac
"""
"""A Python that writes down what it is asked for, and whose training ends in $STATE."""


def local(checkout: Path, *flags: str, state: str = "finished", **places: str) -> subprocess.CompletedProcess[str]:
    """launch/local.sh in a checkout in which nothing is to be installed."""
    for folder in ("launch", ".venv/bin"):
        (checkout / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "launch" / "local.sh", checkout / "launch")
    (checkout / "launch" / "setup.sh").touch()
    (checkout / ".venv" / "bin" / "python").write_text(STAND_IN)
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    told = {name: value for name, value in os.environ.items() if name not in ("DATA_DIR", "RUN_DIR")} | places
    return subprocess.run(
        ["bash", "launch/local.sh", *flags], cwd=checkout, env=told | {"STATE": state, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_local_does_not_sample_a_run_that_was_asked_to_stop(tmp_path: Path) -> None:
    stopped = local(tmp_path, state="stopped")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert stopped.stdout.splitlines()[-1] == "== training is stopped: the same command goes on"
    assert "-m eval" not in (tmp_path / "asked").read_text()
    finished = local(tmp_path)
    assert (finished.returncode, "== done" in finished.stdout) == (0, True)
    assert "-m eval sample --model runs/local" in (tmp_path / "asked").read_text()


def test_local_prints_commands_that_can_be_pasted(tmp_path: Path) -> None:
    """They go to this run, also where its place has a space; where none was named they name none."""
    default = local(tmp_path).stdout
    assert "train longer  bash launch/local.sh --max-steps 2000\n" in default
    assert "-m eval sample --model runs/local --prompt" in default
    printed = local(tmp_path, DATA_DIR="my data", RUN_DIR="my 'own' run").stdout
    lines = {line[:13]: shlex.split(line[13:]) for line in printed.splitlines() if line.startswith(("more", "train"))}
    assert lines["train longer "][:3] == ["DATA_DIR=my data", "RUN_DIR=my 'own' run", "bash"]
    assert lines["more text    "][:5] == [".venv/bin/python", "-m", "eval", "sample", "--model"]
    assert lines["more text    "][5] == "my 'own' run"


@pytest.mark.parametrize("flags", [("--out-dir", "b"), ("--out_dir=b",), ("--data_dir", "d"), ("--config=f",)])
def test_local_refuses_flags_that_it_would_not_follow_itself(tmp_path: Path, flags: tuple[str, ...]) -> None:
    refused = local(tmp_path, "--max-steps=3", *flags)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith(f"error: {flags[0].partition('=')[0]} is not for local.sh")
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("version", "said"), [("", "no python3 on PATH"), ("Python 3.8.10", "3.8.10 is too old")])
def test_setup_without_a_fitting_python_says_so(tmp_path: Path, version: str, said: str) -> None:
    for name in ("bash", "dirname", "cat", "cksum"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    if version:
        python = tmp_path / "python3"
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit 0\nexit 1\n')
        python.chmod(0o755)
    done = set_up(tmp_path / "checkout", PATH=str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


WITHOUT_PIP = """#!/bin/sh
case "$*" in
"-ISc "*realpath*) readlink -f "$0" ;;
"-ISc "*) echo 3.11 ;;
"-m pip --version") [ -e .venv/pip ] ;;
"-m venv "*) echo "$0 $*" >>asked; touch .venv/pip; [ -e .venv/bin/python ] || ln -sf "$0" .venv/bin/python ;;
esac
"""
"""Python 3.11 that has pip in .venv once it was asked to make that."""


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/setup.sh in a checkout of which only what it reads is there, so that there is nothing to install."""
    (checkout / "launch").mkdir(parents=True, exist_ok=True)
    for name in ("setup.cfg", "launch/constraints.txt", "launch/setup.sh"):
        shutil.copy(ROOT / name, checkout / name)
    return subprocess.run(
        ["bash", checkout / "launch" / "setup.sh"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def python(path: Path, version: str) -> Path:
    """A stand-in for Python of that version, to which all succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def installed(checkout: Path, version: str) -> Path:
    """The stamp of a .venv in which all is installed for Python `version`."""
    python(checkout / ".venv" / "bin" / "python", version)
    read = (ROOT / "setup.cfg").read_bytes() + (ROOT / "launch" / "constraints.txt").read_bytes()
    wanted = subprocess.run(["cksum"], input=read, capture_output=True, check=True).stdout.decode().strip()
    stamp = checkout / ".venv" / "installed-test"
    stamp.write_text(f"{wanted} Python {version}\n")
    return stamp


def test_setup_asks_for_no_python_where_all_is_installed(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "cat", "cksum"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    installed(tmp_path / "checkout", "3.11")
    done = set_up(tmp_path / "checkout", PATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_setup_installs_anew_where_the_environments_python_became_another(tmp_path: Path) -> None:
    installed(tmp_path, "3.11")
    python(tmp_path / ".venv" / "bin" / "python", "3.12")
    first, second = (set_up(tmp_path, PATH=os.environ["PATH"]) for _ in range(2))
    assert (first.returncode, "setup: installing" in first.stdout) == (0, True)
    assert (second.returncode, second.stdout) == (0, "")


@pytest.mark.parametrize(("version", "told"), [("3.12", "is 3.12"), ("", "is no Python"), ("3.11", "")])
def test_setup_does_not_pass_over_the_python_that_was_asked_for(tmp_path: Path, version: str, told: str) -> None:
    stamp = installed(tmp_path, "3.11")
    asked = python(tmp_path / "another", version) if version else tmp_path / "gone"
    done = set_up(tmp_path, PATH=os.environ["PATH"], PYTHON=str(asked))
    assert (done.returncode, done.stdout) == (2 if told else 0, "")
    if told:
        assert done.stderr.startswith(f"error: .venv has Python 3.11, but PYTHON={asked} {told}: delete .venv ")
    assert done.stderr.count("\n") == (1 if told else 0)
    assert stamp.exists()


@pytest.mark.parametrize(
    ("broken", "asked"),
    [
        ("without pip", ".venv/bin/python -m venv .venv"),
        ("of another Python", "python3.11 -m venv --clear .venv"),
        ("without its Python", "python3 -m venv --clear .venv"),
    ],
)
def test_setup_mends_an_environment(tmp_path: Path, broken: str, asked: str) -> None:
    """One that was interrupted or made by uv has no pip; its Python may have been replaced, or gone."""
    for name in ("python3", "python3.11"):
        (tmp_path / name).write_text(WITHOUT_PIP)
        (tmp_path / name).chmod(0o755)
    inner = tmp_path / "checkout" / ".venv" / "bin" / "python"
    inner.parent.mkdir(parents=True)
    (inner.parents[1] / "lib" / ("python3.10" if broken == "of another Python" else "python3.11")).mkdir(parents=True)
    inner.symlink_to(tmp_path / ("gone" if broken == "without its Python" else "python3.11"))
    first, second = (set_up(tmp_path / "checkout", PATH=f"{tmp_path}:{os.environ['PATH']}") for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    made = (tmp_path / "checkout" / "asked").read_text()
    assert made.replace(f"{tmp_path}/", "") == f"{asked}\n"
    assert (second.returncode, second.stdout) == (0, "")
