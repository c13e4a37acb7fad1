"""What the operator decides about a BatchInference, one sentence a case."""

from typing import Any

from kubepeft import stage
from kubepeft.stage import InferenceResult
from tests.operator.world import BATCH_INFERENCE, World, changed, failure, result

ADAPTER = {"uri": "s3://adapters/support-bot/adapter", "digest": "a" * 64, "sizeBytes": 4321}
TRAINED = {
    "conditions": [{"type": "Trained", "status": "True", "reason": "Trained", "message": ""}],
    "adapter": ADAPTER,
}
WAITING = changed(BATCH_INFERENCE, adapter={"fineTune": "support-bot"})


def document(world: World) -> stage.InferStage:
    text = world.job("infer")["spec"]["template"]["metadata"]["annotations"]["kubepeft.io/document"]
    found = stage.loads(text, local=False)
    assert isinstance(found, stage.InferStage)
    return found


def shards(count: int) -> World:
    world = World(changed(BATCH_INFERENCE, shards=count))
    world.settle()
    return world


def part(index: int, **fields: Any) -> str:
    counts = InferenceResult(**{"total": 2, "completed": 2, "failed": 0, "output": "s3://out", **fields})
    return result("infer", inference=counts)


def test_alone_it_takes_three_writes_and_one_event() -> None:
    world = World(BATCH_INFERENCE)
    events = [*world.step().events]
    assert world.status["phase"] == "Inferring"
    assert document(world).output_uri == "s3://adapters/support-bot/predictions/answers"
    world.ended("infer", 0, result("infer"), index=0)
    world.finish("infer")
    events += world.step().events
    assert world.status["inference"] == {"total": 8, "completed": 7, "failed": 1, "output": "s3://out"}
    assert (world.status["phase"], world.status["progress"], world.writes) == ("Succeeded", "100%", 3)
    assert [event.reason for event in events] == ["Succeeded"]


def test_it_waits_for_its_fine_tune_to_be_there_and_then_to_be_trained() -> None:
    world = World(WAITING)
    world.settle()
    assert world.condition("Complete") == ("False", "NoSuchFineTune")
    world.there = {"status": {}}
    world.settle()
    assert world.condition("Complete") == ("False", "WaitingForAdapter")
    assert world.jobs == {}
    world.there = {"status": TRAINED}
    world.settle()
    assert (document(world).adapter_uri, document(world).adapter_digest) == (ADAPTER["uri"], ADAPTER["digest"])
    assert world.status["phase"] == "Inferring"


def test_the_first_adapter_is_kept_whatever_becomes_of_the_fine_tune() -> None:
    world = World(WAITING, there={"status": TRAINED})
    world.settle()
    world.there = {"status": {**TRAINED, "adapter": {**ADAPTER, "digest": "b" * 64}}}
    world.remove(world.job("infer")["metadata"]["name"])
    world.settle()
    assert document(world).adapter_digest == "a" * 64


def test_a_fine_tune_that_failed_fails_it() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "BadRow", "message": "line 3"}
    world = World(WAITING, there={"status": {"conditions": [failed]}})
    world.settle()
    assert world.condition("Failed") == ("True", "FineTuneFailed")
    assert "BadRow: line 3" in world.message("Failed")


def test_one_that_was_trained_and_failed_later_has_an_adapter_to_use() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "NoSuchKey", "message": ""}
    world = World(WAITING, there={"status": {**TRAINED, "conditions": [*TRAINED["conditions"], failed]}})
    world.settle()
    assert world.stages() == ["infer"]


def test_shards_share_one_indexed_job_and_the_counts_are_of_the_whole() -> None:
    world = shards(4)
    spec = world.job("infer")["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimitPerIndex"] == 3
    assert "backoffLimit" not in spec
    for index in range(3):
        world.ended("infer", 0, part(index), index=index)
    world.running("infer", index=3)
    assert world.decide().status is None, "a shard that ends is no write"
    world.ended("infer", 0, part(3, total=8, completed=8, whole=True), index=3)
    world.finish("infer")
    world.settle()
    assert world.status["inference"]["completed"] == 8


def test_without_a_shard_that_counted_the_whole_the_stage_runs_again() -> None:
    world = shards(2)
    world.ended("infer", 0, part(0), index=0)
    world.finish("infer")
    made = world.step()
    assert world.status["attempts"][-1]["reason"] == "OutcomeLost"
    assert len(made.delete) == 1


def test_a_shard_whose_tries_are_used_up_fails_it_in_its_own_words() -> None:
    world = shards(2)
    world.ended("infer", 0, part(0), index=0)
    world.ended("infer", 1, failure("infer", 1, "InternalError", "ZeroDivisionError"), index=1)
    world.finish("infer", "Failed", "FailedIndexes", "Job has failed indexes")
    world.settle()
    assert world.condition("Failed") == ("True", "InternalError")


def test_bad_input_is_the_reason_whatever_fails_after_it() -> None:
    world = shards(2)
    world.ended("infer", 65, failure("infer", 65, "NoSuchKey", "no such key"), index=0)
    world.now += 5
    world.ended("infer", 1, failure("infer", 1, "InternalError", "it broke"), index=1)
    world.finish("infer", "Failed", "PodFailurePolicy", "a pod failed")
    world.settle()
    assert world.condition("Failed") == ("True", "NoSuchKey")


def test_a_shard_that_counted_the_whole_is_not_added_to_the_others() -> None:
    world = shards(2)
    world.ended("infer", 0, part(0, total=20, completed=20, whole=True), index=0)
    uid = world.running("infer", index=1)["metadata"]["uid"]
    world.figures = {uid: {"kubepeft_inference_rows": 10, "kubepeft_inference_completed": 5}}
    world.settle()
    assert world.status["inference"]["completed"] == 5


def test_progress_is_the_sum_of_the_shards() -> None:
    world = shards(2)
    first, second = (world.running("infer", index=index)["metadata"]["uid"] for index in (0, 1))
    world.figures = {
        first: {"kubepeft_inference_rows": 10, "kubepeft_inference_completed": 5},
        second: {"kubepeft_inference_rows": 10, "kubepeft_inference_completed": 1, "kubepeft_inference_failed": 1},
    }
    world.settle()
    assert world.status["inference"]["total"] == 20
    assert (world.status["inference"]["completed"], world.status["progress"]) == (6, "35%")


def test_a_page_without_answers_yet_leaves_progress_as_it_is() -> None:
    world = shards(1)
    world.figures = {world.running("infer", index=0)["metadata"]["uid"]: {"kubepeft_memory_bytes": 1}}
    world.settle()
    assert world.status["progress"] == "0%"
    assert "inference" not in world.status


def test_suspend_and_resume() -> None:
    world = shards(1)
    world.obj["spec"] = {**world.obj["spec"], "suspend": True}
    world.settle()
    assert (world.job("infer")["spec"]["suspend"], world.status["phase"]) == (True, "Suspended")
    world.obj["spec"] = {**world.obj["spec"], "suspend": False}
    world.settle()
    assert (world.job("infer")["spec"]["suspend"], world.status["phase"]) == (False, "Inferring")
