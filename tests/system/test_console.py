"""A run outlives its terminal: what stdout and stderr refuse, in whatever way, decides nothing."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_prep_runs import COMMAND
from drivers import warm
from running import ROOT, checkpoint, environment, metrics, python, status, wait_until

from gpt2_ddp.checkpoint.files import faults
from gpt2_ddp.system import cli, console
from launch.__main__ import require_posix
from launch.console import say

HELD = {"hold": {"where": "step", "step": 6}}


def check_finished(out_dir: Path) -> None:
    assert [entry["step"] for entry in metrics(out_dir)] == list(range(1, 13))
    assert faults(checkpoint(out_dir, 12)) == []
    assert (status(out_dir)["state"], status(out_dir)["step"]) == ("finished", 12)


def check_stopped(out_dir: Path, reason: str) -> None:
    assert (status(out_dir)["state"], status(out_dir)["step"]) == ("stopped", 6)
    assert [stop["reason"] for stop in metrics(out_dir, "stop")] == [reason]
    assert faults(checkpoint(out_dir, 6)) == []


def test_a_full_disk_behind_the_console(data_dir: Path, tmp_path: Path) -> None:
    done = warm.start(tmp_path / "run", data_dir, console="/dev/full").wait()
    assert done.returncode == 0
    check_finished(tmp_path / "run")


def test_a_reader_that_is_killed(data_dir: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    trainer = warm.start(tmp_path / "run", data_dir, faults=HELD, console=str(tmp_path / "pipe"))
    with open(tmp_path / "pipe", "rb") as pipe, open(tmp_path / "log", "wb") as log:
        tee = subprocess.Popen(["tee"], stdin=pipe, stdout=log)
    wait_until((tmp_path / "run" / "held").exists)
    wait_until(lambda: "\nstep 1 | loss: " in (tmp_path / "log").read_text())
    tee.kill()
    tee.wait()
    (tmp_path / "run" / "go").touch()
    assert trainer.wait().returncode == 0
    check_finished(tmp_path / "run")


def test_a_terminal_that_closes_in_the_middle_of_a_step(data_dir: Path, tmp_path: Path) -> None:
    out_dir, (master, terminal) = tmp_path / "run", pty.openpty()
    trainer = warm.start(out_dir, data_dir, faults=HELD, console=os.ttyname(terminal))
    wait_until((out_dir / "held").exists)
    os.close(terminal)
    os.close(master)
    assert trainer.wait().returncode == 75
    check_stopped(out_dir, "SIGHUP")


def test_under_nohup_a_hangup_is_nothing(data_dir: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    trainer = warm.start(out_dir, data_dir, faults=HELD | {"ignored_hangup": {}})
    wait_until((out_dir / "held").exists)
    trainer.send(signal.SIGHUP)
    (out_dir / "go").touch()
    assert trainer.wait().returncode == 0
    check_finished(out_dir)


def test_two_ranks_whose_terminal_closes(data_dir: Path, tmp_path: Path) -> None:
    """Under plain torchrun, which gets the SIGHUP of the terminal and passes it on."""
    out_dir, (master, terminal) = tmp_path / "run", pty.openpty()
    driver = [str(warm.DRIVER), *warm.flags(out_dir, data_dir)]
    held = {"hold": {"where": "step", "step": 6, "rank": 1}}
    running = subprocess.Popen(
        ["setsid", "--ctty", *python(2), *driver], env=environment({"FAULTS": json.dumps(held)}),
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=False,
    )  # fmt: skip
    os.close(terminal)
    wait_until((out_dir / "held").exists)
    os.close(master)
    running.wait(timeout=60)
    check_stopped(out_dir, "SIGHUP")


def test_launch_two_ranks_and_a_reader_that_has_seen_enough(data_dir: Path, tmp_path: Path) -> None:
    """The pipe is the launcher's, torchrun's and both ranks'; one line later nobody reads it."""
    out_dir = tmp_path / "run"
    running = subprocess.Popen(
        [sys.executable, "-m", "launch", "--cpu", "--nproc-per-node=2", f"--module={warm.DRIVER}", "--",
         *warm.flags(out_dir, data_dir)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline().startswith(b"launch: ")
    running.stdout.close()
    assert running.wait(timeout=120) == 0
    check_finished(out_dir)


def test_a_console_without_the_letters(data_dir: Path, tmp_path: Path) -> None:
    flags = ("--model", "gpt2-nano", "--max-steps", "2", "--sample-every", "1")
    done = warm.train(tmp_path / "run", data_dir, *flags, faults={"encoding": {"name": "ascii"}})
    texts = [entry["text"] for entry in metrics(tmp_path / "run", "sample")]
    assert not "".join(texts).isascii()
    for step, text in enumerate(texts, start=1):
        assert f"step {step} | sample: {text}".encode("ascii", "backslashreplace").decode() in done.stdout


def test_data_preparation_finishes_its_shards(tmp_path: Path) -> None:
    """To the interpreter's last flush, which would make it status 120."""
    (tmp_path / "a.txt").write_text("Nobody reads this. " * 200)
    command = [*COMMAND, "text", str(tmp_path / "a.txt"), "--val-fraction", "0", "--workers", "1"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "data")],
            stdout=writer, stderr=full, env=environment(), cwd=ROOT, check=False,
        )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "data" / "train_000000.bin").exists()


RESULT = """
import sys
from gpt2_ddp.system import cli, console
cli.run(lambda: print("a result", end=""), prints_result=True)
"""


@pytest.mark.parametrize(("shell", "expected"), [("> /dev/full", 2), ("| true", 0), (">&-", 0)])
def test_a_result_that_a_full_disk_swallows_is_told(shell: str, expected: int) -> None:
    line = f'set -o pipefail; "$0" -c "$1" {shell}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, RESULT], env=environment(), cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == expected
    assert done.stderr == ("error: stdout: No space left on device: the result is not whole\n" if expected else "")


def test_letters_beyond_the_encoding_come_as_escapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as out, open(os.devnull, "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        console.speak_safely()
        print("a\u00e4\u4f60\udc80")
        assert (tmp_path / "out").read_text() == "a\\xe4\\u4f60\\udc80\n"
    launched = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("a\u00e4", launched)
    assert launched.buffer.getvalue() == b"a\\xe4\n"


@pytest.mark.parametrize("require", [cli.require_posix, require_posix])
def test_windows_is_told_of_wsl(require: object) -> None:
    assert callable(require)
    require(sys.platform)
    with pytest.raises(ValueError, match="run this in WSL"):
        require("win32")
