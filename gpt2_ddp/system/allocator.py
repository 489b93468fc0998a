"""What hands out main memory, for training on a CPU: glibc's allocator told to keep what it has got, or tcmalloc."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), from glibc's malloc.h."""
PRELOAD = "LD_PRELOAD"
"""The variable with libraries that the dynamic linker of Linux puts before all others, ld.so(8)."""


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


def find_tcmalloc() -> str:
    """The name by which the linker knows gperftools' tcmalloc here, to be preloaded; empty where it is not installed.

    With glibc's allocator a training step holds more memory than it uses; the last two rungs of `bench` show how much.
    Why is inferred from glibc 2.36: it asks for more than a tensor to align it, so that the place of a freed one is
    too small for the next of its size. tcmalloc keeps the sizes apart.
    """
    if sys.platform != "linux":
        return ""
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc") or ""


def preloaded(library: str) -> bool:
    """Whether this process was started with `library`."""
    return library in os.environ.get(PRELOAD, "").replace(":", " ").split()
