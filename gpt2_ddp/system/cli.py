"""How every command of the project reads its flags, speaks and ends.

Exit status: 0 done; 75 stopped cleanly without torchrun; 2 for what the user got wrong, told in one line on
stderr; 128 + N where signal N left no time to save; 1 for anything else, with its traceback.

What is written for eyes never decides how a command ends: `console.speak_safely`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from gpt2_ddp.system.console import lost_output, speak_safely
from gpt2_ddp.system.errors import OneRankError, UserError, user_error

EXIT_FILE = "GPT2_DDP_EXIT_FILE"
"""Environment variable: the file that tells `python -m launch` how the trainer ended, whatever torchrun answers."""
GIVEN_UP = "given up"
"""The name of a thread that waits for a library which no longer answers, and whose exit handlers would wait as well."""

Config = TypeVar("Config")


def run(main: Callable[[], int | None], *, prints_result: bool = False) -> NoReturn:
    """Run `main` and leave with its exit status; what the user got wrong is told once on a node.

    `prints_result` is for commands whose result is what they print: a disk that has no room for it is a user's error
    there. A reader that has seen enough, as `head`, is none.
    """
    speak_safely()
    try:
        require_posix(sys.platform)
        status = main() or 0
        lost = lost_output()
        if prints_result and lost is not None:
            tell(f"error: stdout: {lost.strerror}: the result is not whole")
            status = 2
    except KeyboardInterrupt:
        tell("interrupted")
        status = 130
    except (UserError, OSError) as error:
        line = user_error(error)
        if line is None or os.environ.get("GPT2_DDP_TRACEBACK"):
            raise
        if first_of_node() or isinstance(error, OneRankError):
            tell(f"error: {line}")
        status = 2
    leave(status)


def require_posix(platform: str) -> None:
    """
    Raises:
        UserError: on Windows, which has neither the signals nor the locks that a run is stopped and kept safe by.
    """
    if platform == "win32":
        raise UserError("Windows itself has no SIGUSR1 and no file locks of POSIX: run this in WSL (wsl --install)")


def leave(status: int, *, at_once: bool = False) -> NoReturn:
    """End this process with `status`, which `python -m launch` is told; `at_once` from any thread, as it stands."""
    if (exit_file := os.environ.get(EXIT_FILE)) and first_of_node():
        with contextlib.suppress(OSError), open(exit_file, "w") as file:
            file.write(str(status))
    if at_once:
        os._exit(status)
    if any(thread.name == GIVEN_UP for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def first_of_node() -> bool:
    """Whether this process speaks for its node. Without torchrun each does, whatever variables it has inherited."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def tell(line: str) -> None:
    """Write `line` to stderr in one piece, so that those of several ranks do not run into each other."""
    sys.stderr.write(f"{line}\n")  # `print` writes the end of the line apart where Python is unbuffered
    sys.stderr.flush()


def parse(config: Callable[..., Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """The dataclass or subcommand union `config`, filled from the command line by tyro.

    Raises:
        UserError: for a flag that tyro refuses, with tyro's message folded to one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, prog=_command(), description=description, args=argv)
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        box = re.sub(r"\x1b\[[0-9;]*m|╭.*╮", "", said.getvalue())
        raise UserError(" ".join(re.sub(r"[^\x20-\x7e]+", " ", box).split())) from None


def _command() -> str:
    """The command as a user types it: `python -m eval` rather than the path of a file in it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
