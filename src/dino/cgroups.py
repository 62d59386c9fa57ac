"""The limits of Linux control groups (v1 and v2): of containers, SLURM jobs and systemd units.

A limit holds for all groups below, so that of each group from the process's own up to the root
counts. Inside a container the names of the outer groups do not exist, and its root has the limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Bytes that the groups may still take; None without a limit."""
    left = []
    for folder in _folders("memory"):
        with suppress(OSError, ValueError):  # not this version; v2 without a limit says "max"
            left.append(int(_text(folder, "memory.max")) - _used(folder, "memory.current", ""))
        with suppress(OSError, ValueError):
            used = _used(folder, "memory.usage_in_bytes", "total_")
            left.append(int(_text(folder, "memory.limit_in_bytes")) - used)
    return min(left, default=None)


def cpu_quota() -> int | None:
    """Cores whose time the groups may take; None without a limit."""
    shares = []
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError):  # not this version; v2 without a limit says "max"
            quota, period = map(int, _text(folder, "cpu.max").split())
            shares.append(quota / period)
        with suppress(OSError, ValueError):
            if (quota := int(_text(folder, "cpu.cfs_quota_us"))) > 0:  # -1 is no limit
                shares.append(quota / int(_text(folder, "cpu.cfs_period_us")))
    return max(1, math.ceil(min(shares))) if shares else None


def _folders(controller: str) -> Iterator[Path]:
    """The group of this process and those above it, in both versions' places."""
    groups = {"": Path("/"), controller: Path("/")}
    with suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, names, path = line.split(":", 2)
            groups |= {name: Path(path) for name in names.split(",") if name in groups}
    for name, group in groups.items():
        for folder in (group, *group.parents):
            yield ROOT / name / folder.relative_to("/")


def _text(folder: Path, name: str) -> str:
    return (folder / name).read_text()


def _used(folder: Path, name: str, prefix: str) -> int:
    """Bytes that a group holds and cannot give back."""
    used = int(_text(folder, name))
    for line in _text(folder, "memory.stat").splitlines():
        if line.startswith(f"{prefix}inactive_file "):
            used -= int(line.split()[1])
    return used
