"""Kubernetes Events for people. They are sent from a thread of their own: an event never holds a reconcile up and never fails it.

The same event again within a window becomes a count on the first one, written seldom, as client-go's events do it.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from prometheus_client import Counter

from kubepeft_operator.runtime.api import EVENTS, AlreadyExists, Api, ApiError, NotFound, NotLeading, Object
from kubepeft_operator.runtime.backoff import delay

log = logging.getLogger(__name__)

WINDOW = 600.0  # seconds without a repetition, after which the same event is a new one
SPACING = 60.0  # seconds between two writes of a count
TRIES = 5
MOST_WAITING = 10_000
MOST_KNOWN = 4096  # as client-go remembers
MOST_BYTES = 1024  # of a note

DROPPED = Counter("events_dropped_total", "Events that could not be sent", ["why"])

Same = tuple[str, ...]
"""What makes two events one: the object's uid, type, reason, note, action."""


@dataclass(frozen=True)
class Told:
    """An event that was sent: the name of its object, how often it has happened, and how much of that is written. Times in seconds."""

    name: str
    count: int
    last: float
    written: int
    written_at: float


def again(told: Told | None, name: str, now: float) -> tuple[Told, Literal["create", "patch", "wait"]]:
    """What to do about an event at `now`, where `told` is what is known of the same one, and `name` a new object's name."""
    if told is None or now - told.last > WINDOW:
        return Told(name, 1, now, 1, now), "create"
    told = replace(told, count=told.count + 1, last=max(told.last, now))
    if now - told.written_at < SPACING:
        return told, "wait"
    return replace(told, written=told.count, written_at=now), "patch"


def overdue(told: Told, now: float) -> bool:
    """A count has waited long enough to be written."""
    return told.count > told.written and now - told.written_at >= SPACING


class Events:
    """Sends events as `controller`, such as kubepeft.io/operator, from `instance`, such as the pod's name."""

    def __init__(self, api: Api, controller: str, instance: str, *, clock: Callable[[], float] = time.time) -> None:
        self._api, self._controller, self._instance = api, controller, instance
        self._clock = clock
        self._waiting: queue.Queue[Object | None] = queue.Queue(MOST_WAITING)
        self._told: dict[Same, tuple[Told, str]] = {}
        self._looked_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def emit(
        self,
        regarding: Object,
        type: Literal["Normal", "Warning"],
        reason: str,
        message: str,
        now: datetime,
        *,
        action: str = "Reconcile",
    ) -> None:
        """Says that `reason`, one CamelCase word, happened to `regarding`: a whole object, or its apiVersion, kind and metadata."""
        metadata = regarding["metadata"]
        namespace = metadata.get("namespace", "")
        reference = {
            "apiVersion": regarding["apiVersion"],
            "kind": regarding["kind"],
            "name": metadata["name"],
            "namespace": namespace,
            "uid": metadata.get("uid", ""),
        }
        event = {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"namespace": namespace or "default"},
            "eventTime": _micro_time(now.timestamp()),
            "reportingController": self._controller,
            "reportingInstance": self._instance[:128],
            "action": action,
            "reason": reason,
            "type": type,
            "note": _shortened(message),
            "regarding": {key: value for key, value in reference.items() if value},
        }
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            DROPPED.labels("queue_full").inc()

    def stop(self, timeout: float = 2) -> None:
        """Sends what is waiting, for at most so long."""
        self._waiting.put(None)
        self._thread.join(timeout)
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                event = self._waiting.get(timeout=SPACING / 2)
                if event is None:
                    return
                self._tell(event)
            except queue.Empty:
                pass
            except Exception:
                log.exception("a defect in sending an event")
            if self._clock() - self._looked_at > SPACING / 2:
                self._look_back()

    def _tell(self, event: Object) -> None:
        regarding, namespace = event["regarding"], event["metadata"]["namespace"]
        same = (regarding.get("uid", ""), event["type"], event["reason"], event["note"], event["action"])
        at = datetime.fromisoformat(event["eventTime"]).timestamp()
        known = self._told.pop(same, None)
        told, what = again(known[0] if known else None, f"{regarding['name'][:230]}.{secrets.token_hex(8)}", at)
        self._told[same] = told, namespace  # at the end: the oldest is at the front
        if len(self._told) > MOST_KNOWN:
            del self._told[next(iter(self._told))]
        if what == "create" or (what == "patch" and not self._count(told, namespace)):
            event["metadata"]["name"] = told.name
            self._send(lambda: self._api.create(EVENTS, namespace, event))

    def _look_back(self) -> None:
        """Writes the counts that nothing else will write, and forgets what is over."""
        self._looked_at = now = self._clock()
        for same, (told, namespace) in list(self._told.items()):
            if overdue(told, now):
                self._count(told, namespace)
                told = replace(told, written=told.count, written_at=now)
                self._told[same] = told, namespace
            if now - told.last > WINDOW:
                del self._told[same]

    def _count(self, told: Told, namespace: str) -> bool:
        """Writes how often an event has happened; False where the API server has forgotten it (it does after an hour)."""
        series = {"series": {"count": told.count, "lastObservedTime": _micro_time(told.last)}}
        return self._send(lambda: self._api.patch(EVENTS, namespace, told.name, series))

    def _send(self, call: Callable[[], object]) -> bool:
        for failures in range(1, TRIES + 1):
            try:
                call()
                return True
            except NotFound:
                return False
            except AlreadyExists:  # a try whose answer was lost
                return True
            except NotLeading:
                DROPPED.labels("not_leading").inc()
                return True
            except ApiError as error:
                passing = error.status in (0, 429) or error.status >= 500
                if not passing or failures == TRIES or self._stopping.is_set():
                    DROPPED.labels(error.reason).inc()
                    log.info("an event was not sent: %s", error)
                    return True
                wait = delay(failures, random.random(), base=0.5, cap=10)
                self._stopping.wait(max(wait, error.retry_after or 0.0))
        return True


def _shortened(note: str) -> str:
    """At most as many bytes as the API server takes."""
    data = note.encode()
    return note if len(data) <= MOST_BYTES else data[: MOST_BYTES - 3].decode(errors="ignore") + "…"


def _micro_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
