"""Calls against the real API server, and what becomes of them when it or the way to it misbehaves."""

import concurrent.futures
import logging
import time

import pytest
from prometheus_client import REGISTRY

from kubepeft_operator.runtime.api import (
    JOBS,
    AlreadyExists,
    Api,
    ApiError,
    Conflict,
    NotFound,
    NotLeading,
)
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import Answer, ApiProxy, Request
from tests.operator.runtime.parts import CONFIG_MAPS, config_map


def counted(method: str, verb: str, resource: str, code: str) -> float:
    labels = {"method": method, "verb": verb, "resource": resource, "code": code}
    return REGISTRY.get_sample_value("rest_client_requests_total", labels) or 0


def test_an_object_is_created_read_changed_and_deleted(api: Api, namespace: str) -> None:
    made = api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    assert api.get(CONFIG_MAPS, namespace, "a") == made
    patched = api.patch(CONFIG_MAPS, namespace, "a", {"data": {"y": "2"}})
    assert patched["data"] == {"x": "1", "y": "2"}
    patched = api.patch(CONFIG_MAPS, namespace, "a", [{"op": "remove", "path": "/data/x"}], kind="json")
    assert patched["data"] == {"y": "2"}
    replaced = api.replace(CONFIG_MAPS, namespace, "a", {**patched, "data": {"z": "ü"}})
    assert replaced["data"] == {"z": "ü"}
    api.delete(CONFIG_MAPS, namespace, "a", uid=made["metadata"]["uid"])
    with pytest.raises(NotFound):
        api.get(CONFIG_MAPS, namespace, "a")


def test_server_side_apply_creates_and_owns_its_fields(api: Api, namespace: str) -> None:
    for value in ("1", "2"):
        body = config_map("applied", x=value)
        applied = api.patch(CONFIG_MAPS, namespace, "applied", body, kind="apply", field_manager="tester")
    assert applied["data"] == {"x": "2"}
    assert [entry["manager"] for entry in applied["metadata"]["managedFields"]] == ["tester"]


def test_the_status_is_written_apart_from_the_rest(api: Api, namespace: str) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "none"}]}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    api.create(JOBS, namespace, {**job, "spec": {"suspend": True, "template": template}})
    condition = {"type": "Seen", "status": "True"}
    body = {"status": {"conditions": [condition]}, "spec": {"suspend": False}}
    patched = api.patch(JOBS, namespace, "j", body, subresource="status")
    assert "Seen" in [one["type"] for one in patched["status"]["conditions"]]
    assert patched["spec"]["suspend"] is True
    assert counted("PATCH", "patch", "jobs/status", "200") >= 1
    api.delete(JOBS, namespace, "j")


def test_lists_come_in_pages_of_one_moment_with_the_kind_in_every_item(api: Api, namespace: str) -> None:
    for number in range(7):
        api.create(CONFIG_MAPS, namespace, {**config_map(f"c{number}"), "metadata": {"name": f"c{number}", "labels": {"mine": "yes"}}})  # fmt: skip
    pages = list(api.list_pages(CONFIG_MAPS, namespace, label_selector="mine=yes", limit=3))
    assert [len(page["items"]) for page in pages] == [3, 3, 1]
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    items = api.list(CONFIG_MAPS, namespace, label_selector="mine=yes", limit=3)
    assert [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in items] == [
        ("v1", "ConfigMap", f"c{number}") for number in range(7)
    ]
    assert [one["metadata"]["name"] for one in api.list(CONFIG_MAPS, namespace, field_selector="metadata.name=c3")] == ["c3"]  # fmt: skip


def test_errors_are_told_apart(api: Api, namespace: str) -> None:
    made = api.create(CONFIG_MAPS, namespace, config_map("a"))
    with pytest.raises(AlreadyExists) as exists:
        api.create(CONFIG_MAPS, namespace, config_map("a"))
    assert not isinstance(exists.value, Conflict)
    api.patch(CONFIG_MAPS, namespace, "a", {"data": {"x": "1"}})
    with pytest.raises(Conflict):
        api.replace(CONFIG_MAPS, namespace, "a", made)
    with pytest.raises(Conflict):
        api.patch(CONFIG_MAPS, namespace, "a", {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}})
    with pytest.raises(Conflict):
        api.delete(CONFIG_MAPS, namespace, "a", uid="00000000-0000-0000-0000-000000000000")
    with pytest.raises(NotFound):
        api.delete(CONFIG_MAPS, namespace, "b")
    with pytest.raises(ApiError, match="RFC 1123") as invalid:
        api.create(CONFIG_MAPS, namespace, config_map("Not_a_Name"))
    assert (invalid.value.status, invalid.value.reason) == (422, "Invalid")


def test_what_rbac_forbids_is_said_in_the_servers_words(control_plane: ControlPlane, namespace: str) -> None:
    nobody = Api.connect(control_plane.kubeconfig_for("nobody-in-particular"), user_agent="test")
    with pytest.raises(ApiError, match='User "nobody-in-particular" cannot list resource "configmaps"') as forbidden:
        nobody.list(CONFIG_MAPS, namespace)
    assert (forbidden.value.status, forbidden.value.reason) == (403, "Forbidden")
    nobody.close()


def test_a_service_account_token_is_sent(control_plane: ControlPlane, namespace: str) -> None:
    client = Api.connect(control_plane.kubeconfig_for_service_account(namespace, "default"), user_agent="test")
    with pytest.raises(ApiError, match=f"system:serviceaccount:{namespace}:default"):
        client.list(CONFIG_MAPS, namespace)
    client.close()


def test_the_server_sees_who_calls(control_plane: ControlPlane, namespace: str) -> None:
    started = time.time()
    client = Api.connect(control_plane.kubeconfig, user_agent="kubepeft-operator/9.9")
    client.list(CONFIG_MAPS, namespace)
    client.close()
    deadline = time.monotonic() + 10
    while not (calls := control_plane.api_calls(user_agent="kubepeft-operator/9.9", since=started - 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [call["verb"] for call in calls] == ["list"]


def test_a_watch_tells_what_happens_after_a_moment(api: Api, namespace: str) -> None:
    api.create(CONFIG_MAPS, namespace, config_map("before"))
    moment = next(iter(api.list_pages(CONFIG_MAPS, namespace)))["metadata"]["resourceVersion"]
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1" * 200_000))
    api.patch(CONFIG_MAPS, namespace, "a", {"data": {"x": "ü"}})
    api.delete(CONFIG_MAPS, namespace, "a")
    with api.watch(CONFIG_MAPS, namespace, resource_version=moment, timeout_seconds=1) as watch:
        events = list(watch)
    seen = [(event["type"], event["object"]["metadata"].get("name")) for event in events if event["type"] != "BOOKMARK"]
    assert seen == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
    assert events[0]["object"]["kind"] == "ConfigMap"


def test_a_write_without_the_lease_is_not_sent_and_reading_goes_on(proxy: ApiProxy, namespace: str) -> None:
    leading = True
    client = Api.connect(proxy.kubeconfig, user_agent="test", guard=lambda: leading)
    client.create(CONFIG_MAPS, namespace, config_map("a"))
    leading = False
    sent = len(proxy.requests)
    for write in (
        lambda: client.create(CONFIG_MAPS, namespace, config_map("b")),
        lambda: client.patch(CONFIG_MAPS, namespace, "a", {}),
        lambda: client.replace(CONFIG_MAPS, namespace, "a", config_map("a")),
        lambda: client.delete(CONFIG_MAPS, namespace, "a"),
    ):
        with pytest.raises(NotLeading):
            write()
    assert len(proxy.requests) == sent
    assert client.get(CONFIG_MAPS, namespace, "a")["metadata"]["name"] == "a"
    client.close()


@pytest.mark.parametrize(
    ("answer", "reason", "retry_after"),
    [
        (Answer(429, (("Retry-After", "7"),)), "TooManyRequests", 7.0),
        (Answer(503, (("Retry-After", "1"),), b"apiserver is shutting down\n"), "Unknown", 1.0),
        (Answer(500, body=b'{"reason":"InternalError","message":"etcdserver: leader changed"}'), "InternalError", None),
        (Answer(502, body=b"<html>bad gateway</html>"), "Unknown", None),
        (Answer(504, body=b'{"reason":"Timeout","details":{"retryAfterSeconds":3}}'), "Timeout", 3.0),
    ],
)
def test_an_answer_that_is_no_success_is_an_error_with_what_the_server_asked(
    proxy: ApiProxy, proxied: Api, namespace: str, answer: Answer, reason: str, retry_after: float | None
) -> None:
    proxy.rule = lambda request: answer
    before = counted("GET", "get", "configmaps", str(answer.status))
    with pytest.raises(ApiError) as error:
        proxied.get(CONFIG_MAPS, namespace, "a")
    assert (error.value.status, error.value.reason, error.value.retry_after) == (answer.status, reason, retry_after)
    assert len(proxy.requests) == 1  # nothing is tried again behind the caller's back
    assert counted("GET", "get", "configmaps", str(answer.status)) == before + 1


def test_a_server_that_is_not_there_is_unreachable_at_once(proxy: ApiProxy, proxied: Api, namespace: str) -> None:
    proxy.refuse()
    before = counted("GET", "get", "configmaps", "<error>")
    started = time.monotonic()
    with pytest.raises(ApiError, match="refused") as error:
        proxied.get(CONFIG_MAPS, namespace, "a")
    assert (error.value.status, error.value.reason) == (0, "Unreachable")
    assert time.monotonic() - started < 1
    assert counted("GET", "get", "configmaps", "<error>") == before + 1


def test_a_server_that_says_nothing_is_given_up(proxy: ApiProxy, proxied: Api, namespace: str) -> None:
    proxy.silence()
    started = time.monotonic()
    with pytest.raises(ApiError, match="timed out"):
        proxied.get(CONFIG_MAPS, namespace, "a")
    assert 1.9 < time.monotonic() - started < 4


def test_a_write_whose_answer_is_lost_has_happened(proxy: ApiProxy, proxied: Api, api: Api, namespace: str) -> None:
    def lose(request: Request) -> Answer | None:
        return Answer(forwarded=True, cut=True) if request.method == "POST" else None

    proxy.rule = lose
    with pytest.raises(ApiError) as error:
        proxied.create(CONFIG_MAPS, namespace, config_map("a"))
    assert error.value.reason == "Unreachable"
    assert api.get(CONFIG_MAPS, namespace, "a")
    assert len(proxy.requests) == 1


def test_connections_are_kept_and_shared_by_threads(
    proxy: ApiProxy, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = Api.connect(proxy.kubeconfig, user_agent="test", connections=4)
    with caplog.at_level(logging.DEBUG), concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: client.list(CONFIG_MAPS, namespace), range(60)))
    client.close()
    opened = [record for record in caplog.records if "Starting new HTTP connection" in record.getMessage()]
    assert len(proxy.requests) == 60
    assert 1 <= len(opened) <= 4
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # none was thrown away
