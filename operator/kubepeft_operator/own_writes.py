"""What this process has written and its caches do not show yet.

A pass that decides from a cache without its own last write would do the same again. So an object is left alone until its caches have caught
up, or for a few seconds: correctness never depends on it, since names are deterministic and status writes carry a resourceVersion.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass

from kubepeft_operator.runtime.api import Object
from kubepeft_operator.runtime.cache import Cache

PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class _Write:
    cache: Cache
    namespace: str
    name: str
    version: int | None
    """The resourceVersion that was written; None for a deletion."""
    uid: str
    until: float

    def shown(self) -> bool:
        found = self.cache.get(self.namespace, self.name)
        if self.version is None:
            return found is None or found["metadata"]["uid"] != self.uid or "deletionTimestamp" in found["metadata"]
        return found is not None and int(found["metadata"]["resourceVersion"]) >= self.version


class OwnWrites:
    """Thread-safe; keys are those of the objects that the writes were for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writes: dict[Hashable, list[_Write]] = {}

    def wrote(self, key: Hashable, cache: Cache, written: Object) -> None:
        metadata = written["metadata"]
        version = int(metadata["resourceVersion"])
        self._add(key, cache, metadata.get("namespace", ""), metadata["name"], version, metadata["uid"])

    def deleted(self, key: Hashable, cache: Cache, namespace: str, name: str, uid: str) -> None:
        self._add(key, cache, namespace, name, None, uid)

    def seen_in(self, key: Hashable) -> float:
        """0 when the caches show every write of this key; else in how many seconds they are waited for no longer."""
        now = time.monotonic()
        with self._lock:
            waiting = [one for one in self._writes.get(key, ()) if one.until > now and not one.shown()]
            if waiting:
                self._writes[key] = waiting
                return max(one.until for one in waiting) - now
            self._writes.pop(key, None)
            return 0.0

    def _add(self, key: Hashable, cache: Cache, namespace: str, name: str, version: int | None, uid: str) -> None:
        write = _Write(cache, namespace, name, version, uid, time.monotonic() + PATIENCE_SECONDS)
        with self._lock:
            self._writes.setdefault(key, []).append(write)
