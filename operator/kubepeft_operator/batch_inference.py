"""What to do about one BatchInference: wait for the adapter, then one Indexed Job whose pods share the input. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from kubepeft import stage
from kubepeft.errors import UserError
from kubepeft.types.objects import BatchInferenceSpec
from kubepeft_operator import decision, job, observe
from kubepeft_operator.config import Config
from kubepeft_operator.decision import Absent, Broken, Children, Decision, Done, Draft, Going, Leaving, Lost
from kubepeft_operator.job import Object
from kubepeft_operator.observe import Job, Why, rfc3339

PHASE = "Inferring"


def decide(obj: Object, children: Children, now: float, config: Config) -> Decision:
    """The next step of a BatchInference, from what it asks for, what there is, and the time."""
    draft = Draft(obj, children, now, config)
    if "deletionTimestamp" in obj["metadata"]:
        return Decision()
    if decision.has_ended(draft.status):
        return decision.after_the_end(draft, obj["spec"].get("ttlSecondsAfterFinished"))
    spec = decision.accept(draft, obj["spec"], BatchInferenceSpec)
    if spec is None:
        return draft.decision()
    draft.gpus["infer"] = spec.gpus
    alone = observe.controller_uid(obj) is None
    decision.record_attempts(draft)
    if decision.overdue(draft, spec.active_deadline_seconds):
        return draft.decision()
    if spec.suspend:
        decision.hold(draft)
        return draft.decision()
    if "startTime" not in draft.status:
        draft.set(startTime=rfc3339(now))
        decision.overdue(draft, spec.active_deadline_seconds)
    adapter = _adapter(draft, spec)
    if adapter is not None:
        _inferred(draft, spec, adapter, announce=alone)
    return draft.decision()


def references(obj: Object) -> list[str]:
    """NAMESPACE/NAME of the FineTune whose adapter this BatchInference asks for; an index of the cache."""
    name = (obj["spec"].get("adapter") or {}).get("fineTune")
    return [f"{obj['metadata']['namespace']}/{name}"] if name else []


def _adapter(draft: Draft, spec: BatchInferenceSpec) -> stage.AdapterResult | None:
    """The adapter, once there is one. The first one seen is kept: another FineTune of that name changes nothing."""
    if spec.adapter.uri:
        return stage.AdapterResult(uri=spec.adapter.uri, digest="", size_bytes=0)
    if "adapter" not in draft.status:
        name, there = spec.adapter.fine_tune, draft.children.fine_tune
        status = (there or {}).get("status") or {}
        conditions = {one["type"]: one for one in status.get("conditions") or ()}
        if conditions.get("Trained", {}).get("status") != "True" or "adapter" not in status:
            failed = conditions.get("Failed", {})
            if failed.get("status") == "True":
                message = f"the FineTune {name} has failed: {failed.get('reason')}: {failed.get('message')}"
                decision.fail(draft, Why.known("FineTuneFailed", message))
            elif there is None:
                decision.wait(draft, Why.known("NoSuchFineTune", f"there is no FineTune {name} here yet"), draft.now)
            else:
                decision.wait(
                    draft, Why.known("WaitingForAdapter", f"the FineTune {name} is not trained yet"), draft.now
                )
            return None
        draft.set(adapter=status["adapter"])
    known = draft.status["adapter"]
    return stage.AdapterResult(uri=known["uri"], digest=known["digest"], size_bytes=known["sizeBytes"])


def _inferred(draft: Draft, spec: BatchInferenceSpec, adapter: stage.AdapterResult, *, announce: bool) -> None:
    if decision.has_ended(draft.status):
        return
    output = spec.output or stage.predictions_uri(adapter.uri.rstrip("/").rpartition("/")[0], draft.owner.name)
    found = draft.job("infer")
    state = decision.stage_state(found, "infer", draft.status["specDigest"])
    match state:
        case Done(result):
            counts = result.inference
            assert counts is not None
            draft.set(
                inference={
                    "total": counts.total,
                    "completed": counts.completed,
                    "failed": counts.failed,
                    "output": counts.output,
                }
            )
            answered = f"{counts.completed} of {counts.total} rows answered"
            decision.succeed(draft, f"{answered}, in {counts.output}", announce=announce)
        case Absent():
            document = stage.infer_stage(
                draft.owner.name,
                spec,
                adapter.uri,
                output,
                adapter_digest=adapter.digest or None,
                namespace=draft.owner.namespace,
                mounts=job.mounts_of(spec.model_uri, spec.input, adapter.uri, output),
                cache_dir=job.cache_dir(spec),
                image=draft.config.jobs.image,
            ).model_copy(update={"spec_digest": draft.status["specDigest"]})
            try:
                body = job.build(draft.owner, spec, document, draft.config, writable=job.mounts_of(output))
            except UserError as error:
                decision.fail(draft, Why(error.reason, error.what, error.mend), accepted=False)
                return
            draft.create.append(body)
            if refused := draft.children.refused.get(job.job_name(draft.owner, "infer")):
                decision.wait(draft, refused, draft.now)
            elif draft.owner.queued:
                decision.wait(draft, Why.known("Queued", "waiting for Kueue to admit the Job"), draft.now)
            else:
                decision.going_on(draft, PHASE)
            if not refused:
                draft.set(progress=draft.status.get("progress") or "0%")
        case Going(running, _):
            decision.release(draft, running)
            _show(draft, running, spec.shards, output)
            decision.follow(draft, state, PHASE)
        case Leaving():
            decision.follow(draft, state, PHASE)
        case Lost():
            decision.lost(draft, state, "infer")
        case Broken(why):
            decision.fail(draft, why)


def _show(draft: Draft, running: Job, shards: int, output: str) -> None:
    """How many rows are answered: from the results of the shards that ended and the metrics pages of those that run."""
    shown: dict[int, Mapping[str, float]] = {}
    looked = False
    for pod in running.pods:
        index = pod.index or 0
        result = observe.result_of(pod, "infer", draft.status["specDigest"]) if pod.phase == "Succeeded" else None
        if result and result.inference and not result.inference.whole:
            counts = result.inference
            shown[index] = {
                "kubepeft_inference_rows": counts.total,
                "kubepeft_inference_completed": counts.completed,
                "kubepeft_inference_failed": counts.failed,
            }
        elif "kubepeft_inference_rows" in (figures := draft.children.figures.get(pod.uid, {})):
            shown[index], looked = figures, True
    if not looked:
        return

    def total(name: str) -> int:
        return int(sum(figures.get(f"kubepeft_inference_{name}", 0) for figures in shown.values()))

    rows, completed, failed = total("rows"), total("completed"), total("failed")
    inference: Object = {"completed": completed, "failed": failed, "output": output}
    if len(shown) == shards:
        inference["total"] = rows
    if len(shown) == shards:
        progress = decision.percent(completed + failed, rows)
    else:  # shards that were not looked at count by whether they have ended
        progress = decision.percent(running.succeeded, shards)
    draft.set(inference=inference, progress=progress or draft.status.get("progress"))
