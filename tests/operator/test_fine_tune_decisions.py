"""What the operator decides about a FineTune, from the first look to the end, one sentence a case."""

from typing import Any

import pytest

from kubepeft_operator.decision import Delete
from kubepeft_operator.job import QUEUE_LABEL, job_name, owner_of
from kubepeft_operator.observe import Why
from tests.operator.world import CONFIG, FINE_TUNE, INFERENCE, START, World, changed, failure, result


def at_training(**spec: Any) -> World:
    """A FineTune whose data is prepared and whose training Job is made."""
    world = World(changed(FINE_TUNE, **spec))
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def test_a_life_with_inference_takes_ten_writes_and_two_events() -> None:
    world = World(changed(FINE_TUNE, **INFERENCE))
    events = [*world.step().events]
    assert (world.stages(), world.status["phase"]) == (["prepare"], "Preparing")
    world.succeed("prepare")
    events += world.step().events
    assert (world.stages(), world.status["phase"]) == (["prepare", "train"], "Training")
    assert world.status["prepared"]["modelCommit"] == "c" * 40
    world.succeed("train")
    events += world.step().events
    assert world.condition("Trained") == ("True", "Trained")
    assert world.status["adapter"]["sizeBytes"] == 4321
    assert world.inference
    assert world.inference["spec"]["adapter"] == {"fineTune": "support-bot"}
    world.infer()
    events += world.step().events
    assert (world.status["phase"], world.condition("Complete")) == ("Succeeded", ("True", "Succeeded"))
    # 4 statuses, 2 Jobs and the BatchInference; its own 2 statuses and its Job come on top.
    assert world.writes == 7
    assert [event.reason for event in events] == ["Trained", "Succeeded"]


def test_without_inference_the_adapter_is_the_end() -> None:
    world = at_training()
    world.succeed("train")
    made = world.step()
    assert world.status["phase"] == "Succeeded"
    assert [event.reason for event in made.events] == ["Succeeded"]


def test_a_pass_over_something_unchanged_decides_nothing() -> None:
    world = at_training()
    world.running("train")
    world.step()
    again = world.decide()
    assert (again.status, again.create, again.patch, again.delete, again.events) == (None, (), (), (), ())


def test_train_gets_what_prepare_found_and_the_spec_digest_of_the_accepted_spec() -> None:
    world = at_training(gpus=2)
    from kubepeft import stage

    text = world.job("train")["spec"]["template"]["metadata"]["annotations"]["kubepeft.io/document"]
    document = stage.loads(text, local=False)
    assert isinstance(document, stage.TrainStage)
    assert (document.prepared.digest, document.gpus) == ("v1-p", 2)
    assert document.spec_digest == world.status["specDigest"]


# ── refused at the door


REFUSED = {
    "an unknown field": ({"modle": {}}, "InvalidSpec", "spec.modle: unknown field (did you mean model?)"),
    "a rule of several fields": (
        {"data": {"train": "s3://d/t", "eval": "s3://d/e", "evalFraction": 0.1}},
        "InvalidSpec",
        "give at most one of eval and evalFraction",
    ),
    "no output and no default": ({"output": {}}, "NoOutput", "jobs.outputUri"),
    "a document that no pod's environment takes": (
        {"method": {"lora": {"trainableTokenIndices": [1_000_000_000 + number for number in range(20000)]}}},
        "SpecTooLarge",
        "pods take",
    ),
}


@pytest.mark.parametrize("spec,reason,words", REFUSED.values(), ids=REFUSED)
def test_what_can_never_run_fails_at_once_and_says_why(spec: Any, reason: str, words: str) -> None:
    world = World(changed(FINE_TUNE, **spec))
    world.settle()
    assert world.jobs == {}
    assert world.condition("Accepted") == ("False", reason)
    assert world.condition("Failed") == ("True", reason)
    assert words in world.message("Failed")
    assert world.status["phase"] == "Failed"


def test_the_installations_output_is_taken_where_the_spec_has_none_and_is_kept_when_it_changes() -> None:
    jobs = {"image": "x/y:1", "outputUri": "s3://team/"}
    world = World(changed(FINE_TUNE, output={}), config=CONFIG.model_validate({"jobs": jobs}))
    world.settle()
    assert world.status["output"] == "s3://team/ml/support-bot"
    world.config = CONFIG.model_validate({"jobs": jobs | {"outputUri": "s3://other"}})
    world.succeed("prepare")
    world.settle()
    assert world.status["output"] == "s3://team/ml/support-bot"


# ── the spec changes


def test_a_changed_spec_is_not_followed_and_the_run_goes_on_when_it_is_put_back() -> None:
    world = at_training()
    before = world.obj
    world.obj = {**changed(world.obj, gpus=4), "status": world.status}
    made = world.step()
    assert world.condition("Accepted") == ("False", "SpecChanged")
    assert [event.reason for event in made.events] == ["SpecChanged"]
    assert (made.create, made.patch, made.delete) == ((), (), ())
    world.succeed("train")
    assert world.decide().status is None
    world.obj = {**before, "status": world.status}
    world.step()
    assert world.condition("Accepted") == ("True", "Accepted")
    assert world.status["phase"] == "Succeeded"


def test_a_digest_of_another_version_is_no_change_and_stays_the_one_that_stages_get() -> None:
    world = at_training()
    world.status["specDigest"] = "v0-somethingelse"
    world.remove(world.job("train")["metadata"]["name"])
    world.settle()
    text = world.job("train")["spec"]["template"]["metadata"]["annotations"]["kubepeft.io/document"]
    assert '"specDigest":"v0-somethingelse"' in text
    world.ended("train", 0, result("train", "v0-somethingelse"))
    world.finish("train")
    world.settle()
    assert world.condition("Accepted") == ("True", "Accepted")
    assert world.status["phase"] == "Succeeded"


# ── suspend, resume, deadline


def test_suspend_stops_the_job_and_resume_starts_the_same_one() -> None:
    world = at_training()
    world.running("train")
    world.settle()
    world.obj["spec"]["suspend"] = True
    made = world.step()
    assert world.job("train")["spec"]["suspend"] is True
    assert world.status["phase"] == "Suspended"
    assert [event.reason for event in made.events] == ["Suspended"]
    assert world.decide().status is None
    world.pods.clear()
    world.obj["spec"]["suspend"] = False
    world.settle()
    assert world.job("train")["spec"]["suspend"] is False
    assert world.status["phase"] == "Training"


def test_one_made_suspended_makes_nothing_and_its_life_has_not_begun() -> None:
    world = World(changed(FINE_TUNE, suspend=True, activeDeadlineSeconds=60))
    world.settle()
    assert (world.jobs, world.status["phase"]) == ({}, "Suspended")
    world.now += 1000
    world.obj["spec"]["suspend"] = False
    world.settle()
    assert world.stages() == ["prepare"]


def test_under_kueue_a_job_is_made_suspended_and_never_patched() -> None:
    world = World(FINE_TUNE)
    world.obj = {**FINE_TUNE, "metadata": {**FINE_TUNE["metadata"], "labels": {QUEUE_LABEL: "team"}}}
    world.settle()
    job = world.job("prepare")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"][QUEUE_LABEL] == "team"
    assert world.status["phase"] == "Queued"
    job["spec"]["suspend"] = False  # Kueue admits it
    world.running("prepare")
    assert world.settle().patch == ()
    assert world.status["phase"] == "Preparing"
    job["spec"]["suspend"] = True  # and takes it back
    world.pods.clear()
    world.now += 10
    assert world.settle().patch == ()
    assert world.status["phase"] == "Queued"


def test_under_kueue_suspend_removes_the_job_and_resume_makes_it_anew_when_it_is_gone() -> None:
    world = World({**FINE_TUNE, "metadata": {**FINE_TUNE["metadata"], "labels": {QUEUE_LABEL: "team"}}})
    world.settle()
    world.obj["spec"] = {**FINE_TUNE["spec"], "suspend": True}
    made = world.step()
    (gone,) = made.delete
    assert gone.foreground
    world.obj["spec"] = {**FINE_TUNE["spec"], "suspend": False}
    assert world.step().create == ()
    world.remove(gone.name)
    world.step()
    assert world.stages() == ["prepare"]


def test_the_deadline_counts_the_whole_life_and_stops_what_runs() -> None:
    world = World(changed(FINE_TUNE, activeDeadlineSeconds=100))
    world.settle()
    world.running("prepare")
    assert world.settle().requeue_after == 100
    world.now += 60
    world.obj["spec"]["suspend"] = True
    world.settle()
    world.obj["spec"]["suspend"] = False
    world.settle()
    world.now = START + 100
    made = world.step()
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    assert [(one.name, one.foreground) for one in made.delete] == [(job_name(owner_of(world.obj), "prepare"), True)]


def test_what_may_change_changes_in_the_inference_too() -> None:
    world = at_training(**INFERENCE, activeDeadlineSeconds=1000)
    world.succeed("train")
    world.now += 100
    world.settle()
    assert world.inference
    assert world.inference["spec"]["activeDeadlineSeconds"] == 900
    world.obj["spec"] |= {"suspend": True, "ttlSecondsAfterFinished": 5}
    world.settle()
    assert world.inference["spec"]["suspend"] is True
    assert world.inference["spec"]["ttlSecondsAfterFinished"] == 5
    world.obj["spec"] |= {"suspend": False, "activeDeadlineSeconds": 2000}
    world.settle()
    assert world.inference["spec"] | {"suspend": False, "activeDeadlineSeconds": 1900} == world.inference["spec"]


# ── failures


def test_bad_data_fails_the_run_with_the_stages_own_words() -> None:
    world = World(FINE_TUNE)
    world.settle()
    world.ended("prepare", 65, failure("prepare", 65, "BadRow", "support.jsonl:3: no prompt", "mend the row"))
    world.finish("prepare", "Failed", "PodFailurePolicy", "Container kubepeft failed with exit code 65")
    world.settle()
    assert world.condition("Failed") == ("True", "BadRow")
    assert world.message("Failed") == "support.jsonl:3: no prompt → mend the row"
    (attempt,) = world.status["attempts"]
    assert (attempt["outcome"], attempt["exitCode"], attempt["stage"]) == ("Failed", 65, "prepare")


def test_a_try_that_failed_shows_at_once_and_the_run_goes_on() -> None:
    world = at_training()
    world.ended("train", 75, failure("train", 75, "SlowDown", "s3 answered 503"))
    world.running("train")
    world.settle()
    assert [(one["stage"], one["outcome"]) for one in world.status["attempts"]] == [
        ("prepare", "Succeeded"),
        ("train", "Failed"),
    ]
    assert world.status["phase"] == "Training"


def test_when_the_tries_are_used_up_the_last_one_is_the_reason() -> None:
    world = at_training()
    for number in range(3):
        world.now += 10
        world.ended("train", 1, failure("train", 1, f"Try{number}", "it broke"))
    world.finish("train", "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    world.settle()
    assert world.condition("Failed") == ("True", "Try2")
    assert "train failed 3 times, at last: it broke" in world.message("Failed")
    assert world.condition("Trained") == ("False", "Try2")


def test_a_failed_inference_leaves_the_adapter_usable() -> None:
    world = at_training(**INFERENCE)
    world.succeed("train")
    world.settle()
    world.infer("Failed", "NoSuchKey", "s3://datasets/questions.jsonl: no such key")
    world.settle()
    assert world.condition("Failed") == ("True", "NoSuchKey")
    assert world.condition("Trained") == ("True", "Trained")
    assert world.status["adapter"]["uri"] == "s3://adapters/support-bot/adapter"


def test_only_the_last_ten_attempts_are_kept_and_seeing_them_again_changes_nothing() -> None:
    world = at_training()
    for number in range(15):
        world.now += 10
        world.ended("train", 143, failure("train", 143, "", f"saved {number}"))
    world.running("train")
    world.settle()
    assert len(world.status["attempts"]) == 10
    assert world.status["attempts"][-1]["message"] == "saved 14"
    assert {one["outcome"] for one in world.status["attempts"]} == {"Saved"}


# ── lost and removed


def test_a_job_deleted_by_hand_is_made_again() -> None:
    world = at_training()
    name = world.job("train")["metadata"]["name"]
    world.remove(name)
    world.settle()
    assert world.job("train")["metadata"]["name"] == name


def test_a_stage_whose_outcome_was_lost_runs_again_and_only_so_often() -> None:
    world = at_training()
    for lost in range(3):
        world.finish("train")
        world.now += 10
        made = world.step()
        assert [one.foreground for one in made.delete] == [True]
        assert world.decide().create == (), "the name is still taken"
        world.remove(world.job("train")["metadata"]["name"])
        world.step()
        assert world.status["attempts"][-1]["reason"] == "OutcomeLost", lost
    world.finish("train")
    world.now += 10
    world.settle()
    assert world.condition("Failed") == ("True", "OutcomeLost")


def test_a_lost_outcome_whose_job_is_still_there_is_told_once() -> None:
    world = at_training()
    world.finish("train")
    world.step()
    del world.job("train")["metadata"]["deletionTimestamp"]  # the operator died before the deletion
    world.now += 10
    made = world.step()
    assert len(made.delete) == 1
    assert [one.get("reason") for one in world.status["attempts"]].count("OutcomeLost") == 1


NO_OUTCOMES = {
    "none": "",
    "not JSON": "no JSON",
    "another shape": "[]",
    "another stage's": result("train").replace('"stage":"train"', '"stage":"infer"'),
    "another spec's": result("train", "v1-another"),
    "one without an adapter": result("train", adapter=None),
    "rubbish": "\0" * 5000,
}


@pytest.mark.parametrize("message", NO_OUTCOMES.values(), ids=NO_OUTCOMES)
def test_a_message_that_is_no_outcome_counts_as_lost(message: str) -> None:
    world = at_training()
    world.ended("train", 0, message)
    world.finish("train")
    world.step()
    assert world.status["attempts"][-1]["reason"] == "OutcomeLost"


# ── the end


def ended(**spec: Any) -> World:
    world = at_training(**spec)
    world.succeed("train")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    return world


def test_an_ended_object_never_changes_again_whatever_its_jobs_say() -> None:
    world = ended()
    before = world.status
    world.finish("train", "Failed", "BackoffLimitExceeded")
    world.obj["spec"] |= {"suspend": True, "gpus": 7}
    made = world.step()
    assert (made.status, made.create, made.patch) == (None, (), ())
    world.jobs.clear()
    assert world.settle().create == ()
    assert world.status == before


def test_jobs_go_when_their_time_has_come_and_not_before() -> None:
    world = ended(ttlSecondsAfterFinished=100)
    made = world.step()
    assert (made.delete, made.requeue_after) == ((), 100)
    world.now += 100
    made = world.step()
    assert [(one.kind, one.foreground) for one in made.delete] == [("Job", False), ("Job", False)]
    assert world.step().requeue_after is None


def test_what_still_runs_for_an_ended_object_is_stopped() -> None:
    world = at_training()
    world.running("train")
    world.obj["status"]["conditions"].append({"type": "Failed", "status": "True", "reason": "ByHand", "message": ""})
    made = world.step()
    assert made.status is None
    assert [isinstance(one, Delete) and one.foreground for one in made.delete] == [True]


def test_one_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    world = at_training()
    world.obj["metadata"] = {**world.obj["metadata"], "deletionTimestamp": "2027-01-01T00:00:00Z"}
    world.jobs.clear()
    made = world.decide()
    assert (made.status, made.create, made.delete) == (None, (), ())


@pytest.mark.parametrize("edit", [{"phase": "Succeeded"}, {"progress": "7%", "method": "X"}, {}], ids=["a phase", "other fields", "all of it"])  # fmt: skip
def test_a_status_edited_by_hand_is_put_right(edit: dict[str, Any]) -> None:
    world = at_training()
    world.running("train")
    world.settle()
    before = world.status
    world.obj = {**world.obj, "status": {**before, **edit} if edit else {}}
    world.settle()
    for name in ("phase", "method", "specDigest", "prepared"):
        assert world.status[name] == before[name], name
    assert world.stages() == ["prepare", "train"]


# ── waits


PENDING: dict[str, tuple[dict[str, Any], str, str]] = {
    "the scheduler finds no node": (
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}]},
        "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. → free or add such a node",
    ),
    "the image can't be pulled": (
        {"containerStatuses": [{"name": "kubepeft", "state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x/y:1"'}}}]},
        "ImagePull", 'ImagePullBackOff: Back-off pulling image "x/y:1"',
    ),
    "a Secret is missing": (
        {"containerStatuses": [{"name": "kubepeft", "state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}}]},
        "MissingSecret", 'secret "s3" not found → create the Secret',
    ),
    "a ConfigMap is missing": (
        {"containerStatuses": [{"name": "kubepeft", "state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'configmap "ca" not found'}}}]},
        "MissingConfigMap", 'configmap "ca" not found',
    ),
    "the pod may not run as root": (
        {"containerStatuses": [{"name": "kubepeft", "state": {"waiting": {"reason": "CreateContainerConfigError", "message": "container has runAsNonRoot"}}}]},
        "ContainerConfig", "container has runAsNonRoot",
    ),
    "a volume can't be mounted": (
        {"containerStatuses": [{"name": "kubepeft", "state": {"waiting": {"reason": "ContainerCreating"}}}]},
        "VolumeNotMounted", 'MountVolume.SetUp failed for volume "ca"',
    ),
    "nothing says why": ({}, "PodPending", "is pending"),
}  # fmt: skip


@pytest.mark.parametrize("status,reason,words", PENDING.values(), ids=PENDING)
def test_a_wait_says_what_for_after_a_moment(status: dict[str, Any], reason: str, words: str) -> None:
    world = at_training()
    world.pod("train", **status)
    if reason == "VolumeNotMounted":
        world.warnings[world.job("train")["metadata"]["uid"]] = ['MountVolume.SetUp failed for volume "ca": not found']
    made = world.settle()
    assert world.status["phase"] == "Training", "a start that is quick needs no word"
    assert made.requeue_after
    assert 0 < made.requeue_after <= 5
    world.now += 31 if reason == "PodPending" else 6
    world.settle()
    assert world.status["phase"] == "Pending"
    assert world.condition("Complete") == ("False", reason)
    assert words in world.message("Complete")
    world.pods.clear()
    world.running("train")
    world.settle()
    assert (world.status["phase"], world.condition("Complete")) == ("Training", ("False", "Training"))


@pytest.mark.parametrize(
    "warning,reason",
    [
        ('pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: 4, limited: 4', "QuotaExceeded"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "PodRefused"),
    ],
    ids=["a quota", "an admission rule"],
)  # fmt: skip
def test_a_refused_pod_says_who_refused_it(warning: str, reason: str) -> None:
    world = at_training()
    world.warnings[world.job("train")["metadata"]["uid"]] = [warning]
    world.now += 6
    world.settle()
    assert world.condition("Complete") == ("False", reason)
    assert warning in world.message("Complete")


def test_a_wait_that_takes_too_long_is_marked_once_and_unmarked_when_it_ends() -> None:
    world = at_training()
    world.pod("train", **PENDING["the scheduler finds no node"][0])
    world.now += 6
    world.settle()
    assert world.condition("Stalled") is None
    world.now = START + CONFIG.stuck_after_seconds
    made = world.step()
    assert world.condition("Stalled") == ("True", "Unschedulable")
    assert [event.type for event in made.events] == ["Warning"]
    world.now += 60
    assert world.decide().status is None
    (pod,) = [one for one in world.pods.values() if one["status"].get("conditions")]
    pod["status"]["conditions"][0]["message"] = "0/4 nodes are available"
    made = world.step()
    assert "0/4" in world.message("Stalled")
    assert made.events == ()
    world.pods.clear()
    world.running("train")
    world.settle()
    assert world.condition("Stalled") is None


def test_a_child_that_the_api_server_refuses_shows_as_a_wait() -> None:
    world = World(FINE_TUNE)
    world.refused = {job_name(owner_of(FINE_TUNE), "prepare"): Why.known("QuotaExceeded", "exceeded quota: jobs")}
    world.step()
    assert (world.status["phase"], world.condition("Complete")) == ("Pending", ("False", "QuotaExceeded"))
    world.refused = {}
    world.step()
    assert world.stages() == ["prepare"]


def test_the_wait_of_its_inference_shows_in_the_fine_tune() -> None:
    world = at_training(**INFERENCE)
    world.succeed("train")
    world.settle()
    assert world.inference
    complete = {"type": "Complete", "status": "False", "reason": "Unschedulable", "message": "no node"}
    world.inference["status"] = {"phase": "Pending", "conditions": [complete]}
    world.settle()
    assert (world.status["phase"], world.condition("Complete")) == ("Pending", ("False", "Unschedulable"))


# ── progress


def test_the_figures_of_the_metrics_page_show_in_status() -> None:
    world = at_training()
    uid = world.running("train")["metadata"]["uid"]
    world.figures[uid] = {
        "kubepeft_training_step": 42,
        "kubepeft_training_total_steps": 100,
        "kubepeft_training_loss": 1.23456,
        "kubepeft_training_eta_seconds": 5430,
    }
    world.settle()
    assert (world.status["progress"], world.status["eta"]) == ("42%", "1h30m")
    assert world.status["training"] == {"step": 42, "totalSteps": 100, "loss": 1.2346, "etaSeconds": 5430}
