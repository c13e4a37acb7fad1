"""A queue of keys for workers, as client-go's workqueue is one.

A key waits at most once, however often it is added, and is with at most one worker at a time: what is added meanwhile comes again when
that worker is done. It holds keys only, so nobody can act on an old copy of an object. Unlike client-go's, a time that was set for a key is
void once the key is given out: the worker says anew when it wants it again.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram

from kubepeft_operator.runtime.backoff import delay

Key = TypeVar("Key", bound=Hashable)

FIRST_DELAY, LONGEST_DELAY = 0.05, 120.0  # seconds a failing key waits: 0.05, 0.1, 0.2 … 120
SECONDS = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

DEPTH = Gauge("workqueue_depth", "Keys waiting for a worker", ["name"])
ADDS = Counter("workqueue_adds_total", "Keys added", ["name"])
RETRIES = Counter("workqueue_retries_total", "Keys added again after a failure", ["name"])
WAITED = Histogram("workqueue_queue_duration_seconds", "How long keys waited for a worker", ["name"], buckets=SECONDS)
WORKED = Histogram("workqueue_work_duration_seconds", "How long workers had keys", ["name"], buckets=SECONDS)
UNFINISHED = Gauge(
    "workqueue_unfinished_work_seconds", "Seconds that workers now have had their keys, summed", ["name"]
)
LONGEST = Gauge("workqueue_longest_running_processor_seconds", "Seconds that one worker has had its key", ["name"])


class Queue(Generic[Key]):
    """Thread-safe. `name` labels the metrics."""

    def __init__(self, name: str, *, first_delay: float = FIRST_DELAY, longest_delay: float = LONGEST_DELAY) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Key] = deque()
        self._dirty: dict[Key, float] = {}  # to be worked on, and since when
        self._working: dict[Key, float] = {}  # with a worker, and since when
        self._later: list[tuple[float, int, Key]] = []  # a heap; entries that _due does not confirm are void
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._count = 0
        self._shut = False
        self._first_delay, self._longest_delay = first_delay, longest_delay
        DEPTH.labels(name).set_function(lambda: len(self._waiting))
        UNFINISHED.labels(name).set_function(lambda: sum(self.working()))
        LONGEST.labels(name).set_function(lambda: max(self.working(), default=0.0))
        self._adds, self._retries = ADDS.labels(name), RETRIES.labels(name)
        self._waited, self._worked = WAITED.labels(name), WORKED.labels(name)

    def add(self, key: Key) -> None:
        with self._changed:
            self._add(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Adds the key when so many seconds are over. Of several times for one key the earliest holds."""
        with self._changed:
            if seconds <= 0:
                self._add(key)
            elif not self._shut:
                due = time.monotonic() + seconds
                if due < self._due.get(key, float("inf")):
                    self._due[key] = due
                    self._count += 1
                    heapq.heappush(self._later, (due, self._count, key))
                    if len(self._later) > 2 * len(self._due) + 100:
                        self._later = [one for one in self._later if self._due.get(one[2]) == one[0]]
                        heapq.heapify(self._later)
                    self._changed.notify()

    def add_rate_limited(self, key: Key, *, at_least: float = 0) -> None:
        """Adds the key after a delay that doubles with each call until `forget`."""
        with self._changed:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
        self._retries.inc()
        wait = delay(failures, random.random(), base=self._first_delay, cap=self._longest_delay)
        self.add_after(key, max(wait, at_least))

    def forget(self, key: Key) -> None:
        """The key has succeeded: its delays begin small again."""
        with self._changed:
            self._failures.pop(key, None)

    def get(self, timeout: float | None = None) -> Key | None:
        """The next key, to be given back with `done`; None when the time is over or the queue is shut down."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._shut:
                now = time.monotonic()
                self._take_due(now)
                if self._waiting:
                    key = self._waiting.popleft()
                    self._waited.observe(now - self._dirty.pop(key))
                    self._working[key] = now
                    self._due.pop(key, None)
                    if self._waiting:
                        self._changed.notify()
                    return key
                if end is not None and now >= end:
                    return None
                wakes = [
                    moment - now for moment in (end, self._later[0][0] if self._later else None) if moment is not None
                ]
                self._changed.wait(min(wakes, default=None))
            return None

    def done(self, key: Key) -> None:
        with self._changed:
            self._worked.observe(time.monotonic() - self._working.pop(key))
            if key in self._dirty:
                self._waiting.append(key)
                self._changed.notify()

    def working(self) -> list[float]:
        """For each key that a worker has, since how many seconds."""
        with self._changed:
            now = time.monotonic()
            return [now - since for since in self._working.values()]

    def shut_down(self) -> None:
        """Nothing is given out or taken in any more."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._waiting)

    def _add(self, key: Key) -> None:
        if self._shut or key in self._dirty:
            return
        self._adds.inc()
        self._dirty[key] = time.monotonic()
        if key not in self._working:
            self._waiting.append(key)
            self._changed.notify()

    def _take_due(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self._add(key)
