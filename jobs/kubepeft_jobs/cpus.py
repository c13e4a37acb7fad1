"""How many CPUs this process may use. A pod with a limit sees all of its node's cores, and torch and a pool of workers
would start a thread or a process for each."""

from __future__ import annotations

import os
from pathlib import Path


def available(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Whole CPUs within the affinity and the quotas of the control groups around this process; at least 1."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(root, own)])))


def _quotas(root: Path, own: Path) -> list[float]:
    """CPUs by quota of this process's group and of each above it, in either version's files.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files and
    https://docs.kernel.org/scheduler/sched-bwc.html
    """
    found = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            groups = root
        elif "cpu" in controllers.split(","):
            groups = root / "cpu"
        else:
            continue
        group = groups / path.strip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(groups):
                break
            if controllers == "":
                quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
            else:
                quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
            if quota.isdecimal() and period.isdecimal():
                found.append(int(quota) / int(period))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
