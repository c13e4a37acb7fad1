"""One pass over one object: gather what there is, let the pure half decide, and do it.

Order matters. The status goes first, with the resourceVersion that was decided from: it is refused when the decision was made from an old
object, and then nothing else of that decision is done. A pass that makes something without a change of status reads the object anew
first, for the same reason. Children have deterministic names, so whatever is cut short is done by the next pass, and nothing twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kubepeft_operator import batch_inference, decision, fine_tune, metrics, observe
from kubepeft_operator.config import Config
from kubepeft_operator.decision import Children, Decision, Kind
from kubepeft_operator.job import SELECTOR, Object
from kubepeft_operator.observe import Job, Why, controller_uid, seconds
from kubepeft_operator.own_writes import OwnWrites
from kubepeft_operator.progress import Key, Progress
from kubepeft_operator.runtime.api import EVENTS as EVENT_OBJECTS
from kubepeft_operator.runtime.api import JOBS, PODS, AlreadyExists, Api, ApiError, Conflict, NotFound, Resource
from kubepeft_operator.runtime.cache import Cache
from kubepeft_operator.runtime.events import Events

log = logging.getLogger(__name__)

FINE_TUNES = Resource("kubepeft.io", "v1alpha1", "finetunes", "FineTune")
BATCH_INFERENCES = Resource("kubepeft.io", "v1alpha1", "batchinferences", "BatchInference")
RESOURCES: dict[Kind, Resource] = {"FineTune": FINE_TUNES, "BatchInference": BATCH_INFERENCES, "Job": JOBS}
REFERENCES = "fine-tune"
"""Index of BatchInferences by the FineTune that they wait for."""
LOOK_UP_SECONDS, LOOK_UP_AGAIN_SECONDS = 25.0, 5.0
"""How long a namespace's Warning events count as fresh, for an object that has some and for one that has none."""


@dataclass
class Caches:
    """What the informers keep."""

    fine_tunes: Cache = field(default_factory=Cache)
    batch_inferences: Cache = field(default_factory=Cache)
    jobs: Cache = field(default_factory=Cache)
    pods: Cache = field(default_factory=Cache)

    def __post_init__(self) -> None:
        self.batch_inferences.add_index(REFERENCES, batch_inference.references)

    def of(self, kind: Kind) -> Cache:
        return {"FineTune": self.fine_tunes, "BatchInference": self.batch_inferences, "Job": self.jobs}[kind]


class Reconciler:
    """Brings FineTunes and BatchInferences on their way. Thread-safe, as long as one key is with one thread at a time."""

    def __init__(
        self,
        api: Api,
        caches: Caches,
        events: Events,
        progress: Progress,
        config: Config,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._caches, self._events, self._progress = api, caches, events, progress
        self._config, self._clock = config, clock
        self._own = OwnWrites()
        self._lock = threading.Lock()
        self._looked_up: dict[str, tuple[float, dict[str, list[str]]]] = {}
        self._refused: dict[Key, dict[str, Why]] = {}
        self._not_before: dict[Key, float] = {}

    def fine_tune(self, name: tuple[str, str]) -> float | None:
        """One pass. Returns after how many seconds the next one is due, or None. Raises: ApiError."""
        return self._politely(("FineTune", *name))

    def batch_inference(self, name: tuple[str, str]) -> float | None:
        """The same for a BatchInference."""
        return self._politely(("BatchInference", *name))

    def _politely(self, key: Key) -> float | None:
        """A pass, but none before the time that the API server asked to wait for, whatever happens meanwhile."""
        left = self._not_before.get(key, 0.0) - time.monotonic()
        if left > 0:
            return left
        self._not_before.pop(key, None)
        try:
            return self._pass(key)
        except ApiError as error:
            if error.retry_after:
                self._not_before[key] = time.monotonic() + error.retry_after
            raise

    def _pass(self, key: Key) -> float | None:
        kind, *name = key
        obj = self._caches.of(kind).get(*name)
        if obj is None:
            self._progress.follow(key, ())
            self._refused.pop(key, None)
            return None
        if behind := self._own.seen_in(key):
            return behind
        decide = fine_tune.decide if kind == "FineTune" else batch_inference.decide
        children = self._gather(kind, key, obj)
        made = decide(obj, children, self._clock(), self._config)
        obj, refused = self._apply(key, obj, made)
        if not refused:
            self._refused.pop(key, None)
        else:
            # The next passes know it too, so that they try again without saying anything new.
            self._refused[key] = refused
            # Of this second decision only the words count.
            self._write_status(key, obj, decide(obj, replace(children, refused=refused), self._clock(), self._config))
            raise ApiError(0, "Refused", "; ".join(why.message for why in refused.values()))
        ended = decision.has_ended(made.status or obj.get("status") or {})
        running = [pod for job in children.jobs for pod in job.pods if pod.running and not pod.deleting]
        self._progress.follow(key, () if ended else running)
        return made.requeue_after

    # ── gather

    def _gather(self, kind: Kind, key: Key, obj: Object) -> Children:
        status = obj.get("status") or {}
        namespace = obj["metadata"]["namespace"]
        uid = obj["metadata"]["uid"]
        jobs = [
            observe.read_job(raw, self._pods_of(raw))
            for raw in self._caches.jobs.owned_by(uid)
            if controller_uid(raw) == uid
        ]
        if decision.has_ended(status):
            return Children(jobs)
        stage = fine_tune.open_stage(status) if kind == "FineTune" else "infer"
        jobs = [self._with_outcome(namespace, job, status) if job.stage == stage else job for job in jobs]
        warnings = {
            job.uid: self._warnings(namespace, wanted)
            for job in jobs
            if (wanted := decision.wants_warnings(job, self._clock()))
        }
        inference = there = None
        if kind == "FineTune" and obj["spec"].get("inference"):
            inference = self._caches.batch_inferences.get(namespace, obj["metadata"]["name"])
        if kind == "BatchInference" and (wished := (obj["spec"].get("adapter") or {}).get("fineTune")):
            there = self._caches.fine_tunes.get(namespace, wished)
        refused = self._refused.get(key, {})
        return Children(jobs, inference, there, warnings, refused, self._progress.figures(key))

    def _pods_of(self, job: Object) -> Sequence[Object]:
        return self._caches.pods.owned_by(job["metadata"]["uid"])

    def _with_outcome(self, namespace: str, job: Job, status: Object) -> Job:
        """The Job with its pods read anew where the cache does not show how it ended: pods may come later there than their Job."""
        if not job.finished or job.deleting:
            return job
        if job.finished == "Complete":
            known = decision.outcome_of(job, job.stage, status.get("specDigest", "")) is not None  # type: ignore[arg-type]
        else:
            known = any(pod.phase == "Failed" for pod in job.pods)
        if known:
            return job
        log.info("reading the pods of a Job anew", extra={"namespace": namespace, "job": job.name})
        live = self._api.list(
            PODS, namespace, label_selector=f"{SELECTOR},batch.kubernetes.io/controller-uid={job.uid}"
        )
        pods = {pod.uid: pod for pod in (*job.pods, *(observe.read_pod(raw) for raw in live))}
        return replace(job, pods=tuple(sorted(pods.values(), key=lambda pod: (pod.created, pod.name))))

    def _warnings(self, namespace: str, uid: str) -> list[str]:
        """Warning events about an object, newest first.

        The API server reads all Events of a namespace for any question about them, so one question serves all who wait in it: there
        may be a thousand of them behind one quota.
        """
        now = self._clock()
        with self._lock:
            at, known = self._looked_up.get(namespace, (0.0, {}))
            if 0 <= now - at < (LOOK_UP_SECONDS if uid in known else LOOK_UP_AGAIN_SECONDS):
                return known.get(uid, [])
            self._looked_up[namespace] = now, known  # meanwhile others take what is known
        found: dict[str, list[tuple[str, str]]] = {}
        for page in self._api.list_pages(EVENT_OBJECTS, namespace, field_selector="type=Warning"):
            for event in page["items"]:
                about = (event.get("regarding") or {}).get("uid", "")
                found.setdefault(about, []).append((_last_seen(event), event.get("note") or ""))
        notes = {about: [note for _, note in sorted(all_of_it, reverse=True)] for about, all_of_it in found.items()}
        with self._lock:
            self._looked_up = {one: kept for one, kept in self._looked_up.items() if now - kept[0] < LOOK_UP_SECONDS}
            self._looked_up[namespace] = now, notes
        return notes.get(uid, [])

    # ── apply

    def _apply(self, key: Key, obj: Object, made: Decision) -> tuple[Object, dict[str, Why]]:
        """Do what was decided. Returns the object as it is now, and which children were refused, and why."""
        namespace = key[1]
        written = self._write_status(key, obj, made)
        if made.create and made.status is None:
            self._check_fresh(key, obj)
        refused = {}
        for body in made.create:
            if why := self._create(key, written, body):
                refused[body["metadata"]["name"]] = why
        for patch in made.patch:
            try:
                changed = self._api.patch(RESOURCES[patch.kind], namespace, patch.name, {"spec": patch.spec})
            except NotFound:
                continue
            self._own.wrote(key, self._caches.of(patch.kind), changed)
            log.info("patched", extra=_names(key) | {"child": f"{patch.kind} {patch.name}", "spec": patch.spec})
        for gone in made.delete:
            try:
                self._api.delete(
                    RESOURCES[gone.kind],
                    namespace,
                    gone.name,
                    uid=gone.uid,
                    propagation="Foreground" if gone.foreground else "Background",
                )
            except (NotFound, Conflict):
                continue
            self._own.deleted(key, self._caches.of(gone.kind), namespace, gone.name, gone.uid)
            log.info("deleted", extra=_names(key) | {"child": f"{gone.kind} {gone.name}"})
        return written, refused

    def _write_status(self, key: Key, obj: Object, made: Decision) -> Object:
        """Write the new status where there is one, then tell of it. Raises: Conflict when the object has changed meanwhile."""
        if made.status is None:
            return obj
        kind, namespace, name = key
        metadata = {field: obj["metadata"][field] for field in ("name", "namespace", "uid", "resourceVersion")}
        resource = RESOURCES[kind]
        body = {"apiVersion": resource.api_version, "kind": kind, "metadata": metadata, "status": made.status}
        try:
            written = self._api.replace(resource, namespace, name, body, subresource="status")
        except (NotFound, Conflict):
            self._read_anew(key)
            raise Conflict(409, "Conflict", f"{kind} {name} has changed since it was decided about") from None
        self._own.wrote(key, self._caches.of(kind), written)
        before = (obj.get("status") or {}).get("phase")
        now = datetime.fromtimestamp(self._clock(), UTC)
        for event in made.events:
            self._events.emit(written, event.type, event.reason, event.message, now)
        for ended in made.ended:
            metrics.observe(ended)
        if decision.has_ended(made.status):
            _observe_end(kind, made.status)
        if before != made.status.get("phase"):
            conditions = {one["type"]: one for one in made.status["conditions"]}
            why = conditions.get("Failed") or conditions.get("Complete") or {}
            words = {"phase": made.status.get("phase"), "reason": why.get("reason"), "why": why.get("message")}
            log.info("phase", extra=_names(key) | words)
        return observe.trim_object(written)

    def _check_fresh(self, key: Key, obj: Object) -> None:
        now = self._read_anew(key)
        if now is None or now["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", f"{key[0]} {key[2]} has changed since it was decided about")

    def _read_anew(self, key: Key) -> Object | None:
        """The object as it is, not as the cache has it; no pass is made until the cache has it so too."""
        kind, namespace, name = key
        try:
            now = self._api.get(RESOURCES[kind], namespace, name)
        except NotFound:
            return None
        self._own.wrote(key, self._caches.of(kind), now)
        return now

    def _create(self, key: Key, obj: Object, body: Object) -> Why | None:
        """Make a child, or find that it is there. Returns why it was refused."""
        kind: Kind = body["kind"]
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            created = self._api.create(RESOURCES[kind], namespace, body)
            log.info("created", extra=_names(key) | {"child": f"{kind} {name}"})
        except AlreadyExists:
            try:
                created = self._api.get(RESOURCES[kind], namespace, name)
            except NotFound:
                raise Conflict(409, "Conflict", f"{kind} {name} was there and is gone") from None
            if controller_uid(created) != obj["metadata"]["uid"]:
                return self._taken(obj, created)
        except ApiError as error:
            if error.status not in (400, 403, 422):
                raise
            if "being terminated" in error.message:
                raise Conflict(error.status, error.reason, error.message) from None
            reason = "QuotaExceeded" if "exceeded quota" in error.message else "JobRefused"
            return Why.known(reason, observe.shown(error.message))
        self._own.wrote(key, self._caches.of(kind), created)
        return None

    def _taken(self, obj: Object, other: Object) -> Why:
        owners = other["metadata"].get("ownerReferences") or ()
        former = any(
            (one["kind"], one["name"]) == (obj["kind"], obj["metadata"]["name"]) and one.get("controller")
            for one in owners
        )
        if former or "deletionTimestamp" in other["metadata"]:
            raise Conflict(409, "Conflict", "waiting for what a former object of this name has left to go")
        return Why.known(
            "NameConflict",
            f"a {other['kind']} {other['metadata']['name']} is there already and belongs to somebody else",
        )


def _observe_end(kind: str, status: Object) -> None:
    condition = next(
        one for one in status["conditions"] if one["type"] in ("Complete", "Failed") and one["status"] == "True"
    )
    began, ended = seconds(status.get("startTime")), seconds(status.get("completionTime"))
    outcome = "Succeeded" if condition["type"] == "Complete" else "Failed"
    metrics.observe_end(kind, outcome, condition["reason"], ended - began if began and ended else None)


def _last_seen(event: Object) -> str:
    series = event.get("series") or {}
    return (
        series.get("lastObservedTime")
        or event.get("deprecatedLastTimestamp")
        or event.get("eventTime")
        or event["metadata"]["creationTimestamp"]
    )


def _names(key: Key) -> Object:
    return {"kind": key[0], "namespace": key[1], "object": key[2]}
