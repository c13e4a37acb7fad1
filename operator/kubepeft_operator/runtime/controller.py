"""Workers that take keys from a queue and bring what they name to where it should be, again and again until it is there."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Generic

from prometheus_client import Counter, Gauge, Histogram

from kubepeft_operator.runtime.api import ApiError, Conflict, NotLeading
from kubepeft_operator.runtime.queue import Key, Queue

log = logging.getLogger(__name__)

RECONCILES = Counter("controller_runtime_reconcile_total", "Reconciles by result", ["controller", "result"])
ERRORS = Counter("controller_runtime_reconcile_errors_total", "Reconciles that failed", ["controller"])
TIME = Histogram(
    "controller_runtime_reconcile_time_seconds",
    "Time of reconciles",
    ["controller"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
WORKERS = Gauge("controller_runtime_max_concurrent_reconciles", "Workers", ["controller"])
ACTIVE = Gauge("controller_runtime_active_workers", "Workers that have a key now", ["controller"])


class Controller(Generic[Key]):
    """Runs `reconcile(key)` on `workers` threads.

    reconcile: returns after how many seconds it wants the key again, or None. When it raises, the key comes again after a delay that
    doubles with each failure. Any exception is survived: a defect in one object's handling stops no other object.
    """

    def __init__(self, name: str, reconcile: Callable[[Key], float | None], workers: int, queue: Queue[Key]) -> None:
        self.name = name
        self.queue = queue
        self._reconcile = reconcile
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(workers)
        ]
        WORKERS.labels(name).set(workers)
        ERRORS.labels(name)  # there from the start, so that a rate over it has a first value
        ACTIVE.labels(name).set_function(lambda: len(queue.working()))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 10) -> bool:
        """Takes no more keys and waits for those in hand; says whether they all ended in time."""
        self.queue.shut_down()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def problem(self, stuck_after: float = 120) -> str | None:
        """What is wrong with the workers, for a health check: one that has had its key for too long, or has died."""
        longest = max(self.queue.working(), default=0.0)
        if longest > stuck_after:
            return f"{self.name}: a worker has been at one object for {longest:.0f} s"
        dead = [thread.name for thread in self._threads if thread.ident is not None and not thread.is_alive()]
        return f"{self.name}: {', '.join(dead)} ended" if dead else None

    def _work(self) -> None:
        while (key := self.queue.get()) is not None:
            started = time.monotonic()
            try:
                result = self._once(key)
            finally:
                self.queue.done(key)
            TIME.labels(self.name).observe(time.monotonic() - started)
            RECONCILES.labels(self.name, result).inc()

    def _once(self, key: Key) -> str:
        try:
            again = self._reconcile(key)
        except (Conflict, NotLeading) as error:
            log.debug("%s %s: comes again: %s", self.name, key, error)
            self.queue.add_rate_limited(key)
            return "requeue"
        except ApiError as error:
            log.warning("%s %s: comes again: %s", self.name, key, error)
            wait = error.retry_after or 0.0  # spread, else all who were refused would come back at one moment
            self.queue.add_rate_limited(key, at_least=wait * (1 + 0.5 * random.random()))
        except Exception:
            log.exception("%s %s: a defect; comes again", self.name, key)
            self.queue.add_rate_limited(key)
        else:
            self.queue.forget(key)
            if again is None:
                return "success"
            self.queue.add_after(key, again)
            return "requeue_after"
        ERRORS.labels(self.name).inc()
        return "error"
