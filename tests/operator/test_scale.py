"""A small run of bench/scale.py: its counts hold on any machine, its times are for docs/benchmarks.md."""

import re
import subprocess
import sys

from tests.cluster.simulated import SimulatedNodes
from tests.servers import REPOSITORY

OBJECTS = 60


def test_many_objects_succeed_with_few_writes_and_then_none(simulate: type[SimulatedNodes]) -> None:
    simulate().close()  # skips where the programs can't be built
    command = [sys.executable, REPOSITORY / "bench/scale.py", "--objects", str(OBJECTS), "--idle", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"── operator: {OBJECTS} FineTunes in" in done.stdout
    assert f"── bare: {OBJECTS} objects in" in done.stdout
    # 12 where pods start within 5 s; a machine that is too busy for that has waits to tell of.
    assert float(found(r"writes per FineTune: ([\d.]+)", done.stdout)) < 20, done.stdout
    assert int(found(r"writes in 20 s with nothing to do: (\d+)", done.stdout)) == 0, done.stdout
    assert float(found(r"memory of the operator: \d+ MB, at most (\d+) MB", done.stdout)) < 200


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]
