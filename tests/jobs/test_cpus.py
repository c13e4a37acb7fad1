"""How many CPUs a stage takes itself to have: what its control group gives it, not what the machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kubepeft_jobs.cpus import available

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, HERE),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/pod/container\n", {"pod/cpu.max": "100000 100000\n", "pod/container/cpu.max": "max 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "99900000 100000\n"}, HERE),
        (
            "3:cpu,cpuacct:/pod\n0::/\n",
            {"cpu/pod/cpu.cfs_quota_us": "100000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, HERE),
        ("", {}, HERE),
    ],
)
def test_quotas_count_in_either_versions_files(own: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert available(tmp_path, tmp_path / "own") == expected


@pytest.mark.skipif(HERE == 1, reason="one CPU can't be told from less")
def test_affinity_counts() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from kubepeft_jobs import cpus; print(cpus.available())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
