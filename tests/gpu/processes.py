"""Work in a process of its own that starts at once, since it is forked: with a bound, or with an answer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MARK = "GPU_KIT_PART"
"""In the environment of all that a part starts: those that left its process group are found by it."""


def forked(work: Callable[[], object], log: Path, seconds: float) -> str:
    """Run `work` in a child that writes to the end of `log`; why it did not end well, empty where it did.

    After `seconds` it is killed with all that it started. The parent must not have touched CUDA.
    """
    mark = str(uuid.uuid4())
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ[MARK] = mark
        _write_to(log)
        _leave(work)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return "" if code == 0 else f"ended with status {code}"
            time.sleep(0.02)
        return f"ended after its bound of {seconds:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _kill_marked(mark)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def isolated(work: Callable[[], Any]) -> Any:
    """What `work` gives, as JSON carries it, from a child: its memory and its CUDA are its own.

    Raises:
        RuntimeError: where `work` raises, with its message; the log has the traceback.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)

        def answer() -> None:
            try:
                told = {"value": work()}
            except Exception as error:
                traceback.print_exc()
                told = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(writer, "w") as pipe:
                json.dump(told, pipe)

        _leave(answer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    told = json.loads(text) if text else {"error": f"a process ended with {os.waitstatus_to_exitcode(status)}"}
    if "error" in told:
        raise RuntimeError(told["error"][:500])
    return told["value"]


def _leave(work: Callable[[], object]) -> None:
    """Do `work` and end this process at once, without what the parent had registered for its own end."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _write_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    # Python's own may write elsewhere, where a test runner has replaced them.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _kill_marked(mark: str) -> None:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
