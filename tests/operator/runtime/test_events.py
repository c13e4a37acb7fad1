"""Events on the real API server: what a person sees, and that nothing waits for them."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kubepeft_operator.runtime import events as module
from kubepeft_operator.runtime.api import EVENTS, Api, Object
from kubepeft_operator.runtime.events import Events
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import Answer, ApiProxy, Request
from tests.operator.runtime.parts import CONFIG_MAPS, config_map, eventually


@pytest.fixture
def now() -> datetime:
    """Of the test, not of its module's import: what is ten minutes old is forgotten."""
    return datetime.now(UTC)


@pytest.fixture
def regarding(api: Api, namespace: str) -> Object:
    return api.create(CONFIG_MAPS, namespace, config_map("about"))


@pytest.fixture
def events(proxied: Api) -> Iterator[Events]:
    sender = Events(proxied, "kubepeft.io/test", "pod-1")
    sender.start()
    yield sender
    sender.stop()


def sent(api: Api, namespace: str) -> list[dict[str, Any]]:
    return [one for one in api.list(EVENTS, namespace) if one["regarding"]["name"] == "about"]


def dropped(why: str) -> float:
    return REGISTRY.get_sample_value("events_dropped_total", {"why": why}) or 0


def test_a_person_sees_the_event_beside_the_object(
    events: Events, regarding: Object, api: Api, namespace: str, control_plane: ControlPlane, now: datetime
) -> None:
    events.emit(regarding, "Warning", "Unschedulable", "0/3 nodes have enough GPUs", now)
    eventually(lambda: sent(api, namespace))
    [event] = sent(api, namespace)
    assert event["regarding"]["uid"] == regarding["metadata"]["uid"]
    assert (event["reportingController"], event["reportingInstance"]) == ("kubepeft.io/test", "pod-1")
    described = control_plane.kubectl("describe", "configmap", "about", "--namespace", namespace)
    assert "Unschedulable" in described
    assert "0/3 nodes have enough GPUs" in described


def test_the_same_again_is_a_count_and_another_message_is_another_event(
    events: Events, regarding: Object, api: Api, namespace: str, proxy: ApiProxy, now: datetime
) -> None:
    for minute in range(3):
        events.emit(regarding, "Normal", "Waiting", "for a GPU", now + timedelta(minutes=minute))
        events.emit(regarding, "Normal", "Waiting", "for a GPU", now + timedelta(minutes=minute, seconds=1))
    events.emit(regarding, "Normal", "Waiting", "for an image", now)
    events.stop(5)
    notes = {event["note"]: event.get("series", {}).get("count") for event in sent(api, namespace)}
    assert notes == {"for a GPU": 5, "for an image": None}  # the sixth waits for the next minute
    tries = {
        request.target + str(request.body): request.method for request in proxy.requests
    }  # a busy server is asked again
    assert list(tries.values()) == ["POST", "PATCH", "PATCH", "POST"]


def test_an_event_whose_answer_was_lost_is_sent_once(
    events: Events, regarding: Object, api: Api, namespace: str, proxy: ApiProxy, now: datetime
) -> None:
    answers = [Answer(forwarded=True, cut=True)]
    before = dropped("AlreadyExists")
    proxy.rule = lambda request: answers.pop() if answers else None
    events.emit(regarding, "Normal", "Waiting", "for a GPU", now)
    events.stop(5)
    assert [event["reason"] for event in sent(api, namespace)] == ["Waiting"]
    assert len(proxy.requests) == 2
    assert dropped("AlreadyExists") == before


def test_a_count_that_nothing_follows_is_written_later(
    regarding: Object, api: Api, namespace: str, proxied: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPACING", 0.2)
    events = Events(proxied, "kubepeft.io/test", "pod-1")
    events.start()
    now = datetime.now(UTC)
    events.emit(regarding, "Normal", "Waiting", "for a GPU", now)
    events.emit(regarding, "Normal", "Waiting", "for a GPU", now)
    eventually(lambda: [one.get("series", {}).get("count") for one in sent(api, namespace)] == [2], 3)
    events.stop()


def test_a_count_on_an_event_that_has_been_forgotten_makes_a_new_one(
    events: Events, regarding: Object, api: Api, namespace: str, now: datetime
) -> None:
    events.emit(regarding, "Normal", "Waiting", "for a GPU", now)
    eventually(lambda: sent(api, namespace))
    api.delete(EVENTS, namespace, sent(api, namespace)[0]["metadata"]["name"])
    events.emit(regarding, "Normal", "Waiting", "for a GPU", now + timedelta(minutes=2))
    eventually(lambda: sent(api, namespace))


def test_a_long_message_is_cut_to_what_the_api_server_takes(
    events: Events, regarding: Object, api: Api, namespace: str, now: datetime
) -> None:
    events.emit(regarding, "Warning", "Failed", "ü" * 5000, now)
    eventually(lambda: sent(api, namespace))
    assert sent(api, namespace)[0]["note"] == "ü" * 510 + "…"  # 1,023 bytes


def test_an_api_server_that_does_not_answer_holds_nobody_up(
    events: Events, regarding: Object, api: Api, namespace: str, proxy: ApiProxy, now: datetime
) -> None:
    proxy.silence()
    started = time.monotonic()
    for number in range(1000):
        events.emit(regarding, "Normal", "Step", f"number {number}", now)
    assert time.monotonic() - started < 0.5


def test_errors_that_pass_are_tried_again_and_others_dropped(
    events: Events, regarding: Object, api: Api, namespace: str, proxy: ApiProxy, now: datetime
) -> None:
    answers = [Answer(500), Answer(429), Answer(403, body=b'{"reason":"Forbidden"}')]
    before = dropped("Forbidden")

    def rule(request: Request) -> Answer | None:
        return answers.pop(0) if answers else None

    proxy.rule = rule
    events.emit(regarding, "Normal", "First", "refused for good at the third try", now)
    events.emit(regarding, "Normal", "Second", "arrives", now)
    eventually(lambda: sent(api, namespace), 5)
    assert [event["reason"] for event in sent(api, namespace)] == ["Second"]
    assert dropped("Forbidden") == before + 1


def test_stopping_sends_what_waits_but_not_for_ever(
    events: Events, regarding: Object, api: Api, namespace: str, proxy: ApiProxy, now: datetime
) -> None:
    for number in range(20):
        events.emit(regarding, "Normal", "Step", f"number {number}", now)
    events.stop(5)
    assert len(sent(api, namespace)) == 20
    stuck = Events(api, "kubepeft.io/test", "pod-1")
    stuck.start()
    started = time.monotonic()
    stuck.stop(0.2)
    assert time.monotonic() - started < 1
