"""What Linux's control groups leave to this process: a container or a batch system may grant less than there is.

Both versions, along all groups from this process's own up to the root: each may set a limit, and the smallest holds. A
container may be told paths of groups that it does not see; then the root is its own. Elsewhere than on Linux there are
none. The launcher starts any module, imports none of them, and so looks for the quota itself (`launch.discovery`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process and its children may still take: of the machine, and of its control groups.

    What a group's cache holds of files that were not used of late counts as free, as it does on the machine.
    """
    free = [psutil.virtual_memory().available]
    for group in _unified_groups(root, membership):
        free += _left(group, "memory.max", "memory.current", "inactive_file")
    for group in _groups(root, membership, "memory"):
        free += _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return max(0, min(free))


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """The CPUs' time that control groups grant, as a number of CPUs; None where they set no limit."""
    limits = [_read(group / "cpu.max") for group in _unified_groups(root, membership)]
    for group in _groups(root, membership, "cpu"):
        limits.append(f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}")
    found = [re.fullmatch(r"(\d+) (\d+)", limit) for limit in limits]
    return min((int(limit[1]) / int(limit[2]) for limit in found if limit), default=None)


def _left(group: Path, limit: str, usage: str, cache: str) -> list[int]:
    most, used = _read(group / limit), _read(group / usage)
    if not (most.isdecimal() and used.isdecimal()):  # "max", or no such file
        return []
    held = re.search(rf"^{cache} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    return [int(most) - int(used) + int(held[1] if held else 0)]


def _unified_groups(root: Path, membership: Path) -> Iterator[Path]:
    """The groups of version 2, this process's own first."""
    own = next((line[3:] for line in _read(membership).splitlines() if line.startswith("0::")), "/")
    return _upwards(root, own)


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The groups of version 1 for one of its controllers, this process's own first."""
    lines = [line.split(":", 2) for line in _read(membership).splitlines()]
    own = next((path for _, names, path in lines if controller in names.split(",")), "/")
    return _upwards(root / controller, own)


def _upwards(root: Path, own: str) -> Iterator[Path]:
    group = root / own.strip("/")
    return (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
