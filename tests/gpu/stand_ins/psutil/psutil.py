"""The one function of psutil that the trainer calls."""

from __future__ import annotations

import os
from types import SimpleNamespace


def virtual_memory() -> SimpleNamespace:
    """Bytes of main memory: all, and what is free now."""
    page = os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(total=page * os.sysconf("SC_PHYS_PAGES"), available=page * os.sysconf("SC_AVPHYS_PAGES"))
