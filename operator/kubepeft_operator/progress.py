"""How far running pods are, from their metrics pages: read off the workers' threads, seldom, bounded, and never depended on.

What a pod answers is not trusted: a page is cut at a size and a time, and only known figures are taken from it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kubepeft import progress
from kubepeft.stage import METRICS_PORT
from kubepeft_operator.decision import Kind
from kubepeft_operator.observe import Pod

log = logging.getLogger(__name__)

PAGE_SECONDS = 3.0
"""Longest time for one page, all told."""
AT_ONCE = 8
"""Pages read at the same time, whatever the number of pods."""
PODS_OF_ONE = 8
"""Pods of one object that are looked at."""
SHOW_SECONDS = 60.0
"""Figures that move slowly are shown anew after so long."""

Key = tuple[Kind, str, str]
"""Kind, namespace and name."""
Figures = Mapping[str, Mapping[str, float]]
"""UID of a pod → its figures."""


def read_page(address: str, *, port: int = METRICS_PORT, seconds: float = PAGE_SECONDS) -> dict[str, float]:
    """The figures of one metrics page; none where it can't be read.

    HTTP/1.0 by hand: http.client sets limits for one read only, and a pod could drip bytes for ever.
    """
    end = time.monotonic() + seconds
    data = b""
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: pod\r\nAccept: text/plain\r\n\r\n")
            while len(data) < progress.PAGE_LIMIT and (left := end - time.monotonic()) > 0:
                connection.settimeout(left)
                if not (piece := connection.recv(1 << 16)):
                    break
                data += piece
    except OSError:
        return {}
    head, _, body = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        return {}
    return progress.parse(body.decode(errors="replace"))


def moved(before: Figures, now: Figures, seconds: float) -> bool:
    """Whether the figures are worth a write: another percent, another evaluation, or another moment of something slow."""
    if not now:
        return False
    return set(before) != set(now) or _mark(before) != _mark(now) or (seconds >= SHOW_SECONDS and dict(before) != now)


def _mark(figures: Figures) -> list[object]:
    pairs = (
        ("kubepeft_training_step", "kubepeft_training_total_steps"),
        ("kubepeft_prepare_bytes", "kubepeft_prepare_total_bytes"),
        ("kubepeft_inference_completed", "kubepeft_inference_rows"),
    )
    marks: list[object] = []
    for uid in sorted(figures):
        page = figures[uid]
        marks += [int(100 * page.get(done, 0) / whole) if (whole := page.get(total)) else 0 for done, total in pairs]
        marks.append(page.get("kubepeft_training_eval_loss"))
    return marks


@dataclass
class _Followed:
    pods: dict[str, str]
    """UID → address."""
    next_look: float
    shown: dict[str, dict[str, float]] = field(default_factory=dict)
    shown_at: float = 0.0
    looking: bool = False


class Progress:
    """Follows the running pods of objects. `changed` is called with an object's key when its figures are worth a write."""

    def __init__(self, changed: Callable[[Key], None], *, interval: float) -> None:
        self._changed, self._interval = changed, interval
        self._lock = threading.Lock()
        self._followed: dict[Key, _Followed] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="progress")
        self._busy = threading.Semaphore(AT_ONCE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def follow(self, key: Key, pods: Sequence[Pod]) -> None:
        """Look at these pods from now on, and at no others of the object; none ends it."""
        wished = {pod.uid: pod.ip for pod in pods[:PODS_OF_ONE] if pod.ip}
        with self._lock:
            known = self._followed.get(key)
            if not wished:
                self._followed.pop(key, None)
            elif known is None:
                self._followed[key] = _Followed(wished, time.monotonic() + self._interval)
            elif known.pods != wished:
                known.pods = wished
                known.shown = {uid: page for uid, page in known.shown.items() if uid in wished}

    def figures(self, key: Key) -> Figures:
        with self._lock:
            known = self._followed.get(key)
            return dict(known.shown) if known else {}

    def _run(self) -> None:
        while not self._stopping.wait(min(1.0, self._interval / 4)):
            now = time.monotonic()
            with self._lock:
                due = sorted(
                    (one.next_look, key)
                    for key, one in self._followed.items()
                    if one.next_look <= now and not one.looking
                )
            for _, key in due:
                self._busy.acquire()
                if self._stopping.is_set():
                    return
                self._pool.submit(self._look, key)

    def _look(self, key: Key) -> None:
        try:
            with self._lock:
                known = self._followed.get(key)
                if known is None:
                    return
                pods, known.looking = dict(known.pods), True
            pages = {uid: page for uid, address in pods.items() if (page := read_page(address))}
            now = time.monotonic()
            with self._lock:
                known.looking, known.next_look = False, now + self._interval
                worth = moved(known.shown, pages, now - known.shown_at) and known.pods == pods
                if worth:
                    known.shown, known.shown_at = pages, now
            if worth:
                self._changed(key)
        except Exception:
            log.exception("a defect in reading the progress of %s", "/".join(key))
        finally:
            self._busy.release()
