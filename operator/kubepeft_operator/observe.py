"""What Jobs and pods say, read once into small types: how a stage stands, what it waits for, how its attempts ended and why.

Pure. Termination messages come from the user's own container and are not trusted: they are bounded, parsed as data, and shown as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from kubepeft.errors import EXIT_SAVED
from kubepeft.reasons import HINTS
from kubepeft.stage import Result
from kubepeft_operator.job import CONTAINER, STAGE_LABEL, StageName

Object = dict[str, Any]

MESSAGE_LIMIT = 4096
"""Most bytes of a termination message that are looked at; what Kubernetes keeps of one."""
REASON = re.compile(r"[A-Z][A-Za-z0-9]{0,63}\Z")
INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, slots=True)
class Why:
    """A reason for a condition, what happened, and what to do about it."""

    reason: str
    message: str
    hint: str = ""

    @classmethod
    def known(cls, reason: str, message: str) -> Why:
        return cls(reason, message, HINTS[reason])


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of a stage."""

    name: str
    uid: str
    job: str
    """UID of its Job."""
    index: int | None
    phase: str
    ip: str
    created: float
    started: float | None
    finished: float | None
    deleting: bool
    exit_code: int | None
    terminated_reason: str
    """The kubelet's word: Completed, Error, OOMKilled, StartError …"""
    terminated_message: str
    pod_reason: str
    """Such as Evicted."""
    pod_message: str
    disrupted: str
    """Message of the DisruptionTarget condition, or "". """
    waiting_reason: str
    waiting_message: str
    unscheduled_reason: str
    unscheduled_message: str

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        return self.phase == "Running" and self.exit_code is None


@dataclass(frozen=True, slots=True)
class Job:
    """One Job, with its pods."""

    name: str
    uid: str
    owner: str
    """UID of its controller."""
    stage: str
    created: float
    deleting: bool
    suspended: bool
    succeeded: int
    completions: int
    finished: str
    """"", "Complete" or "Failed"."""
    finished_at: float | None
    reason: str
    message: str
    pods: tuple[Pod, ...] = ()

    @property
    def running(self) -> bool:
        return any(pod.running and not pod.deleting for pod in self.pods)


def read_job(raw: Object, pods: Iterable[Object] = ()) -> Job:
    metadata, spec, status = raw["metadata"], raw["spec"], raw.get("status") or {}
    ended = next(
        (
            one
            for one in status.get("conditions") or ()
            if one["type"] in ("Complete", "Failed") and one["status"] == "True"
        ),
        None,
    )
    return Job(
        name=metadata["name"],
        uid=metadata["uid"],
        owner=controller_uid(raw) or "",
        stage=(metadata.get("labels") or {}).get(STAGE_LABEL, ""),
        created=seconds(metadata["creationTimestamp"]) or 0.0,
        deleting="deletionTimestamp" in metadata,
        suspended=bool(spec.get("suspend")),
        succeeded=status.get("succeeded") or 0,
        completions=spec.get("completions") or 1,
        finished=ended["type"] if ended else "",
        finished_at=seconds(ended.get("lastTransitionTime")) if ended else None,
        reason=(ended or {}).get("reason", ""),
        message=(ended or {}).get("message", ""),
        pods=tuple(sorted((read_pod(pod) for pod in pods), key=lambda pod: (pod.created, pod.name))),
    )


def read_pod(raw: Object) -> Pod:
    metadata, status = raw["metadata"], raw.get("status") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    container: Object = next((one for one in status.get("containerStatuses") or () if one["name"] == CONTAINER), {})
    state = container.get("state") or {}
    ended, waiting, running = state.get("terminated") or {}, state.get("waiting") or {}, state.get("running") or {}
    scheduled = conditions.get("PodScheduled") or {}
    unscheduled = scheduled if scheduled.get("status") == "False" else {}
    disrupted = conditions.get("DisruptionTarget") or {}
    index = (metadata.get("annotations") or {}).get(INDEX)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        job=controller_uid(raw) or "",
        index=int(index) if index and index.isdigit() else None,
        phase=status.get("phase") or "Pending",
        ip=status.get("podIP") or "",
        created=seconds(metadata["creationTimestamp"]) or 0.0,
        started=seconds(ended.get("startedAt") or running.get("startedAt")),
        finished=seconds(ended.get("finishedAt")),
        deleting="deletionTimestamp" in metadata,
        exit_code=ended.get("exitCode"),
        terminated_reason=ended.get("reason") or "",
        terminated_message=(ended.get("message") or "")[:MESSAGE_LIMIT],
        pod_reason=status.get("reason") or "",
        pod_message=status.get("message") or "",
        disrupted=(disrupted.get("message") or disrupted.get("reason") or "disrupted")
        if disrupted.get("status") == "True"
        else "",
        waiting_reason=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
        unscheduled_reason=unscheduled.get("reason") or "",
        unscheduled_message=unscheduled.get("message") or "",
    )


def trim_job(raw: Object) -> Object:
    """The part of a Job that `read_job` reads; what the cache keeps."""
    status = raw.get("status") or {}
    kept: Object = {
        "conditions": [one for one in status.get("conditions") or () if one["type"] in ("Complete", "Failed")]
    }
    if status.get("succeeded"):
        kept["succeeded"] = status["succeeded"]
    return {
        "metadata": _trimmed_metadata(raw, labels=True),
        "spec": {key: raw["spec"][key] for key in ("suspend", "completions") if key in raw["spec"]},
        "status": kept,
    }


def is_news(old: Object, new: Object) -> bool:
    """Whether more than the version of a trimmed Job has changed; its controller writes five times in its life."""
    versionless = [{**one, "metadata": {**one["metadata"], "resourceVersion": ""}} for one in (old, new)]
    return versionless[0] != versionless[1]


def trim_pod(raw: Object) -> Object:
    """The part of a pod that `read_pod` reads; what the cache keeps."""
    status = raw.get("status") or {}
    kept: Object = {key: status[key] for key in ("phase", "podIP", "reason", "message") if status.get(key)}
    kept["conditions"] = [
        one
        for one in status.get("conditions") or ()
        if (one["type"], one["status"]) in (("PodScheduled", "False"), ("DisruptionTarget", "True"))
    ]
    kept["containerStatuses"] = [
        {"name": one["name"], "state": one.get("state") or {}} for one in status.get("containerStatuses") or ()
    ]
    metadata = _trimmed_metadata(raw)
    del metadata["resourceVersion"]  # so that a change of what is left out wakes nobody
    index = (raw["metadata"].get("annotations") or {}).get(INDEX)
    if index is not None:
        metadata["annotations"] = {INDEX: index}
    return {"metadata": metadata, "status": kept}


def trim_object(raw: Object) -> Object:
    """A FineTune or BatchInference without what only its writers need."""
    metadata = {key: value for key, value in raw["metadata"].items() if key not in ("managedFields", "annotations")}
    return {**{key: value for key, value in raw.items() if key != "metadata"}, "metadata": metadata}


def _trimmed_metadata(raw: Object, *, labels: bool = False) -> Object:
    metadata = raw["metadata"]
    keys = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "deletionTimestamp")
    kept = {key: metadata[key] for key in keys if key in metadata}
    kept["ownerReferences"] = [
        {key: one[key] for key in ("kind", "name", "uid", "controller") if key in one}
        for one in metadata.get("ownerReferences") or ()
    ]
    if labels:
        kept["labels"] = {STAGE_LABEL: (metadata.get("labels") or {}).get(STAGE_LABEL, "")}
    return kept


def controller_uid(raw: Object) -> str | None:
    """UID of the object that this one belongs to."""
    owners = raw["metadata"].get("ownerReferences") or ()
    return next((one["uid"] for one in owners if one.get("controller")), None)


def result_of(pod: Pod, stage: StageName, spec_digest: str) -> Result | None:
    """The Result in a pod's termination message, or None where there is none of this stage and spec."""
    try:
        found = Result.model_validate_json(pod.terminated_message)
    except ValidationError:
        return None
    if found.stage != stage or found.spec_digest not in ("", spec_digest):
        return None
    return found


def why_ended(pod: Pod) -> Why:
    """Why a pod that did not succeed ended: its own words where it left some, else the kubelet's."""
    try:
        said: Result | None = Result.model_validate_json(pod.terminated_message)
    except ValidationError:
        said = None
    if pod.terminated_reason == "OOMKilled":
        return Why.known("OOMKilled", f"pod {pod.name} was killed: its memory limit was hit")
    if said is not None and (said.reason or said.message):
        reason = said.reason if REASON.match(said.reason) else "ExitCode"
        return Why(reason, shown(said.message) or f"pod {pod.name} ended with {pod.exit_code}", shown(said.hint))
    if pod.exit_code == EXIT_SAVED:
        return Why("Stopped", f"pod {pod.name} was asked to stop and did")
    if pod.pod_reason == "Evicted":
        return Why.known("Evicted", f"pod {pod.name} was evicted: {shown(pod.pod_message)}")
    if pod.disrupted:
        return Why("Disrupted", f"pod {pod.name}: {shown(pod.disrupted)}")
    if pod.exit_code is None:
        return Why.known("PodLost", f"pod {pod.name} ended without an exit code: {shown(pod.pod_message) or pod.phase}")
    if pod.terminated_reason in ("StartError", "ContainerCannotRun", "ContainerStatusUnknown"):
        return Why.known("StartFailed", f"pod {pod.name} did not start: {shown(pod.terminated_message)}")
    if pod.exit_code == 137:
        return Why.known("Killed", f"pod {pod.name} was killed by SIGKILL")
    return Why.known("ExitCode", f"pod {pod.name} ended with exit code {pod.exit_code} and left no message")


def shown(text: str, limit: int = 1000) -> str:
    """Somebody else's text as one line of a condition: no control characters, not too long."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)


def why_waiting(job: Job, warnings: Sequence[str], *, queued: bool) -> Why | None:
    """What keeps a Job from running, or None while one of its pods runs.

    warnings: messages of the Warning events of the Job or its pod, newest first, where they were looked up.
    """
    if job.running:
        return None
    if job.suspended:
        return (
            Why.known("Queued", f"Kueue has not admitted the Job {job.name} yet")
            if queued
            else Why("Resuming", f"the Job {job.name} is being resumed")
        )
    live = [pod for pod in job.pods if not pod.ended and not pod.deleting]
    if not live:
        if any(pod.deleting and not pod.ended for pod in job.pods):
            return Why.known("PodEnding", "waiting for the former pod to end")
        return _refused(warnings[0]) if warnings else Why.known("PodPending", f"the Job {job.name} has no pod yet")
    return _why_pending(live[0], warnings)


def _why_pending(pod: Pod, warnings: Sequence[str]) -> Why:
    message = shown(pod.waiting_message)
    if pod.unscheduled_reason == "SchedulingGated":
        return Why.known("Queued", f"pod {pod.name} is held by a scheduling gate")
    if pod.unscheduled_reason:
        return Why.known("Unschedulable", shown(pod.unscheduled_message) or f"no node takes pod {pod.name}")
    if pod.waiting_reason in IMAGE_REASONS:
        return Why.known("ImagePull", f"{pod.waiting_reason}: {message}")
    if pod.waiting_reason == "CreateContainerConfigError":
        for kind, reason in (("secret", "MissingSecret"), ("configmap", "MissingConfigMap")):
            if re.search(rf"\b{kind}\b", message, re.IGNORECASE):
                return Why.known(reason, message)
        return Why.known("ContainerConfig", message)
    if pod.waiting_reason not in ("", "ContainerCreating", "PodInitializing"):
        return Why.known("ContainerConfig", f"{pod.waiting_reason}: {message}")
    if warnings:
        volume = any(word in warnings[0] for word in ("MountVolume", "AttachVolume", "mount volumes"))
        return Why.known("VolumeNotMounted" if volume else "ContainerConfig", shown(warnings[0]))
    if pod.waiting_reason:
        return Why.known("PodStarting", f"pod {pod.name} is being started ({pod.waiting_reason})")
    return Why.known("PodPending", f"pod {pod.name} is pending")


def _refused(warning: str) -> Why:
    return Why.known("QuotaExceeded" if "exceeded quota" in warning else "PodRefused", shown(warning))


def seconds(time: str | None) -> float | None:
    """Seconds since 1970 of a Kubernetes time."""
    return datetime.fromisoformat(time).timestamp() if time else None


def rfc3339(moment: float | None) -> str | None:
    """Whole seconds, UTC, as Kubernetes writes it."""
    return None if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
