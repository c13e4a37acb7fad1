"""Keeps a cache equal to what the API server holds: a paged list, then a watch from there, for ever.

A watch that is cut, silently or not, goes on where it was; one that is too old begins with a list again. While the server can't be
reached the cache stays as it is, and the tries become seldom.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable

from kubepeft_operator.runtime.api import Api, ApiError, Gone, Object, Resource, Watch
from kubepeft_operator.runtime.backoff import delay
from kubepeft_operator.runtime.cache import Cache, Name, name_of

log = logging.getLogger(__name__)

LONG = 1.0  # seconds; a watch that lasted longer, or brought anything, was a success

Handler = Callable[[Object | None, Object | None], None]
"""Called with the object as it was in the cache and as it is now, None where there is none; it must be quick, such as adding a key."""


class Informer:
    """Fills `cache` with the objects of one resource, in one namespace or in all.

    trim: makes the smaller object that is kept, and that handlers see, of a whole one; metadata.name and namespace must stay. A change
        of what it leaves out calls no handler.
    watch_seconds: after at most so long the server ends a watch, and it is opened again: a sign of life where nothing happens.
    read_timeout: seconds without a byte after which a watch counts as cut; more than watch_seconds.
    last_contact, last_event_at: time.monotonic() of the last sign of the server and of the last change of an object; None before.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        cache: Cache,
        *,
        namespace: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        trim: Callable[[Object], Object] = lambda obj: obj,
        page: int = 250,
        read_timeout: float = 90,
        watch_seconds: int = 75,
        first_delay: float = 0.25,
        longest_delay: float = 15,
    ) -> None:
        self.resource, self.cache, self.namespace = resource, cache, namespace
        self.last_contact: float | None = None
        self.last_event_at: float | None = None
        self._api, self._trim, self._page = api, trim, page
        self._selectors = {"label_selector": label_selector, "field_selector": field_selector}
        self._read_timeout, self._watch_seconds = read_timeout, watch_seconds
        self._first_delay, self._longest_delay = first_delay, longest_delay
        self._handlers: list[Handler] = []
        self._synced, self._stopped = threading.Event(), threading.Event()
        self._watch: Watch | None = None
        self._version: str | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=f"informer-{resource.plural}", daemon=True)
        self._started = time.monotonic()

    def add_handler(self, handler: Handler) -> None:
        """To be called before `start`."""
        self._handlers.append(handler)

    def start(self) -> None:
        self._started = time.monotonic()
        self._thread.start()

    @property
    def synced(self) -> bool:
        """The first list is in the cache, and its handlers have been called."""
        return self._synced.is_set()

    def wait_synced(self, timeout: float | None = None) -> bool:
        return self._synced.wait(timeout)

    def stop(self) -> None:
        self._stopped.set()
        if watch := self._watch:
            watch.close()
        self._thread.join(2)

    def problem(self, silent_for: float = 120) -> str | None:
        """What is wrong, for a health check: no sign of the API server for so many seconds."""
        silence = time.monotonic() - (self.last_contact or self._started)
        return (
            f"{self.resource.plural}: no sign of the API server for {silence:.0f} s" if silence > silent_for else None
        )

    def _run(self) -> None:
        while not self._stopped.is_set():
            wait = 0.0
            try:
                if self._version is None:
                    self._version = self._list()
                self._follow()
            except Gone as error:
                log.info("%s: lists again: %s", self.resource.plural, error)
                self._version = None
            except ApiError as error:
                if not self._stopped.is_set():
                    log.warning("%s: tries again: %s", self.resource.plural, error)
                wait = error.retry_after or 0.0
            except Exception:
                log.exception("%s: a defect; lists again", self.resource.plural)
                self._version = None
            # Also after a watch that ended well: whatever a server does, it is not asked in a hot loop.
            self._failures += 1
            pause = delay(self._failures, random.random(), base=self._first_delay, cap=self._longest_delay)
            self._stopped.wait(max(wait, pause))

    def _list(self) -> str:
        """Makes the cache equal to the list page by page, so that never more than a page is held whole."""
        seen: set[Name] = set()
        version = ""
        for page in self._api.list_pages(self.resource, self.namespace, limit=self._page, **self._selectors):
            self.last_contact = time.monotonic()
            for item in page["items"]:
                seen.add(name_of(item))
                self._put(item)
            version = page["metadata"]["resourceVersion"]
        for name in self.cache.names(self.namespace):
            if name not in seen:
                self._remove(name)
        self._synced.set()
        return version

    def _follow(self) -> None:
        assert self._version is not None
        seconds = math.ceil(self._watch_seconds * (0.8 + 0.2 * random.random()))  # spread: not all end at one moment
        opened = time.monotonic()
        with self._api.watch(
            self.resource,
            self.namespace,
            resource_version=self._version,
            timeout_seconds=seconds,
            read_timeout=self._read_timeout,
            **self._selectors,
        ) as watch:
            self._watch = watch
            self.last_contact = opened = time.monotonic()
            try:
                if self._stopped.is_set():
                    return
                for event in watch:
                    self._failures = 0
                    self.last_contact = time.monotonic()
                    obj = event["object"]
                    if event["type"] in ("ADDED", "MODIFIED"):
                        self._put(obj)
                    elif event["type"] == "DELETED":
                        self._remove(name_of(obj))
                    self._version = obj["metadata"]["resourceVersion"]
            finally:
                self._watch = None
                if time.monotonic() - opened > LONG:
                    self._failures = 0

    def _put(self, obj: Object) -> None:
        new = self._trim(obj)
        old = self.cache.put(new)
        if old != new:
            self._tell(old, new)

    def _remove(self, name: Name) -> None:
        if old := self.cache.remove(name):
            self._tell(old, None)

    def _tell(self, old: Object | None, new: Object | None) -> None:
        self.last_event_at = time.monotonic()
        for handler in self._handlers:
            handler(old, new)
