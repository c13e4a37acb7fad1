"""Metrics pages of the real code, with figures that move: an operator's, and those of pods that prepare, train and infer.

`python -m tests.chart.pages PORT…` serves the operator at the first port and a pod at each further one, until it is killed.
"""

import math
import sys
import time

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import REGISTRY

from kubepeft.progress import FIGURES
from kubepeft_jobs.progress import Page
from kubepeft_operator import metrics
from kubepeft_operator.decision import Ended
from kubepeft_operator.runtime import api, controller, events, leader, queue
from kubepeft_operator.runtime.cache import Cache

STAGES = ("prepare", "train", "infer")
COUNTING = (api, controller, events, leader, metrics, queue)
"""The modules that count something of an operator's."""


def fleet() -> metrics.Fleet:
    """Counts of a few objects in caches of the operator's own."""
    caches = (Cache(), Cache())
    made = metrics.Fleet(*caches)
    for number, phase in enumerate(("Pending", "Training", "Training", "Inferring", "Succeeded", "Failed")):
        status = {"phase": phase}
        if phase == "Pending":
            status |= {"conditions": [{"type": "Stalled", "status": "True", "reason": "Unschedulable"}]}
        for cache in caches:
            cache.put(
                {
                    "metadata": {
                        "namespace": "team",
                        "name": f"x{number}",
                        "uid": f"u{number}",
                        "resourceVersion": "1",
                    },
                    "status": status,
                }
            )
    return made


def operate() -> None:
    """What an operator counts in a busy second."""
    leader.LEADING.labels("kubepeft-operator").set(1)
    for name in ("finetune", "batchinference"):
        queue.DEPTH.labels(name).set(3)
        queue.WAITED.labels(name).observe(0.01)
        controller.RECONCILES.labels(name, "success").inc(5)
        controller.ERRORS.labels(name).inc(0.1)
        controller.TIME.labels(name).observe(0.02)
        controller.ACTIVE.labels(name).set(1)
    for verb, resource, code in (
        ("update", "finetunes/status", "200"),
        ("create", "jobs", "201"),
        ("list", "pods", "503"),
    ):
        api.REQUESTS.labels("GET", verb, resource, code).inc(2)
        api.DURATION.labels(verb).observe(0.03)
    for stage in STAGES:
        metrics.observe(Ended(stage, "Succeeded", "", 2.0, 60.0, int(stage != "prepare")))
        metrics.observe(Ended(stage, "Failed", "OOMKilled", 2.0, 30.0, 1))
    metrics.observe_end("FineTune", "Succeeded", "Succeeded", 300.0)
    metrics.observe_end("BatchInference", "Failed", "BadRow", 20.0)


def run(page: Page, second: int) -> None:
    """A pod's figures: all that its stage can show."""
    prefix = {"prepare": "prepare", "train": "training", "infer": "inference"}[page.stage]
    moving = {name: second + 1.0 for name in FIGURES if name.startswith(f"kubepeft_{prefix}_") or "memory" in name}
    if page.stage == "train":
        moving |= {"kubepeft_training_total_steps": 200.0, "kubepeft_training_loss": 3 * math.exp(-second / 20) + 0.4}
    if page.stage == "infer":
        moving |= {"kubepeft_inference_rows": 100.0, "kubepeft_inference_failed": 2.0}
    page.take(moving)


if __name__ == "__main__":
    ports = [int(port) for port in sys.argv[1:]]
    REGISTRY.register(fleet())
    start_http_server(ports[0], "127.0.0.1")
    pods = [Page(stage) for stage in STAGES]
    for port, pod in zip(ports[1:], pods, strict=True):
        registry = CollectorRegistry()
        registry.register(pod)
        start_http_server(port, "127.0.0.1", registry)
    for second in range(600):
        operate()
        for pod in pods:
            run(pod, second)
        time.sleep(1)
