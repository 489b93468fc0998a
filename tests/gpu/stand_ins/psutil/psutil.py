"""What the trainer needs of psutil, read from Linux."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace


def virtual_memory() -> SimpleNamespace:
    """Bytes of main memory: all, and what is free now."""
    page = os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(total=page * os.sysconf("SC_PHYS_PAGES"), available=page * os.sysconf("SC_AVPHYS_PAGES"))


class Process:
    """This process."""

    def memory_info(self) -> SimpleNamespace:
        """Bytes that it holds in main memory."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return SimpleNamespace(rss=pages * os.sysconf("SC_PAGE_SIZE"))
