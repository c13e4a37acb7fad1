"""How a worker tells the supervisor how far it is, and how the supervisor shows it on the metrics page.

A worker writes one JSON object a line to the pipe that KUBEPEFT_PROGRESS names: `{"figures": {...}}` or `{"result": {...}}`.
No torch here.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kubepeft.progress import FIGURES, STAGE_METRIC

ENV_PROGRESS = "KUBEPEFT_PROGRESS"

_lock = threading.Lock()


def report(**figures: float) -> None:
    """Show figures of kubepeft.progress.FIGURES, named without their "kubepeft_"; only worker 0 is heard."""
    _send({"figures": {f"kubepeft_{name}": value for name, value in figures.items()}})


def send_result(result: dict[str, Any]) -> None:
    """Hand the stage's outcome to the supervisor: the fields of kubepeft.stage.Result that this worker knows."""
    _send({"result": result})


def _send(message: dict[str, Any]) -> None:
    pipe = os.environ.get(ENV_PROGRESS)
    if pipe is None:
        return
    line = json.dumps(message).encode() + b"\n"
    with _lock:
        while line:
            line = line[os.write(int(pipe), line) :]


class Page(Collector):
    """The metrics page: the latest figures, and which stage runs."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.figures: dict[str, float] = {}

    def take(self, figures: dict[str, float]) -> None:
        self.figures.update({name: float(value) for name, value in figures.items() if name in FIGURES})

    def collect(self) -> Iterator[Metric]:
        stage = GaugeMetricFamily(STAGE_METRIC, "The stage that runs here", labels=["stage"])
        stage.add_metric([self.stage], 1)
        yield stage
        for name, value in list(self.figures.items()):
            kind, text = FIGURES[name]
            yield (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, value=value)
