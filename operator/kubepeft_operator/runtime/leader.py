"""Leader election by a coordination.k8s.io/v1 Lease, as client-go does it, with one thing more: `may_act`, which every write asks first.

Clocks of other machines decide nothing. A lease is judged by how long, on this process's own monotonic clock, it has not changed; that
clock runs on while a process is stopped, so a leader that wakes up knows that its time is over before it writes.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Gauge

from kubepeft_operator.runtime.api import LEASES, AlreadyExists, Api, ApiError, Conflict, NotFound, Object

log = logging.getLogger(__name__)

LEADING = Gauge("leader_election_master_status", "1 where this process leads", ["name"])


@dataclass(frozen=True)
class Seen:
    """A lease, and since when, by this process's own clock, it has been as it is."""

    lease: Object
    since: float

    @property
    def holder(self) -> str:
        return self.lease["spec"].get("holderIdentity") or ""


def see(before: Seen | None, lease: Object, now: float) -> Seen:
    """What is known after reading `lease` at `now`. Only a change of its spec counts as a sign of life."""
    unchanged = before is not None and before.lease["spec"] == lease["spec"]
    return Seen(lease, before.since if before and unchanged else now)


def free_in(seen: Seen, now: float) -> float:
    """In how many seconds the lease may be taken, by what its holder promised; 0 for at once."""
    if not seen.holder:
        return 0.0
    return max(0.0, seen.since + seen.lease["spec"].get("leaseDurationSeconds", 0) - now)


def claimed(lease: Object | None, identity: str, lease_duration: float, wall: datetime) -> Object:
    """The spec with which `identity` takes or renews a lease."""
    now = wall.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = dict(lease["spec"]) if lease else {}
    if spec.get("holderIdentity") != identity:
        spec["acquireTime"] = now
        spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1 if lease else 0
    return {**spec, "holderIdentity": identity, "leaseDurationSeconds": math.ceil(lease_duration), "renewTime": now}


def released(lease: Object, wall: datetime) -> Object:
    """The spec of a lease that anybody may take at once."""
    return {**claimed(lease, lease["spec"]["holderIdentity"], 1, wall), "holderIdentity": ""}


class Elector:
    """Takes and keeps the Lease `namespace`/`name`. It adds a random part to `identity`, so that no two processes are ever one.

    api: one of its own without a guard, so that renewals wait for no other call, with a timeout well below `renew_deadline`.
    lease_duration: seconds without a change after which others may take the lease.
    renew_deadline: seconds after its last renewal at which a leader gives up; below lease_duration.
    retry_period: seconds between tries.
    on_lost: called once, on the elector's thread, when a lease that was held is lost: the process must end, and not with 0.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        *,
        on_lost: Callable[[], None],
        lease_duration: float = 15,
        renew_deadline: float = 10,
        retry_period: float = 2,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if not lease_duration > renew_deadline > retry_period:
            raise ValueError(
                f"leader election needs lease_duration ({lease_duration}) > renew_deadline ({renew_deadline}) > "
                f"retry_period ({retry_period})"
            )
        self.identity = f"{identity}_{uuid.uuid4()}"
        self.leading = threading.Event()
        self.lost = threading.Event()
        self._api, self._namespace, self._name = api, namespace, name
        self._on_lost = on_lost
        self._lease_duration, self._renew_deadline, self._retry_period = lease_duration, renew_deadline, retry_period
        self._clock, self._wall_clock = clock, wall_clock
        self._seen: Seen | None = None
        self._renewed = -math.inf
        self._last_contact = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elector", daemon=True)
        LEADING.labels(name).set(0)

    def start(self) -> None:
        self._thread.start()

    def wait_leading(self, timeout: float | None = None) -> bool:
        return self.leading.wait(timeout)

    def may_act(self) -> bool:
        """Whether this process certainly holds the lease at this moment."""
        return self.leading.is_set() and self._clock() < self._renewed + self._renew_deadline

    def release(self) -> None:
        """Stops, and gives a held lease back so that another may take it at once; to be called when no worker writes any more."""
        self._stopping.set()
        self._thread.join(self._renew_deadline)
        held = self.may_act()
        self.leading.clear()
        LEADING.labels(self._name).set(0)
        if held and self._seen and not self._thread.is_alive():
            try:
                self._write(released(self._seen.lease, self._now()))
            except ApiError as error:
                log.warning("the lease is not given back and runs out by itself: %s", error)

    def problem(self, silent_for: float = 120) -> str | None:
        """What is wrong, for a health check. Waiting for the lease is fine."""
        if self.lost.is_set():
            return "the lease is lost"
        if self._thread.ident is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return "the leader election has ended"
        silence = self._clock() - self._last_contact
        return f"lease: no sign of the API server for {silence:.0f} s" if silence > silent_for else None

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                pause = self._keep() if self.leading.is_set() else self._seek()
            except Exception:
                log.exception("a defect in the leader election")
                pause = self._retry_period
            if self.leading.is_set() and not self.may_act():
                self._lose("it could not be renewed in time")
            if self.lost.is_set():
                return

    def _seek(self) -> float:
        """One try to become the leader; returns the seconds until the next."""
        started = self._clock()
        try:
            try:
                lease = self._api.get(LEASES, self._namespace, self._name)
            except NotFound:
                self._last_contact = self._clock()
                lease = {
                    "apiVersion": LEASES.api_version,
                    "kind": LEASES.kind,
                    "metadata": {"name": self._name},
                    "spec": claimed(None, self.identity, self._lease_duration, self._now()),
                }
                self._take(self._api.create(LEASES, self._namespace, lease), started)
                return self._retry_period
            self._last_contact = self._clock()
            self._seen = see(self._seen, lease, self._last_contact)
            if (left := free_in(self._seen, self._clock())) > 0:
                return min(left, self._retry_period * (1 + 0.2 * random.random()))
            spec = claimed(lease, self.identity, self._lease_duration, self._now())
            self._take(self._write(spec), started)
        except (Conflict, AlreadyExists):
            log.info("another took the lease %s/%s", self._namespace, self._name)
        except ApiError as error:
            log.warning("the lease %s/%s can't be read or taken: %s", self._namespace, self._name, error)
        return self._retry_period

    def _keep(self) -> float:
        """One renewal; returns the seconds until the next."""
        assert self._seen
        started = self._clock()
        if not self.may_act():
            return 0.0
        try:
            renewed = self._write(claimed(self._seen.lease, self.identity, self._lease_duration, self._now()))
            self._renewed, self._seen = started, see(self._seen, renewed, started)
        except (Conflict, NotFound):
            return self._reread()
        except ApiError as error:
            log.warning("the lease %s/%s is not renewed: %s", self._namespace, self._name, error)
        # A late answer to a renewal must not let the leadership outlive its deadline unnoticed.
        return min(self._retry_period, max(0.0, self._renewed + self._renew_deadline - self._clock()))

    def _reread(self) -> float:
        """After a conflict: a renewal whose answer got lost, somebody's edit, or another holder."""
        try:
            lease = self._api.get(LEASES, self._namespace, self._name)
        except NotFound:
            self._lose("it was deleted")
            return 0.0
        except ApiError as error:
            log.warning("the lease %s/%s can't be read: %s", self._namespace, self._name, error)
            return self._retry_period / 4
        self._seen = see(self._seen, lease, self._clock())
        if self._seen.holder != self.identity:
            self._lose(f"{self._seen.holder or 'nobody'} holds it")
        return self._retry_period / 4

    def _take(self, lease: Object, started: float) -> None:
        self._seen, self._renewed = Seen(lease, started), started
        self.leading.set()
        LEADING.labels(self._name).set(1)
        log.info("%s leads", self.identity)

    def _lose(self, why: str) -> None:
        if self.lost.is_set():
            return
        self.leading.clear()
        self.lost.set()
        LEADING.labels(self._name).set(0)
        log.error("%s has lost the lease %s/%s: %s", self.identity, self._namespace, self._name, why)
        self._on_lost()

    def _write(self, spec: Object) -> Object:
        assert self._seen
        body = {**self._seen.lease, "spec": spec}  # with its resourceVersion: of two who write, one fails
        answer = self._api.replace(LEASES, self._namespace, self._name, body)
        self._last_contact = self._clock()
        return answer

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall_clock(), UTC)
