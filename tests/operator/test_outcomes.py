"""Why a pod ended, from what the kubelet and the pod itself say. What pods say is not trusted."""

from typing import Any

import pytest

from kubepeft_operator import observe
from kubepeft_operator.observe import Pod, shown, why_ended
from tests.operator.world import FINE_TUNE, World, failure


def ended(code: int | None, said: str = "", *, word: str = "Error", **status: Any) -> Pod:
    """A pod whose container ended with `code` and left the message `said`; None for one without a container's status."""
    world = World(FINE_TUNE)
    world.settle()
    raw = world.ended("prepare", code or 0, said, reason=word)
    raw["status"] |= {"phase": "Failed", **status}
    if code is None:
        raw["status"]["containerStatuses"] = []
    return observe.read_pod(observe.trim_pod(raw))


CASES: dict[str, tuple[Pod, str, str]] = {
    "its own words": (ended(65, failure("prepare", 65, "BadRow", "line 3", "mend it")), "BadRow", "line 3"),
    "out of memory by the kernel": (ended(137, word="OOMKilled"), "OOMKilled", "memory limit"),
    "out of memory beats its own words": (
        ended(137, failure("prepare", 1, "Killed", "a worker was killed"), word="OOMKilled"), "OOMKilled", "memory limit",
    ),
    "killed without a reason": (ended(137), "Killed", "SIGKILL"),
    "evicted by the kubelet": (
        ended(None, phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage."),
        "Evicted", "ephemeral-storage",
    ),
    "asked to stop": (ended(143), "Stopped", "asked to stop"),
    "the program is not there": (
        ended(128, 'exec: "python": executable file not found in $PATH', word="StartError"), "StartFailed", "executable file not found",
    ),
    "no word at all": (ended(3), "ExitCode", "exit code 3"),
    "no status of its container": (ended(None), "PodLost", "without an exit code"),
    "a preempted one": (
        ended(None, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted by a pod of higher priority"}]),
        "Disrupted", "higher priority",
    ),
}  # fmt: skip


@pytest.mark.parametrize("pod,reason,words", CASES.values(), ids=CASES)
def test_a_pod_that_ended_badly_gives_a_reason_and_words(pod: Pod, reason: str, words: str) -> None:
    why = why_ended(pod)
    assert why.reason == reason
    assert words in why.message


HOSTILE = {
    "a reason that is no word": failure("prepare", 1, "Bad\nRow {}", "x"),
    "terminal escapes": failure("prepare", 1, "Bad", "\x1b[31mred\x1b[0m\nsecond line\0"),
    "a very long message": '{"stage":"prepare","outcome":"Failed","exitCode":1,"reason":"Bad","message":"' + "m" * 3000 + '"}',
    "a broken unicode tail": failure("prepare", 1, "Bad", "\ud800".encode("utf-8", "replace").decode()),
}  # fmt: skip


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_messages_become_short_plain_lines(message: str) -> None:
    why = why_ended(ended(1, message))
    assert observe.REASON.match(why.reason)
    assert len(why.message) <= 1000
    assert why.message.isprintable()


def test_shown_text_is_one_line() -> None:
    assert shown(" a\n\tb\x00c ") == "a b c"


def job(version: str, spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A Job as the API server holds it, trimmed."""
    metadata = {"name": "ft-train", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return observe.trim_job(
        {"metadata": {**metadata, "resourceVersion": version}, "spec": spec or {}, "status": status}
    )


COMPLETE = [{"type": "Complete", "status": "True", "reason": "CompletionsReached"}]
NEWS: dict[str, tuple[dict[str, Any], bool]] = {
    "a pod of it was made": (job("2", active=1), False),
    "its pods have succeeded and are still counted": (
        job("2", conditions=[{"type": "SuccessCriteriaMet", "status": "True"}]), False,
    ),
    "a shard of it has succeeded": (job("2", succeeded=1), True),
    "it is complete": (job("2", conditions=COMPLETE), True),
    "it is suspended": (job("2", {"suspend": True}), True),
}  # fmt: skip


@pytest.mark.parametrize("now,expected", NEWS.values(), ids=NEWS)
def test_a_job_is_looked_at_when_something_has_changed_that_counts(now: dict[str, Any], expected: bool) -> None:
    assert observe.is_news(job("1"), now) is expected
