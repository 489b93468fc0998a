"""Which commit the program is of, where it runs from a checkout of git."""

from __future__ import annotations

import subprocess
from pathlib import Path

LARGEST_DIFF = 1 << 22
"""Bytes; of a longer one the rest is left out."""
PATIENCE = 20.0
"""Seconds that git may take on a slow file system."""


def commit_and_diff(module: Path) -> tuple[str | None, str]:
    """The commit whose checkout the file `module` belongs to, and how the tracked files beside it differ from it.

    (None, "") where git does not track it, as in an installed package, or where there is no git.
    """
    folder = module.parent
    if _git(folder, "ls-files", "--error-unmatch", module.name) is None:
        return None, ""
    commit = _git(folder, "rev-parse", "HEAD")
    return (commit.strip() if commit else None), (_git(folder, "diff", "HEAD", "--", ".") or "")[:LARGEST_DIFF]


def _git(folder: Path, *words: str) -> str | None:
    """What git answers; None where it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
