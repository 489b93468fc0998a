"""Run torchrun as a child: pass signals on to the trainer, end user errors at once, leave no process behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from launch.console import say
from launch.discovery import read

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
"""An environment may have torch without a torchrun on PATH."""
AGENT = (sys.executable, "-m", "launch.agent")
"""The same, with a word less at a stop."""
EXIT_FILE = "GPT2_DDP_EXIT_FILE"
USER_ERROR = "2"
STOPPED_OR_DONE = "0"
LAST_SECONDS = 3.0
"""What ranks get after a second Ctrl-C to note in the run directory that they end."""
POLL_SECONDS = 0.05
"""Shorter than torchrun's own look at its workers, so that a user error is seen here first."""
SURVEY_SECONDS = 1.0
"""Between two looks for new workers: each reads the whole process table."""
PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def run_torchrun(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run torchrun with `environment` on top of the inherited one, to its end; the exit status for the shell."""
    received = received_signals()
    with tempfile.TemporaryDirectory(prefix="gpt2_ddp_launch_") as folder:
        exit_file = Path(folder) / "status"
        agent = psutil.Popen(
            [*AGENT, *arguments],
            env={**os.environ, **environment, EXIT_FILE: str(exit_file)},
            stdin=subprocess.DEVNULL,
            # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        run = Run(agent=agent)
        try:
            while agent.poll() is None:
                with suppress(psutil.TimeoutExpired):
                    agent.wait(timeout=POLL_SECONDS)
                if read(exit_file) == USER_ERROR or received.count(signal.SIGINT) > 1:
                    break
                run.survey()
                run.pass_on(received)
            if received.count(signal.SIGINT) > 1:
                run.interrupt()
        finally:
            run.end()
        killed_by = received[-1] if run.agent_asked or received.count(signal.SIGINT) > 1 else None
        status = exit_status(agent.wait(), read(exit_file), killed_by, stopped=bool(received))
        if killed_by is not None and status == 128 + killed_by:
            say(f"launch: ended by {killed_by.name}: the trainer had no time to save a step", sys.stderr)
        return status


@dataclass
class Run:
    """torchrun's process and its workers, the ranks of this node."""

    agent: psutil.Popen
    workers: list[psutil.Process] = field(default_factory=list)
    asked: list[psutil.Process] = field(default_factory=list)
    """Workers that were told to stop; empty until a signal comes."""
    agent_asked: bool = False
    next_survey: float = 0.0

    def survey(self) -> None:
        """Learn about new workers from time to time: they must be ended should torchrun be killed."""
        if time.monotonic() >= self.next_survey:
            self.next_survey = time.monotonic() + SURVEY_SECONDS
            self.look_for_workers()

    def look_for_workers(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.workers.extend(child for child in self.agent.children() if child not in self.workers)

    def pass_on(self, received: Sequence[signal.Signals]) -> None:
        """Tell the trainer to stop, once.

        The signal goes to the workers, which save and end with status 0, so that torchrun ends as after a finished
        run on every node. torchrun is told itself where no worker answers to signals yet, or where it starts new ones
        after the signal because the old had no time to install their answer to it.
        """
        if not received or self.agent_asked:
            return
        self.look_for_workers()
        alive = [worker for worker in self.workers if worker.is_running()]
        ready = [worker for worker in alive if answers(worker)]
        if not self.asked and ready:
            self.asked.extend(alive)
            for worker in alive:
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(received[0] if worker in ready else signal.SIGTERM)
        elif not self.asked or any(worker not in self.asked for worker in alive):
            self.agent_asked = True
            self.agent.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Tell the ranks once more, with nobody left who would start them again."""
        self.look_for_workers()
        with suppress(psutil.NoSuchProcess):
            self.agent.kill()
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGINT)
        psutil.wait_procs(self.workers, timeout=LAST_SECONDS)

    def end(self) -> None:
        """Kill what is left: torchrun first, which has no chance to restart or to explain, then its workers."""
        self.look_for_workers()
        with suppress(psutil.NoSuchProcess):
            self.agent.kill()
        for worker in self.workers:
            # Each worker leads a session of its own, with its children.
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if worker.is_running():
                    os.killpg(worker.pid, signal.SIGKILL)


def exit_status(returncode: int, decided: str, killed_by: signal.Signals | None, *, stopped: bool) -> int:
    """The launcher's exit status.

    `returncode` is torchrun's, `decided` what the trainer's first rank wrote ("" for nothing), `killed_by` the signal
    that left the trainer no time to stop, `stopped` whether any signal came.
    """
    if decided == USER_ERROR:
        return int(USER_ERROR)
    if stopped and decided == STOPPED_OR_DONE:
        return 0
    if killed_by is not None and returncode != 0:
        return 128 + killed_by
    return 128 - returncode if returncode < 0 else returncode


def end_with_parent() -> None:
    """In the child, before torchrun starts: SIGTERM when the launcher dies, as by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def answers(worker: psutil.Process) -> bool:
    """Whether the process has a handler for SIGTERM: one that still imports its libraries dies of it. Linux tells."""
    caught = [line.split()[1] for line in read(Path(f"/proc/{worker.pid}/status")).splitlines() if "SigCgt" in line]
    return not caught or bool(int(caught[0], 16) >> (signal.SIGTERM - 1) & 1)


def received_signals() -> list[signal.Signals]:
    """A list that grows by each signal to pass on, to the end of this process.

    SIGHUP, of a terminal that has gone, is one of them unless it is ignored, as under `nohup`. The default answers do
    not come back: a second signal at the very end must not replace the status decided on.
    """
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup):
        signal.signal(number, note)
    return received
