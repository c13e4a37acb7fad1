"""What a cluster left behind: processes, its folder, control groups, mounts and network addresses."""

import time
from pathlib import Path

import psutil

from tests.cluster.keeper import CGROUPS


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those with the cluster's folder on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def cgroups_of(folder: Path) -> list[Path]:
    """Those that are called as the folder is."""
    return [*CGROUPS.glob(f"*/{folder.name}"), *CGROUPS.glob(folder.name)]


def addresses() -> set[str]:
    """Of this machine's network devices."""
    return {address.address for device in psutil.net_if_addrs().values() for address in device}


def wait_until_gone(folder: Path, seconds: float = 20) -> None:
    """Wait until nothing is left of the cluster in this folder.

    Raises:
        AssertionError: something is; it is named.
    """
    deadline = time.monotonic() + seconds
    while left := [
        *processes_of(folder),
        *cgroups_of(folder),
        *([folder] if folder.exists() else []),
        *(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line),
    ]:
        assert time.monotonic() < deadline, f"left: {left[:10]}"
        time.sleep(0.05)
