"""What the container that this process runs in may use, and whether the kernel ended some of it: by cgroup, version 1 or 2."""

import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES: Final = 2**60
"""What version 1 says of memory where there is no limit is larger."""


def cpus(root: Path = _ROOT, groups: str | None = None) -> int:
    """Whole CPUs that may be used, one at least."""
    here = len(os.sched_getaffinity(0))
    quota = _first(_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us", groups))
    if quota is None:
        return here
    parts = quota.split()
    try:
        if len(parts) == 2:
            allowed = int(parts[0]) / int(parts[1])
        else:
            period = _first(_files(root, "cpu", "cpu.max", "cpu.cfs_period_us", groups)) or "0"
            allowed = int(parts[0]) / int(period)
    except (ValueError, ZeroDivisionError):
        return here  # "max": no limit
    return max(1, min(here, round(allowed))) if allowed > 0 else here


def memory_bytes(root: Path = _ROOT, groups: str | None = None) -> int:
    """Memory that may be used."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first(_files(root, "memory", "memory.max", "memory.limit_in_bytes", groups))
    if limit is None or not limit.strip().isdigit() or int(limit) >= _UNLIMITED_BYTES:
        return whole
    return min(whole, int(limit))


def ooms(root: Path = _ROOT, groups: str | None = None) -> int | None:
    """How often the kernel ended a process of this container for want of memory; None where that cannot be read."""
    said = _first(_files(root, "memory", "memory.events", "memory.oom_control", groups))
    for line in (said or "").splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.strip().isdigit():
            return int(count)
    return None


def has_seccomp() -> bool:
    """Whether a filter of system calls is on this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Seccomp:"):
            return line.split()[1] != "0"
    return False


def _files(root: Path, controller: str, newer: str, older: str, groups: str | None) -> list[Path]:
    """Where the answer may lie. A container sees its own group at the root or, without a namespace of groups, below it."""
    found: list[Path] = []
    for line in (_groups() if groups is None else groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [root / path.lstrip("/") / newer, root / newer]
        elif controller in controllers.split(","):
            for folder in (root / controllers, root / controller):
                found += [folder / path.lstrip("/") / older, folder / older]
    return found


def _groups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def _first(files: list[Path]) -> str | None:
    for file in files:
        try:
            return file.read_text()
        except OSError:
            continue
    return None
