"""glibc's allocator, told to keep what it has got: for training on a CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process reuse the memory it frees; whether the C library could be told so.

    By default glibc asks the kernel for every large tensor and gives it back when it is freed, and each page is cleared
    and mapped anew in every step: a third or more of a training step's time on a CPU. From now on the heap only grows,
    to the peak of what was in use at once and what lies unused between.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
