"""The operator's metrics of FineTunes, beside those of its runtime. No label ever holds an object's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kubepeft.types.status import Phase
from kubepeft_operator.decision import Ended
from kubepeft_operator.job import Object, StageName
from kubepeft_operator.runtime.cache import Cache

PHASES = get_args(Phase)
MOST_REASONS = 100
"""Reasons come from the pods' own messages too: past so many different ones the rest are counted together."""
LONG = (1, 5, 15, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)

ATTEMPTS = Counter("kubepeft_attempts", "Pods of a stage that ended", ["stage", "outcome", "reason"])
OUTCOMES = Counter("kubepeft_outcomes", "Objects that came to their end", ["kind", "outcome", "reason"])
RAN = Histogram("kubepeft_stage_duration_seconds", "How long pods of a stage ran", ["stage", "outcome"], buckets=LONG)
WAITED = Histogram("kubepeft_stage_queue_seconds", "How long pods of a stage waited to start", ["stage"], buckets=LONG)
GPU_SECONDS = Counter("kubepeft_gpu_seconds", "GPU seconds of pods that ended", ["stage"])
LIVED = Histogram("kubepeft_run_duration_seconds", "From start to end of an object", ["kind", "outcome"], buckets=LONG)

for _reason in ("OOMKilled", "Evicted", "Disrupted", "Killed", "StartFailed", "ExitCode", "PodLost"):
    # Foreseen, so they begin at 0: Prometheus sees no increase in a counter that is born at 1.
    for _stage in get_args(StageName):
        ATTEMPTS.labels(_stage, "Failed", _reason)
    for _kind in ("FineTune", "BatchInference"):
        OUTCOMES.labels(_kind, "Failed", _reason)
        OUTCOMES.labels(_kind, "Succeeded", "Succeeded")

PHASE_INDEX, STALLED_INDEX = "phase", "stalled"

_reasons: set[str] = set()


def bounded(reason: str) -> str:
    """The reason as a label's value."""
    if reason in _reasons or len(_reasons) < MOST_REASONS:
        _reasons.add(reason)
        return reason
    return "Other"


def observe(ended: Ended) -> None:
    ATTEMPTS.labels(ended.stage, ended.outcome, bounded(ended.reason)).inc()
    if ended.waited is not None:
        WAITED.labels(ended.stage).observe(ended.waited)
    if ended.ran is not None:
        RAN.labels(ended.stage, ended.outcome).observe(max(0.0, ended.ran))
        GPU_SECONDS.labels(ended.stage).inc(max(0.0, ended.ran * ended.gpus))


def observe_end(kind: str, outcome: str, reason: str, lived: float | None) -> None:
    OUTCOMES.labels(kind, outcome, bounded(reason)).inc()
    if lived is not None:
        LIVED.labels(kind, outcome).observe(max(0.0, lived))


def phase_of(obj: Object) -> list[str]:
    """An index of the cache."""
    return [(obj.get("status") or {}).get("phase") or "Pending"]


def stalled_of(obj: Object) -> list[str]:
    """An index of the cache: the reason of a Stalled condition."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return [one["reason"] for one in conditions if one["type"] == "Stalled" and one["status"] == "True"]


class Fleet(Collector):
    """How many objects are in which phase, and how many are stalled for which reason; counted when asked."""

    def __init__(self, fine_tunes: Cache, batch_inferences: Cache) -> None:
        self._caches = {"finetunes": fine_tunes, "batchinferences": batch_inferences}
        for cache in self._caches.values():
            cache.add_index(PHASE_INDEX, phase_of)
            cache.add_index(STALLED_INDEX, stalled_of)

    def collect(self) -> Iterator[Metric]:
        for plural, cache in self._caches.items():
            family = GaugeMetricFamily(f"kubepeft_{plural}", f"{plural} by phase", labels=["phase"])
            sizes = cache.index_sizes(PHASE_INDEX)
            for phase in PHASES:
                family.add_metric([phase], sizes.get(phase, 0))
            yield family
        stalled = GaugeMetricFamily(
            "kubepeft_stalled", "Objects that wait for longer than stuckAfterSeconds", labels=["kind", "reason"]
        )
        for plural, cache in self._caches.items():
            for reason, size in cache.index_sizes(STALLED_INDEX).items():
                stalled.add_metric([plural, reason], size)
        yield stalled
