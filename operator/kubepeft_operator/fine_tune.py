"""What to do about one FineTune: prepare, then train, then its own BatchInference. Pure; `decide` is all that others call."""

from __future__ import annotations

import math
from collections.abc import Callable

from kubepeft import stage
from kubepeft.errors import UserError
from kubepeft.types import API_VERSION
from kubepeft.types.objects import BatchInferenceSpec, FineTuneSpec
from kubepeft_operator import decision, job
from kubepeft_operator.config import Config
from kubepeft_operator.decision import (
    Absent,
    Broken,
    Children,
    Decision,
    Done,
    Draft,
    Going,
    Leaving,
    Lost,
    Patch,
)
from kubepeft_operator.job import Object, StageName
from kubepeft_operator.observe import Job, Why, controller_uid, rfc3339, seconds

PHASES = {"prepare": "Preparing", "train": "Training"}


def decide(obj: Object, children: Children, now: float, config: Config) -> Decision:
    """The next step of a FineTune, from what it asks for, what there is, and the time."""
    draft = Draft(obj, children, now, config)
    if "deletionTimestamp" in obj["metadata"]:
        return Decision()
    if decision.has_ended(draft.status):
        return decision.after_the_end(draft, obj["spec"].get("ttlSecondsAfterFinished"))
    spec = decision.accept(draft, obj["spec"], FineTuneSpec)
    if spec is None:
        return draft.decision()
    draft.set(method=spec.method.name())
    draft.gpus["train"] = spec.gpus
    decision.record_attempts(draft)
    output = _output(draft, spec)
    if output is None or decision.overdue(draft, spec.active_deadline_seconds):
        return draft.decision()
    if spec.suspend:
        decision.hold(draft)
        _pass_on(draft, spec)
        return draft.decision()
    if "startTime" not in draft.status:
        draft.set(startTime=rfc3339(now))
        decision.overdue(draft, spec.active_deadline_seconds)
    if _prepared(draft, spec, output) and _trained(draft, spec, output):
        _inferred(draft, spec)
    return draft.decision()


def open_stage(status: Object) -> StageName | None:
    """The stage whose outcome is still to be read."""
    if "prepared" not in status:
        return "prepare"
    return None if "adapter" in status else "train"


def _output(draft: Draft, spec: FineTuneSpec) -> str | None:
    """Where it publishes: decided once, so that another default of the chart moves no run that has begun."""
    known: str | None = draft.status.get("output")
    if known is None:
        default = draft.config.jobs.output_uri
        known = spec.output.uri or (
            f"{default.rstrip('/')}/{draft.owner.namespace}/{draft.owner.name}" if default else None
        )
        if known is None:
            decision.fail(
                draft,
                Why.known("NoOutput", "the spec has no output.uri, and this installation has no default"),
                accepted=False,
            )
        draft.set(output=known)
    return known


def _prepare_document(draft: Draft, spec: FineTuneSpec, output: str) -> stage.PrepareStage:
    return stage.prepare_stage(
        draft.owner.name,
        spec,
        output,
        namespace=draft.owner.namespace,
        mounts=job.mounts_of(spec.model.uri, spec.data.train, spec.data.eval, output),
        cache_dir=job.cache_dir(spec),
        image=draft.config.jobs.image,
    ).model_copy(update={"spec_digest": draft.status["specDigest"]})


def _prepared(draft: Draft, spec: FineTuneSpec, output: str) -> bool:
    """Whether the data is prepared; if not, the draft sees to it."""
    if "prepared" in draft.status:
        return True
    result = _stage(draft, "prepare", spec, lambda: _prepare_document(draft, spec, output), output)
    if result is None or result.prepared is None:
        return False
    found = result.prepared
    draft.set(
        prepared={
            "digest": found.digest,
            "modelCommit": found.model_commit,
            "rows": found.rows,
            "tokens": found.tokens,
        }
    )
    return True


def _trained(draft: Draft, spec: FineTuneSpec, output: str) -> bool:
    """Whether the adapter is published; if not, the draft sees to it."""
    if draft.condition("Trained").get("status") == "True" and "adapter" in draft.status:
        return True
    known = draft.status["prepared"]
    prepared = stage.PreparedRef(
        digest=known["digest"],
        model_commit=known["modelCommit"],
        rows=known.get("rows", 0),
        tokens=known.get("tokens", 0),
    )

    def document() -> stage.TrainStage:
        return stage.train_stage(_prepare_document(draft, spec, output), prepared, spec.gpus)

    result = _stage(draft, "train", spec, document, output)
    if result is None or result.adapter is None:
        return False
    adapter = result.adapter
    draft.set(
        adapter={"uri": adapter.uri, "digest": adapter.digest, "sizeBytes": adapter.size_bytes},
        training=_training(draft.status.get("training"), result.training),
        progress="100%",
        eta=None,
    )
    why = Why("Trained", f"the adapter is published at {adapter.uri}")
    draft.set_condition("Trained", True, why)
    if spec.inference:
        draft.event("Normal", why)
    return True


def _training(before: Object | None, result: stage.TrainingResult | None) -> Object | None:
    if result is None:
        return before
    found = {
        "step": result.step,
        "totalSteps": result.total_steps,
        "loss": _rounded(result.loss),
        "evalLoss": _rounded(result.eval_loss),
        "tokensPerSecond": _rounded(result.tokens_per_second, 1),
        "trainableParameters": result.trainable_parameters,
        "totalParameters": result.total_parameters,
    }
    return {name: value for name, value in found.items() if value is not None}


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _stage(
    draft: Draft,
    name: StageName,
    spec: FineTuneSpec,
    document: Callable[[], stage.PrepareStage | stage.TrainStage],
    output: str,
) -> stage.Result | None:
    """The stage's Result once it has succeeded; until then the draft says what to do and how it stands."""
    if decision.has_ended(draft.status):
        return None
    found = draft.job(name)
    state = decision.stage_state(found, name, draft.status["specDigest"])
    match state:
        case Done(result):
            return result
        case Absent():
            refused = draft.children.refused.get(job.job_name(draft.owner, name))
            try:
                body = job.build(draft.owner, spec, document(), draft.config, writable=job.mounts_of(output))
            except UserError as error:
                decision.fail(draft, Why(error.reason, error.what, error.mend), accepted=False)
                return None
            draft.create.append(body)
            if refused:
                decision.wait(draft, refused, draft.now)
            elif draft.owner.queued:
                decision.wait(draft, Why.known("Queued", "waiting for Kueue to admit the Job"), draft.now)
            else:
                decision.going_on(draft, PHASES[name])
            if not refused:
                draft.set(progress="0%", eta=None)
        case Going(running, _):
            decision.release(draft, running)
            _show(draft, running, name)
            decision.follow(draft, state, PHASES[name])
        case Leaving():
            decision.follow(draft, state, PHASES[name])
        case Lost():
            decision.lost(draft, state, name)
        case Broken(why):
            decision.fail(draft, why)
    return None


def _show(draft: Draft, running: Job, name: StageName) -> None:
    """Figures of the running pod's metrics page, into the status."""
    figures = next((draft.children.figures[pod.uid] for pod in running.pods if pod.uid in draft.children.figures), None)
    if not figures:
        return
    if name == "prepare":
        draft.set(
            progress=decision.percent(
                figures.get("kubepeft_prepare_bytes"), figures.get("kubepeft_prepare_total_bytes")
            )
            or draft.status.get("progress")
        )
        return

    def whole(figure: str) -> int | None:
        value = figures.get(f"kubepeft_training_{figure}")
        return None if value is None else int(value)

    shown: Object = {
        "step": whole("step"),
        "totalSteps": whole("total_steps"),
        "loss": _rounded(figures.get("kubepeft_training_loss")),
        "evalLoss": _rounded(figures.get("kubepeft_training_eval_loss")),
        "tokensPerSecond": _rounded(figures.get("kubepeft_training_tokens_per_second"), 1),
        "etaSeconds": whole("eta_seconds"),
        "trainableParameters": whole("trainable_parameters"),
        "totalParameters": whole("parameters"),
    }
    known = {key: value for key, value in shown.items() if value is not None}
    draft.set(
        training={**(draft.status.get("training") or {}), **known},
        progress=decision.percent(shown["step"], shown["totalSteps"]) or draft.status.get("progress"),
        eta=duration(shown["etaSeconds"]),
    )


def duration(amount: float | None) -> str | None:
    """5400 → "1h30m": the two largest units, as kubectl shows ages."""
    if amount is None:
        return None
    left = max(0, int(amount))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])


# ── the last stage


def _inferred(draft: Draft, spec: FineTuneSpec) -> None:
    """See to the FineTune's own BatchInference, and end with it."""
    wish = stage.batch_inference_of(draft.owner.name, spec)
    if wish is None:
        decision.succeed(draft, f"the adapter is published at {draft.status['adapter']['uri']}", announce=True)
        return
    child = draft.children.inference
    if child is None or controller_uid(child) != draft.owner.uid:
        draft.create.append(_inference(draft, spec, wish))
        if refused := draft.children.refused.get(draft.owner.name):
            decision.wait(draft, refused, draft.now)
        else:
            draft.set(progress="0%")
            decision.going_on(draft, "Inferring")
        return
    if "deletionTimestamp" in child["metadata"]:
        decision.wait(draft, Why.known("PodEnding", "waiting for the former BatchInference to end"), draft.now)
        return
    status = child.get("status") or {}
    draft.set(inference=status.get("inference"))
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    failed, complete = conditions.get("Failed", {}), conditions.get("Complete", {})
    if complete.get("status") == "True":
        counts = status.get("inference") or {}
        answered = f"{counts.get('completed', 0)} of {counts.get('total', 0)} rows answered"
        decision.succeed(draft, f"{answered}, in {counts.get('output', 'storage')}", announce=True)
        return
    if failed.get("status") == "True":
        message = f"the adapter is published, but its inference failed: {failed.get('message', '')}"
        decision.fail(draft, Why(failed.get("reason") or "InferenceFailed", message))
        return
    _pass_on(draft, spec)
    draft.set(progress=status.get("progress") or draft.status.get("progress"))
    if status.get("phase") in ("Pending", "Queued"):
        reason, message = complete.get("reason", "PodPending"), complete.get("message", "waiting")
        draft.set(phase=status["phase"])
        draft.set_condition("Complete", False, Why(reason, message))
    else:
        decision.going_on(draft, "Inferring")


def _inference(draft: Draft, spec: FineTuneSpec, wish: BatchInferenceSpec) -> Object:
    labels = {job.OWNER_LABELS["FineTune"]: draft.owner.name[:63].rstrip("-."), **job.MANAGED_BY}
    queue = {key: value for key, value in draft.owner.labels.items() if key in (job.QUEUE_LABEL, job.PRIORITY_LABEL)}
    body = wish.to_json(defaults=False) | {"ttlSecondsAfterFinished": spec.ttl_seconds_after_finished}
    deadline = _deadline_of_inference(draft, spec, draft.now)
    if deadline is not None:
        body["activeDeadlineSeconds"] = deadline
    return {
        "apiVersion": API_VERSION,
        "kind": "BatchInference",
        "metadata": {
            "name": draft.owner.name,
            "namespace": draft.owner.namespace,
            "labels": labels | queue,
            "ownerReferences": [draft.owner.reference()],
        },
        "spec": {key: value for key, value in body.items() if value is not None},
    }


def _deadline_of_inference(draft: Draft, spec: FineTuneSpec, begins: float) -> int | None:
    """What the FineTune's deadline leaves to a BatchInference that begins then."""
    started = seconds(draft.status.get("startTime"))
    if spec.active_deadline_seconds is None or started is None:
        return None
    return max(1, math.ceil(started + spec.active_deadline_seconds - begins))


def _pass_on(draft: Draft, spec: FineTuneSpec) -> None:
    """Fields that may change during a FineTune's life change in its BatchInference too."""
    child = draft.children.inference
    if child is None or controller_uid(child) != draft.owner.uid or decision.has_ended(child.get("status") or {}):
        return
    there: Object = child["spec"]
    begun = seconds(child["metadata"]["creationTimestamp"]) or draft.now
    changes: Object = {}
    if bool(there.get("suspend")) != spec.suspend:
        changes["suspend"] = spec.suspend
    if there.get("ttlSecondsAfterFinished") != spec.ttl_seconds_after_finished:
        changes["ttlSecondsAfterFinished"] = spec.ttl_seconds_after_finished
    wished, given = _deadline_of_inference(draft, spec, begun), there.get("activeDeadlineSeconds")
    # Two clocks take part, so a few seconds are no change.
    if (wished is None) != (given is None) or abs((wished or 0) - (given or 0)) > 5:
        changes["activeDeadlineSeconds"] = wished
    if changes:
        draft.patch.append(Patch("BatchInference", draft.owner.name, changes))
