"""The files that follow from code, and whether they are stale: python -m tests.generated [--write]."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from charts import dashboards
from kubepeft import crd

ROOT = Path(__file__).parent.parent

GENERATED: dict[str, Callable[[], str]] = {
    "charts/kubepeft/files/crds.yaml": crd.to_yaml,
    "docs/reference.md": crd.reference,
    **{
        f"charts/kubepeft/dashboards/{one.name}.json": functools.partial(dashboards.to_json, one)
        for one in dashboards.DASHBOARDS
    },
}
"""Path in the repository → what it must hold."""


def stale() -> list[str]:
    """The generated files that don't hold what the code says."""
    return [
        name
        for name, make in GENERATED.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != make()
    ]


if __name__ == "__main__":
    for name in stale():
        if "--write" in sys.argv:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(GENERATED[name](), encoding="utf-8")
        print(f"{'written' if '--write' in sys.argv else 'stale'}: {name}")
    sys.exit(bool(stale()))
