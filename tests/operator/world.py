"""What the API server would hold around one object, as plain data, for tests of the pure half: no server, no thread, a clock set by hand."""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from kubepeft.stage import AdapterResult, InferenceResult, PreparedRef, Result, TrainingResult
from kubepeft_operator import batch_inference, fine_tune, observe
from kubepeft_operator.config import Config
from kubepeft_operator.decision import Children, Decision
from kubepeft_operator.job import STAGE_LABEL
from kubepeft_operator.observe import Why, rfc3339

Object = dict[str, Any]
CONFIG = Config.model_validate({"jobs": {"image": "registry.example/kubepeft-jobs:1"}})
START = 1_800_000_000.0

FINE_TUNE: Object = {
    "apiVersion": "kubepeft.io/v1alpha1",
    "kind": "FineTune",
    "metadata": {
        "name": "support-bot",
        "namespace": "ml",
        "uid": "uid-ft",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": rfc3339(START),
    },
    "spec": {
        "model": {"uri": "hf://Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"train": "s3://datasets/support.jsonl"},
        "output": {"uri": "s3://adapters/support-bot"},
    },
}
BATCH_INFERENCE: Object = {
    **FINE_TUNE,
    "kind": "BatchInference",
    "metadata": {**FINE_TUNE["metadata"], "name": "answers", "uid": "uid-bi"},
    "spec": {"adapter": {"uri": "s3://adapters/support-bot/adapter"}, "input": "s3://datasets/questions.jsonl"},
}
INFERENCE = {"inference": {"input": "s3://datasets/questions.jsonl"}}


def changed(obj: Object, **spec: Any) -> Object:
    """A copy with other fields in its spec."""
    new = copy.deepcopy(obj)
    new["spec"] |= spec
    return new


def result(stage: str, spec_digest: str = "", **fields: Any) -> str:
    """The termination message of a stage that succeeded."""
    found: dict[str, Any] = {
        "prepare": {"prepared": PreparedRef(digest="v1-p", model_commit="c" * 40, rows=10, tokens=99)},
        "train": {
            "adapter": AdapterResult(uri="s3://adapters/support-bot/adapter", digest="a" * 64, size_bytes=4321),
            "training": TrainingResult(step=12, total_steps=12, loss=0.5),
        },
        "infer": {"inference": InferenceResult(total=8, completed=7, failed=1, output="s3://out", whole=True)},
    }[stage]
    values = {"stage": stage, "outcome": "Succeeded", "exit_code": 0, "spec_digest": spec_digest, **found, **fields}
    return Result(**values).dumps()


def failure(stage: str, code: int, reason: str, message: str, hint: str = "") -> str:
    outcome = "Saved" if code == 143 else "Failed"
    return Result(
        stage=stage,
        outcome=outcome,
        exit_code=code,
        reason=reason,
        message=message,
        hint=hint,  # type: ignore[arg-type]
    ).dumps()


@dataclass
class World:
    """One object and its children. `step` decides and does what was decided."""

    obj: Object
    config: Config = CONFIG
    now: float = START
    jobs: dict[str, Object] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    inference: Object | None = None
    there: Object | None = None
    warnings: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, Why] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    writes: int = 0
    _count: int = 0

    @property
    def status(self) -> Object:
        return self.obj.get("status", {})

    def condition(self, type: str) -> tuple[str, str] | None:
        found = {one["type"]: (one["status"], one["reason"]) for one in self.status.get("conditions", [])}
        return found.get(type)

    def message(self, type: str) -> str:
        return next(one["message"] for one in self.status["conditions"] if one["type"] == type)

    def decide(self) -> Decision:
        jobs = [
            observe.read_job(
                observe.trim_job(job),
                [
                    observe.trim_pod(pod)
                    for pod in self.pods.values()
                    if observe.controller_uid(pod) == job["metadata"]["uid"]
                ],
            )
            for job in self.jobs.values()
        ]
        children = Children(jobs, self.inference, self.there, self.warnings, self.refused, self.figures)
        decide = fine_tune.decide if self.obj["kind"] == "FineTune" else batch_inference.decide
        return decide(self.obj, children, self.now, self.config)

    def step(self) -> Decision:
        made = self.decide()
        if made.status is not None:
            self.obj = {**self.obj, "status": json.loads(json.dumps(made.status))}
            self.writes += 1
        for body in made.create:
            if self.refused:
                continue
            self.writes += 1
            self._count += 1
            body = copy.deepcopy(body)
            body["metadata"] |= {
                "uid": f"uid-{self._count}",
                "creationTimestamp": rfc3339(self.now),
                "resourceVersion": "1",
            }
            if body["kind"] == "Job":
                assert body["metadata"]["name"] not in self.jobs, "a second Job"
                self.jobs[body["metadata"]["name"]] = body
            else:
                self.inference = body
        for patch in made.patch:
            self.writes += 1
            if patch.kind == "Job":
                self.jobs[patch.name]["spec"] |= patch.spec
            else:
                assert self.inference
                self.inference["spec"] |= patch.spec
        for gone in made.delete:
            self.writes += 1
            if gone.foreground:
                self.jobs[gone.name]["metadata"]["deletionTimestamp"] = rfc3339(self.now)
            else:
                self.remove(gone.name)
        return made

    def settle(self) -> Decision:
        """Steps until nothing is written any more; a decision that goes on for ever is a defect."""
        for _ in range(5):
            before = self.writes
            made = self.step()
            if self.writes == before:
                return made
        raise AssertionError("it never comes to rest")

    def job(self, stage: str) -> Object:
        return next(job for job in self.jobs.values() if job["metadata"]["labels"][STAGE_LABEL] == stage)

    def stages(self) -> list[str]:
        return [job["metadata"]["labels"][STAGE_LABEL] for job in self.jobs.values()]

    def remove(self, name: str) -> None:
        """The Job is gone, and its pods with it."""
        uid = self.jobs.pop(name)["metadata"]["uid"]
        self.pods = {one: pod for one, pod in self.pods.items() if observe.controller_uid(pod) != uid}

    def pod(self, stage: str, *, index: int | None = None, **status: Any) -> Object:
        """A new pod of the stage's Job, with this status."""
        job = self.job(stage)
        self._count += 1
        name = f"{job['metadata']['name']}-{self._count:05d}"
        metadata: Object = {
            "name": name,
            "namespace": "ml",
            "uid": f"uid-{self._count}",
            "resourceVersion": "1",
            "creationTimestamp": rfc3339(self.now),
            "ownerReferences": [
                {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
            ],
        }
        if index is not None:
            metadata["annotations"] = {observe.INDEX: str(index)}
        self.pods[name] = {"metadata": metadata, "status": {"phase": "Pending", **status}}
        return self.pods[name]

    def running(self, stage: str, *, index: int | None = None) -> Object:
        state = {"running": {"startedAt": rfc3339(self.now)}}
        statuses = [{"name": "kubepeft", "state": state}]
        return self.pod(stage, index=index, phase="Running", podIP="10.0.0.9", containerStatuses=statuses)

    def ended(self, stage: str, code: int, message: str = "", *, index: int | None = None, **terminated: Any) -> Object:
        """A pod of the stage that ended."""
        times = {"startedAt": rfc3339(self.now), "finishedAt": rfc3339(self.now)}
        word = "Completed" if code == 0 else "Error"
        state = {"terminated": {"exitCode": code, "reason": word, "message": message, **times, **terminated}}
        statuses = [{"name": "kubepeft", "state": state}]
        phase = "Failed" if code else "Succeeded"
        return self.pod(stage, index=index, phase=phase, containerStatuses=statuses)

    def finish(self, stage: str, type: str = "Complete", reason: str = "", message: str = "") -> None:
        """The Job controller's last word on the stage's Job."""
        condition = {"type": type, "status": "True", "reason": reason, "message": message}
        self.job(stage)["status"] = {"conditions": [{**condition, "lastTransitionTime": rfc3339(self.now)}]}

    def succeed(self, stage: str) -> None:
        self.ended(stage, 0, result(stage))
        self.finish(stage)

    def infer(self, type: str = "Complete", reason: str = "Succeeded", message: str = "") -> None:
        """The FineTune's own BatchInference comes to its end."""
        assert self.inference
        counts = {"total": 8, "completed": 7, "failed": 1, "output": "s3://out"}
        self.inference["status"] = {
            "phase": "Succeeded" if type == "Complete" else "Failed",
            "conditions": [{"type": type, "status": "True", "reason": reason, "message": message}],
            "inference": counts,
        }
