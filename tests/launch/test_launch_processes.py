"""`python -m launch` with real torchrun and real signals, on a toy trainer that ends as the real one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from running import ROOT

from gpt2_ddp.system.allocator import find_tcmalloc
from launch.torchrun import exit_status

TOY = """
import os, signal, sys, time
from pathlib import Path

folder, behaviour = Path(sys.argv[1]), sys.argv[2]
rank, attempt = os.environ["LOCAL_RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
stopped = []
if behaviour != "unready":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda n, _: stopped.append(n))

def leave(status):
    if rank == "0":
        Path(os.environ["GPT2_DDP_EXIT_FILE"]).write_text(str(status))
    sys.exit(status)

(folder / f"rank{rank}.attempt{attempt}").write_text(str(os.getpid()))
if behaviour == "user-error":
    leave(2)
if behaviour == "crash-once" and attempt == "0" and rank == "1":
    sys.exit(1)
if behaviour in ("train", "unready"):
    while not stopped:
        time.sleep(0.02)
    if len(sys.argv) > 3:
        time.sleep(float(sys.argv[3]))
    (folder / f"saved{rank}.{stopped[0]}").touch()
leave(0)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    return script


def command(toy: Path, *trainer: str, flags: tuple[str, ...] = ()) -> list[str]:
    own = ("--cpu", "--nproc-per-node", "2", f"--module={toy}", *flags)
    return [sys.executable, "-m", "launch", *own, "--", str(toy.parent), *trainer]


def wait_for(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def started(toy: Path, *trainer: str) -> Iterator[subprocess.Popen[str]]:
    """A launch whose two ranks run; everything below it is killed on leaving."""
    running = subprocess.Popen(
        command(toy, *trainer), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: len(ranks(toy.parent)) == 2 or running.poll() is not None, "two ranks")
        assert running.poll() is None, running.communicate()
        yield running
    finally:
        for process in ranks(toy.parent):
            process.kill()
        running.kill()
        running.communicate()


def ranks(folder: Path) -> list[psutil.Process]:
    """The rank processes that have told their id and still run."""
    alive = []
    for path in folder.glob("rank*"):
        with suppress(psutil.NoSuchProcess, ValueError):
            alive.append(psutil.Process(int(path.read_text())))
    return alive


def gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


def test_a_crash_restarts_all_ranks(toy: Path) -> None:
    done = subprocess.run(command(toy, "crash-once"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"rank0.attempt1", "rank1.attempt1"} <= {path.name for path in toy.parent.glob("rank*")}
    assert "2 rank(s) of " in done.stderr


@pytest.mark.skipif(not find_tcmalloc(), reason="tcmalloc is not installed")
def test_ranks_on_the_cpu_run_with_tcmalloc(tmp_path: Path) -> None:
    script = tmp_path / "maps.py"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(open('/proc/self/maps').read())")
    launch = [sys.executable, "-m", "launch", "--cpu", "--nproc-per-node=1", f"--module={script}", "--"]
    bare = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(
        [*launch, str(tmp_path / "maps")], cwd=ROOT, env=bare, capture_output=True, text=True, check=True
    )
    assert find_tcmalloc() in (tmp_path / "maps").read_text()
    assert "with tcmalloc" in done.stderr


def test_a_crash_without_restarts_is_status_1(toy: Path) -> None:
    once = command(toy, "crash-once", flags=("--max-restarts=0",))
    assert subprocess.run(once, cwd=ROOT, capture_output=True, check=False).returncode == 1


def test_a_user_error_ends_at_once_quietly_and_is_not_tried_again(toy: Path) -> None:
    done = subprocess.run(command(toy, "user-error"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("launch: ")] == []
    assert not list(toy.parent.glob("*.attempt1"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once_and_a_clean_stop_is_status_0(toy: Path, number: signal.Signals) -> None:
    with started(toy, "train") as running:
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert {path.name for path in toy.parent.glob("saved*")} == {f"saved{rank}.{int(number)}" for rank in (0, 1)}
    assert [line for line in errors.splitlines() if not line.startswith("launch: 2 rank(s)")] == []


def test_sigterm_to_every_process_at_once_still_saves(toy: Path) -> None:
    """As scancel does it: launcher, torchrun and ranks each get the signal from outside."""
    with started(toy, "train", "1.0") as running:
        launcher = psutil.Process(running.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 0
    assert [line for line in errors.splitlines() if not line.startswith("launch: 2 rank(s)")] == []
    assert len(list(toy.parent.glob("saved*"))) == 2


def test_a_second_interrupt_ends_at_once(toy: Path) -> None:
    with started(toy, "train", "600") as running:
        processes = ranks(toy.parent)
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
        assert running.returncode == 128 + signal.SIGINT
        assert gone(processes)


def test_ranks_that_were_not_ready_are_not_started_again(toy: Path) -> None:
    with started(toy, "unready") as running:
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT
    assert errors.splitlines()[1:] == ["launch: ended by SIGINT: the trainer had no time to save a step"]


@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_no_rank_survives_a_sigkill_above_it(toy: Path, victim: str) -> None:
    if sys.platform != "linux":
        pytest.skip("the launcher's death is noticed through Linux's prctl")
    with started(toy, "train") as running:
        processes = ranks(toy.parent)
        agent = processes[0].parent()
        assert agent is not None
        time.sleep(1.5)
        os.kill(running.pid if victim == "launcher" else agent.pid, signal.SIGKILL)
        wait_for(lambda: gone([*processes, agent]), "the ranks end")
        running.wait(timeout=20)


def test_pinned_ranks_stay_on_their_cpus(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cpus) < 2:
        pytest.skip("needs two CPUs and Linux")
    script = tmp_path / "where.py"
    script.write_text(
        "import os, sys\nprint(__name__, sys.argv[1:], sorted(os.sched_getaffinity(0)), os.environ['LOCAL_RANK'])\n"
    )
    environment = {**os.environ, "GPT2_DDP_CPUS": f"{cpus[0]};{cpus[1]}"}
    for rank in (0, 1):
        done = subprocess.run(
            [sys.executable, "-m", "launch.pinned", str(script), "--flag"],
            env={**environment, "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == f"__main__ ['--flag'] [{cpus[rank]}] {rank}"


def test_dry_run_prints_a_command_that_a_shell_can_run(toy: Path) -> None:
    printed = subprocess.run(
        command(toy, "finish", flags=("--dry-run",)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not list(toy.parent.glob("rank*"))
    pasted = subprocess.run(
        ["bash", "-c", printed.stdout],
        cwd=ROOT,
        env={**os.environ, "GPT2_DDP_EXIT_FILE": str(toy.parent / "status")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert pasted.returncode == 0, pasted.stderr
    assert len(list(toy.parent.glob("rank*"))) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--frobnicate",), "--frobnicate; flags of the trainer go behind --"),
        (("--nnodes=2",), "--rdzv-endpoint HOST:PORT"),
        (("--nproc-per-node=many",), "invalid int value: 'many'"),
    ],
)
def test_a_wrong_launcher_flag_is_one_line_and_status_2(flags: tuple[str, ...], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_status_of_a_torchrun_that_was_killed() -> None:
    assert exit_status(-9, "", None, stopped=False) == 137
    assert exit_status(1, "0", None, stopped=True) == 0
    assert exit_status(1, "", None, stopped=True) == 1
