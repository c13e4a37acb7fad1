"""What a pass over one object decides, and the part of it that both kinds share: acceptance, stages, attempts, waits, the end.

Pure: the clock comes in as `now`, what the API server holds as `Children`, and what is to be done goes out as a `Decision`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from kubepeft import digest, manifest
from kubepeft.reasons import HINTS, tell
from kubepeft.stage import Result
from kubepeft.types.objects import BatchInferenceSpec, FineTuneSpec
from kubepeft_operator import observe
from kubepeft_operator.config import Config
from kubepeft_operator.job import Object, Owner, StageName, job_name, owner_of
from kubepeft_operator.observe import Job, Pod, Why, rfc3339, seconds

SETTLE_SECONDS = 5.0
"""What a pod waits for is said after so long: many waits are over by then and need no write."""
LOOK_AGAIN_SECONDS = 30.0
"""How soon a wait whose end shows in no watched object is looked at again."""
STARTING_SECONDS = 30.0
"""A pod that is only being started may take so long before its object says so, and then the reason is looked up."""
ATTEMPTS = 10
LOST_LIMIT = 3
"""How often a stage whose outcome vanished with its pod is run again."""

Kind = Literal["FineTune", "BatchInference", "Job"]
Spec = TypeVar("Spec", FineTuneSpec, BatchInferenceSpec)


@dataclass(frozen=True)
class Children:
    """What the API server holds around one object."""

    jobs: Sequence[Job] = ()
    inference: Object | None = None
    """A FineTune's own BatchInference."""
    fine_tune: Object | None = None
    """The FineTune whose adapter a BatchInference waits for."""
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """UID of a Job → Warning events of it or its pod, newest first, where `wants_warnings` asked for them."""
    refused: Mapping[str, Why] = field(default_factory=dict)
    """Name of a child → why the API server did not take it."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """UID of a running pod → figures of its metrics page."""


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the object."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Patch:
    """A merge patch of a child's spec."""

    kind: Kind
    name: str
    spec: Object


@dataclass(frozen=True)
class Delete:
    """The deletion of a child; `foreground` keeps the name taken until its pods have ended."""

    kind: Kind
    name: str
    uid: str
    foreground: bool


@dataclass(frozen=True)
class Ended:
    """One more attempt that ended, for the metrics."""

    stage: str
    outcome: str
    reason: str
    waited: float | None
    """Seconds from the pod's making to its start."""
    ran: float | None
    gpus: int


@dataclass(frozen=True)
class Decision:
    """What to do; nothing of it is done yet."""

    status: Object | None = None
    """The whole new status, or None where it stays."""
    create: Sequence[Object] = ()
    patch: Sequence[Patch] = ()
    delete: Sequence[Delete] = ()
    events: Sequence[Event] = ()
    ended: Sequence[Ended] = ()
    requeue_after: float | None = None


class Draft:
    """A decision in the making."""

    def __init__(self, obj: Object, children: Children, now: float, config: Config) -> None:
        self.now, self.config, self.children = now, config, children
        self.owner: Owner = owner_of(obj)
        self.generation: int = obj["metadata"].get("generation", 1)
        self.before: Object = obj.get("status") or {}
        self.status: Object = copy.deepcopy(self.before)
        self.create: list[Object] = []
        self.patch: list[Patch] = []
        self.delete: list[Delete] = []
        self.events: list[Event] = []
        self.ended: list[Ended] = []
        self.requeue_after: float | None = None
        self.gpus: dict[str, int] = {}
        """Of one pod, by stage."""

    # ── conditions and phase

    def condition(self, type: str) -> Object:
        return next((one for one in self.status.get("conditions") or () if one.get("type") == type), {})

    def set_condition(self, type: str, value: bool, why: Why) -> bool:
        """Returns: whether its status or reason is another than before."""
        old = self.condition(type)
        wished = "True" if value else "False"
        moved = old.get("status") != wished
        new = {
            "type": type,
            "status": wished,
            "reason": why.reason,
            "message": tell(why.message, why.hint),
            "lastTransitionTime": rfc3339(self.now) if moved else old["lastTransitionTime"],
            "observedGeneration": self.generation,
        }
        conditions = [one for one in self.status.get("conditions") or () if one.get("type") != type]
        self.status["conditions"] = sorted([*conditions, new], key=lambda one: str(one.get("type")))
        return moved or old.get("reason") != why.reason

    def drop_condition(self, type: str) -> None:
        kept = [one for one in self.status.get("conditions") or () if one.get("type") != type]
        if len(kept) != len(self.status.get("conditions") or ()):
            self.status["conditions"] = kept

    def event(self, type: Literal["Normal", "Warning"], why: Why) -> None:
        self.events.append(Event(type, why.reason, tell(why.message, why.hint)))

    def requeue(self, after: float) -> None:
        after = max(after, 0.1)
        self.requeue_after = after if self.requeue_after is None else min(after, self.requeue_after)

    def set(self, **fields: Any) -> None:
        """Set fields of the status, by their names in JSON; None removes one."""
        for name, value in fields.items():
            if value is None:
                self.status.pop(name, None)
            else:
                self.status[name] = value

    def decision(self) -> Decision:
        changed = self.status != self.before
        return Decision(
            self.status if changed else None,
            tuple(self.create),
            tuple(self.patch),
            tuple(self.delete),
            tuple(self.events) if changed else (),
            tuple(self.ended) if changed else (),
            self.requeue_after,
        )

    # ── children

    def job(self, stage: StageName) -> Job | None:
        name = job_name(self.owner, stage)
        return next((job for job in self.children.jobs if job.name == name), None)

    def remove_job(self, job: Job, *, foreground: bool) -> None:
        if not job.deleting:
            self.delete.append(Delete("Job", job.name, job.uid, foreground))


def has_ended(status: Object) -> bool:
    """Whether the object has come to its end, which never changes again."""
    return any(
        one.get("type") in ("Complete", "Failed") and one.get("status") == "True"
        for one in status.get("conditions") or ()
    )


def after_the_end(draft: Draft, ttl: object) -> Decision:
    """A finished object changes no more. What still runs for it is stopped, and its Jobs go when their time has come."""
    finished = seconds(draft.status.get("completionTime"))
    due = finished + ttl if finished is not None and isinstance(ttl, int) else None
    for job in draft.children.jobs:
        if not job.finished:
            draft.remove_job(job, foreground=True)
        elif due is not None and draft.now >= due:
            draft.remove_job(job, foreground=False)
    if due is not None and draft.now < due and draft.children.jobs:
        draft.requeue(due - draft.now)
    return Decision(delete=tuple(draft.delete), requeue_after=draft.requeue_after)


# ── acceptance


def accept(draft: Draft, raw: Object, kind: type[Spec]) -> Spec | None:
    """The spec where it is valid and still the one accepted first; else None, and the draft says why."""
    accepted: str | None = draft.status.get("specDigest")
    spec, mistakes = read_spec(raw, kind)
    if accepted is None and spec is None:
        fail(draft, Why.known("InvalidSpec", mistakes), accepted=False)
        return None
    ours = digest.of_spec(spec) if spec else ""
    if accepted is not None and accepted != ours and (spec is None or _version(accepted) == _version(ours)):
        why = Why.known("SpecChanged", mistakes or "the spec is another than the one accepted; nothing is done with it")
        if draft.set_condition("Accepted", False, why):
            draft.event("Warning", why)
        return None
    draft.set(observedGeneration=draft.generation, specDigest=accepted or ours)
    draft.set_condition("Accepted", True, Why("Accepted", "the spec is valid"))
    return spec


def _version(spec_digest: str) -> str:
    return spec_digest.partition("-")[0]


def read_spec(raw: Object, kind: type[Spec]) -> tuple[Spec | None, str]:
    """The spec, or None and its mistakes."""
    try:
        return kind.model_validate(raw), ""
    except ValidationError as error:
        return None, "; ".join(f"spec.{words}" for _, words in manifest.explain(error, kind))


# ── the end


def fail(draft: Draft, why: Why, *, accepted: bool = True) -> None:
    """End in Failed; what still runs is stopped."""
    if not accepted:
        draft.set_condition("Accepted", False, why)
    draft.set_condition("Failed", True, why)
    draft.set_condition("Complete", False, why)
    if draft.owner.kind == "FineTune" and draft.condition("Trained").get("status") != "True":
        draft.set_condition("Trained", False, why)
    draft.drop_condition("Stalled")
    draft.set(phase="Failed", completionTime=rfc3339(draft.now), eta=None, observedGeneration=draft.generation)
    draft.create.clear()
    draft.patch.clear()
    draft.event("Warning", Why(why.reason, why.message, why.hint))
    for job in draft.children.jobs:
        if not job.finished:
            draft.remove_job(job, foreground=True)


def succeed(draft: Draft, message: str, *, announce: bool) -> None:
    why = Why("Succeeded", message)
    draft.set_condition("Complete", True, why)
    draft.drop_condition("Stalled")
    draft.set(phase="Succeeded", progress="100%", completionTime=rfc3339(draft.now), eta=None)
    if announce:
        draft.event("Normal", why)


def overdue(draft: Draft, limit: int | None) -> bool:
    """Whether the object's whole life has taken longer than `limit` seconds; if so it has failed."""
    started = seconds(draft.status.get("startTime"))
    if limit is None or started is None:
        return False
    left = started + limit - draft.now
    if left <= 0:
        fail(draft, Why.known("DeadlineExceeded", f"it did not end within {limit} seconds (activeDeadlineSeconds)"))
        return True
    draft.requeue(left)
    return False


# ── stages


@dataclass(frozen=True)
class Absent:
    """There is no Job."""


@dataclass(frozen=True)
class Going:
    """The Job runs or waits. `since`: when it last had a pod running or about to."""

    job: Job
    since: float


@dataclass(frozen=True)
class Leaving:
    """The Job is being deleted; its name is free when its pods have ended."""


@dataclass(frozen=True)
class Done:
    result: Result


@dataclass(frozen=True)
class Lost:
    """The Job succeeded, and its outcome vanished with its pods."""

    job: Job


@dataclass(frozen=True)
class Broken:
    why: Why


StageState = Absent | Going | Leaving | Done | Lost | Broken


def stage_state(job: Job | None, stage: StageName, spec_digest: str) -> StageState:
    """How a stage stands, from its Job and pods."""
    if job is None:
        return Absent()
    if job.deleting:
        return Leaving()
    if job.finished == "Complete":
        result = outcome_of(job, stage, spec_digest)
        return Lost(job) if result is None else Done(result)
    if job.finished == "Failed":
        return Broken(_cause(job))
    marks = [job.created, *(pod.created for pod in job.pods), *(pod.finished or 0.0 for pod in job.pods)]
    return Going(job, max(marks))


def outcome_of(job: Job, stage: StageName, spec_digest: str) -> Result | None:
    """The Result of a Job that succeeded: of an Indexed one, a shard's that counted the whole input."""
    found = [
        result
        for pod in job.pods
        if pod.phase == "Succeeded" and (result := observe.result_of(pod, stage, spec_digest)) is not None
    ]
    if stage == "prepare":
        found = [result for result in found if result.prepared is not None]
    elif stage == "train":
        found = [result for result in found if result.adapter is not None]
    else:
        found = [result for result in found if result.inference and (result.inference.whole or job.completions == 1)]
    return found[-1] if found else None


def _cause(job: Job) -> Why:
    """Why a Job failed: the words of the pod that decided it, else the Job's own."""
    failed = [pod for pod in job.pods if pod.phase == "Failed" and not (pod.exit_code is None and pod.disrupted)]
    final = [pod for pod in failed if pod.exit_code == 65] or [pod for pod in failed if pod.exit_code != 143]
    if not final:
        return Why(
            job.reason or "JobFailed", observe.shown(job.message) or "the Job failed", HINTS["BackoffLimitExceeded"]
        )
    why = observe.why_ended(max(final, key=lambda pod: (pod.finished or pod.created, pod.name)))
    tries = len([pod for pod in failed if pod.exit_code not in (65, 143)])
    if job.reason != "PodFailurePolicy" and tries > 1:
        why = Why(why.reason, f"{job.stage} failed {tries} times, at last: {why.message}", why.hint)
    return why


def record_attempts(draft: Draft) -> None:
    """Add the attempts that ended to status.attempts, and keep the last ones.

    Successes are added when their Job has ended: 1,000 shards that succeed one after the other are no 1,000 writes.
    """
    known = {one.get("pod") for one in draft.status.get("attempts") or ()}
    found: list[Object] = list(draft.status.get("attempts") or ())
    fresh: list[tuple[Object, Ended]] = []
    for job in draft.children.jobs:
        for pod in job.pods:
            if pod.ended and pod.name not in known and (job.finished or pod.phase == "Failed"):
                attempt = _attempt(job, pod)
                found.append(attempt)
                fresh.append((attempt, _ended(job, pod, attempt, draft)))
    kept = sorted(found, key=lambda one: (one.get("finishedAt") or "", one.get("pod") or ""))[-ATTEMPTS:]
    if not kept or kept == draft.status.get("attempts"):
        return
    draft.status["attempts"] = kept
    draft.ended += [ended for attempt, ended in fresh if attempt in kept]


def _attempt(job: Job, pod: Pod) -> Object:
    attempt: Object = {"stage": job.stage, "pod": pod.name, "outcome": "Succeeded"}
    if pod.phase == "Failed":
        why = observe.why_ended(pod)
        saved = pod.exit_code == 143
        attempt |= {"outcome": "Saved" if saved else "Failed", "reason": why.reason}
        attempt["message"] = observe.shown(tell(why.message, why.hint), 500)
    if pod.exit_code is not None:
        attempt["exitCode"] = pod.exit_code
    try:
        step = Result.model_validate_json(pod.terminated_message).resumed_from_step
    except ValidationError:
        step = None
    if step is not None:
        attempt["resumedFromStep"] = step
    for name, moment in (("startedAt", pod.started), ("finishedAt", pod.finished or pod.created)):
        if moment is not None:
            attempt[name] = rfc3339(moment)
    return attempt


def _ended(job: Job, pod: Pod, attempt: Object, draft: Draft) -> Ended:
    ran = pod.finished - pod.started if pod.finished and pod.started else None
    return Ended(
        job.stage,
        attempt["outcome"],
        attempt.get("reason", ""),
        max(0.0, pod.started - pod.created) if pod.started else None,
        ran,
        draft.gpus.get(job.stage, 0),
    )


def lost(draft: Draft, state: Lost, stage: StageName) -> None:
    """Run a stage again whose outcome nobody has read: it finds what it published, and says so in seconds."""
    mark = f"{state.job.name}/{state.job.uid[:8]}"
    attempts = list(draft.status.get("attempts") or ())
    if all(one.get("pod") != mark for one in attempts):
        why = Why.known("OutcomeLost", f"the {stage} stage succeeded, but its pod was gone before its outcome was read")
        attempts.append(
            {
                "stage": stage,
                "pod": mark,
                "outcome": "Failed",
                "reason": why.reason,
                "message": "the pod was gone before its outcome was read; the stage runs again and finds what it published",
                "finishedAt": rfc3339(state.job.finished_at or draft.now),
            }
        )
        draft.status["attempts"] = attempts[-ATTEMPTS:]
        times = sum(one.get("reason") == "OutcomeLost" and one.get("stage") == stage for one in attempts)
        if times > LOST_LIMIT:
            fail(draft, why)
            return
        draft.event("Warning", Why("OutcomeLost", f"{why.message}; the stage runs again"))
    draft.remove_job(state.job, foreground=True)


# ── waits


def wants_warnings(job: Job, now: float) -> str | None:
    """UID whose Warning events would say why a Job does not run: of the Job itself, or of its pod; None where they are not needed."""
    if job.finished or job.suspended or job.deleting or job.running:
        return None
    live = [pod for pod in job.pods if not pod.ended and not pod.deleting]
    if not live:
        return job.uid if not job.pods and now - job.created >= SETTLE_SECONDS else None
    pod = live[0]
    starting = not pod.unscheduled_reason and pod.waiting_reason in ("", "ContainerCreating", "PodInitializing")
    return pod.uid if starting and now - pod.created >= STARTING_SECONDS else None


def follow(draft: Draft, state: Going | Leaving, phase: str) -> None:
    """Say in phase and conditions whether a stage runs, and if not, what it waits for."""
    if isinstance(state, Leaving):
        why: Why | None = Why.known("PodEnding", "waiting for the former Job's pods to save and end")
        since = draft.now
    else:
        warnings = draft.children.warnings.get(state.job.uid, ())
        why, since = observe.why_waiting(state.job, warnings, queued=draft.owner.queued), state.since
    waited = draft.now - since
    if why is None or why.reason == "Resuming":
        going_on(draft, phase)
        return
    patience = STARTING_SECONDS if why.reason in ("PodPending", "PodStarting", "PodEnding") else SETTLE_SECONDS
    if why.reason == "Queued" or waited >= patience:
        wait(draft, why, since)
    else:
        draft.requeue(min(SETTLE_SECONDS, patience - waited))


def wait(draft: Draft, why: Why, since: float) -> None:
    """The object waits for something outside it; past config.stuck_after_seconds it counts as stalled."""
    draft.set(phase="Queued" if why.reason == "Queued" else "Pending", eta=None)
    _not_yet(draft, why)
    left = since + draft.config.stuck_after_seconds - draft.now
    if left > 0:
        draft.requeue(min(left, LOOK_AGAIN_SECONDS))
    elif why.reason != "Queued":
        if draft.set_condition("Stalled", True, why):
            draft.event("Warning", why)
        draft.requeue(LOOK_AGAIN_SECONDS)


def going_on(draft: Draft, phase: str) -> None:
    draft.set(phase=phase)
    draft.drop_condition("Stalled")
    _not_yet(draft, Why(phase, {"Preparing": "preparing the data", "Training": "training"}.get(phase, "answering")))


def _not_yet(draft: Draft, why: Why) -> None:
    draft.set_condition("Complete", False, why)
    if draft.owner.kind == "FineTune" and draft.condition("Trained").get("status") != "True":
        draft.set_condition("Trained", False, why)


def hold(draft: Draft) -> None:
    """Suspend: stop what runs, keep what is saved. Under Kueue a Job's `suspend` is Kueue's, so there the Job goes and is made anew."""
    for job in draft.children.jobs:
        if job.finished or job.deleting:
            continue
        if draft.owner.queued:
            draft.remove_job(job, foreground=True)
        elif not job.suspended:
            draft.patch.append(Patch("Job", job.name, {"suspend": True}))
    why = Why.known("Suspended", "suspended; what was saved is kept")
    if draft.condition("Complete").get("reason") != "Suspended" and draft.before.get("startTime"):
        draft.event("Normal", why)
    draft.drop_condition("Stalled")
    draft.set(phase="Suspended", eta=None)
    _not_yet(draft, why)


def release(draft: Draft, job: Job | None) -> None:
    """Resume a Job that was suspended by `hold` (or by hand)."""
    if job and job.suspended and not job.finished and not job.deleting and not draft.owner.queued:
        draft.patch.append(Patch("Job", job.name, {"suspend": False}))


def percent(done: float | None, total: float | None) -> str | None:
    return f"{min(100, max(0, int(100 * done / total)))}%" if done is not None and total else None
