"""How every command of the project reads its flags and ends.

Exit status: 0 done; 75 stopped cleanly without torchrun; 2 for what the user got wrong, told in one line on
stderr; 1 for anything else, with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

OURS = {"gpt2_ddp", "data_prep", "eval"}
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
}
EXIT_FILE = "GPT2_DDP_EXIT_FILE"
"""Environment variable: the file that tells `python -m launch` how the trainer ended, whatever torchrun answers."""

Config = TypeVar("Config")


class OneRankError(ValueError):
    """What the user got wrong, seen by one rank alone, which therefore tells it."""


def user_error(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for a fault of the program.

    A user's error is a `ValueError` raised by the project's own code (one from inside a library is a bug and
    keeps its traceback), or the file system's refusal of a file.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        package = str(frames[-1].f_globals.get("__package__")) if frames else ""
        if package.split(".")[0] in OURS:
            return " ".join(str(error).split())
    return None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its exit status; what the user got wrong is told once on a node."""
    try:
        status = main() or 0
    except (ValueError, OSError) as error:
        line = user_error(error)
        if line is None or os.environ.get("GPT2_DDP_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OneRankError):
            tell(f"error: {line}")
        status = 2
    if (exit_file := os.environ.get(EXIT_FILE)) and os.environ.get("LOCAL_RANK", "0") == "0":
        with open(exit_file, "w") as file:
            file.write(str(status))
    sys.exit(status)


def tell(line: str) -> None:
    """Write `line` to stderr in one piece, so that those of several ranks do not run into each other."""
    sys.stderr.write(f"{line}\n")  # `print` writes the end of the line apart where Python is unbuffered
    sys.stderr.flush()


def parse(config: Callable[..., Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """The dataclass or subcommand union `config`, filled from the command line by tyro.

    Raises:
        ValueError: for a flag that tyro refuses, with tyro's message folded to one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, prog=_command(), description=description, args=argv)
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        box = re.sub(r"\x1b\[[0-9;]*m|╭.*╮", "", said.getvalue())
        raise ValueError(" ".join(re.sub(r"[^\x20-\x7e]+", " ", box).split())) from None


def _command() -> str:
    """The command as a user types it: `python -m eval` rather than the path of a file in it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
