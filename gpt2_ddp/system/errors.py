"""What a user got wrong, told apart from faults of the program."""

from __future__ import annotations

import errno

DISK_ERRORS = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class UserError(ValueError):
    """What the user got wrong and can mend: what, where, the mend. A command says it in one line and ends with 2.

    A `ValueError` of another kind is a fault of the program or of a library, and keeps its traceback.
    """


class OneRankError(UserError):
    """What the user got wrong, seen by one rank alone, which therefore tells it."""


def user_error(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for a fault of the program.

    The file system's refusal of a file is a user's error too.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) if isinstance(error, UserError) else None
