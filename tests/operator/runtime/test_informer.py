"""The cache follows the real API server, whatever happens to it and to the way there."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from kubepeft_operator.runtime.api import Api, Object
from kubepeft_operator.runtime.cache import Cache
from kubepeft_operator.runtime.informer import Informer
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import Answer, ApiProxy, Request
from tests.operator.runtime.parts import CONFIG_MAPS, config_map, eventually, proxy_to


class Follower(Informer):
    """Of ConfigMaps. `seen` holds what handlers were told: the name, and what data.x was and is."""

    def __init__(self, api: Api, namespace: str, cache: Cache, **options: Any) -> None:
        super().__init__(api, CONFIG_MAPS, cache, namespace=namespace, **{"longest_delay": 1, **options})
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.add_handler(lambda old, new: self.seen.append(_told(old, new)))


Follow = Callable[..., Follower]


@pytest.fixture
def follow() -> Iterator[Follow]:
    """Starts followers and stops them at the end."""
    running: list[Follower] = []

    def start(api: Api, namespace: str, cache: Cache | None = None, *, wait: bool = True, **options: Any) -> Follower:
        informer = Follower(api, namespace, Cache() if cache is None else cache, **options)
        running.append(informer)
        informer.start()
        if wait:
            assert informer.wait_synced(20)
        return informer

    yield start
    for informer in running:
        informer.stop()


def _told(old: Object | None, new: Object | None) -> tuple[str, str | None, str | None]:
    was, now = ((obj.get("data") or {}).get("x") if obj else None for obj in (old, new))
    return (old or new or {})["metadata"]["name"], was, now


def value(informer: Informer, namespace: str, name: str) -> str | None:
    return ((informer.cache.get(namespace, name) or {}).get("data") or {}).get("x")


def calls() -> float:
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "rest_client_requests"
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["resource"] == "configmaps"
    )


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


def test_what_is_there_is_listed_in_pages_and_what_happens_then_is_told(
    api: Api, namespace: str, follow: Follow
) -> None:
    for number in range(5):
        api.create(CONFIG_MAPS, namespace, config_map(f"c{number}", x="0"))
    informer = follow(api, namespace, page=2)
    listed = [one for one in informer.seen if one[0] != "kube-root-ca.crt"]  # which every namespace gets
    assert sorted(listed) == [(f"c{number}", None, "0") for number in range(5)]
    informer.seen.clear()
    api.create(CONFIG_MAPS, namespace, config_map("new", x="1"))
    api.patch(CONFIG_MAPS, namespace, "new", {"data": {"x": "2"}})
    api.delete(CONFIG_MAPS, namespace, "c0")
    eventually(lambda: len(informer.seen) == 3)
    assert informer.seen == [("new", None, "1"), ("new", "1", "2"), ("c0", "0", None)]
    assert value(informer, namespace, "new") == "2"
    assert informer.cache.get(namespace, "c0") is None
    assert informer.problem() is None


def test_a_change_of_what_is_trimmed_away_is_not_told(api: Api, namespace: str, follow: Follow) -> None:
    def trim(obj: Object) -> Object:
        return {"metadata": {key: obj["metadata"][key] for key in ("name", "namespace")}, "data": obj.get("data")}

    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    informer = follow(api, namespace, trim=trim)
    informer.seen.clear()
    api.patch(CONFIG_MAPS, namespace, "a", {"metadata": {"labels": {"l": "1"}}})
    api.patch(CONFIG_MAPS, namespace, "a", {"data": {"x": "2"}})
    eventually(lambda: informer.seen)
    assert informer.seen == [("a", "1", "2")]
    assert set((informer.cache.get(namespace, "a") or {})["metadata"]) == {"name", "namespace"}


def test_an_object_deleted_and_made_again_is_told_as_both(api: Api, namespace: str, follow: Follow) -> None:
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    informer = follow(api, namespace)
    informer.seen.clear()
    api.delete(CONFIG_MAPS, namespace, "a")
    api.create(CONFIG_MAPS, namespace, config_map("a", x="2"))
    eventually(lambda: len(informer.seen) == 2)
    assert informer.seen == [("a", "1", None), ("a", None, "2")]


def test_informers_of_several_namespaces_share_a_cache_and_leave_each_others_objects(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, control_plane: ControlPlane, follow: Follow
) -> None:
    other = f"{namespace}-other"
    control_plane.kubectl("create", "namespace", other)
    cache = Cache()
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    api.create(CONFIG_MAPS, other, config_map("a", x="2"))
    follow(api, other, cache)
    first = follow(proxied, namespace, cache)
    assert (value(first, namespace, "a"), value(first, other, "a")) == ("1", "2")
    control_plane.kubectl("delete", "namespace", other, "--wait=false")


def test_a_watch_that_the_server_ends_goes_on_without_a_list(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow
) -> None:
    informer = follow(proxied, namespace, watch_seconds=1)
    eventually(lambda: sum(request.watches for request in proxy.requests) >= 3)
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    eventually(lambda: value(informer, namespace, "a") == "1")
    assert sum(not request.watches for request in proxy.requests) == 1


def test_a_silently_cut_watch_is_noticed_and_what_happened_meanwhile_is_told(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow
) -> None:
    api.create(CONFIG_MAPS, namespace, config_map("gone", x="1"))
    informer = follow(proxied, namespace, read_timeout=1.5)
    proxy.silence_open()
    api.create(CONFIG_MAPS, namespace, config_map("new", x="1"))
    api.delete(CONFIG_MAPS, namespace, "gone")
    took = eventually(lambda: value(informer, namespace, "new") and not value(informer, namespace, "gone"), 5)
    assert took > 0.5, "the watch was not cut"
    assert sum(not request.watches for request in proxy.requests) == 1


def test_a_cut_connection_goes_on_where_it_was_and_nothing_goes_back_in_time(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    informer = follow(proxied, namespace)
    eventually(lambda: informer.cache.get(namespace, "kube-root-ca.crt"))  # which every namespace gets
    informer.seen.clear()
    api.create(CONFIG_MAPS, namespace, config_map("a", x="0"))
    for number in range(1, 5):
        eventually(lambda now=str(number - 1): value(informer, namespace, "a") == now, 5)
        proxy.cut()
        api.patch(CONFIG_MAPS, namespace, "a", {"data": {"x": str(number)}})
    eventually(lambda: value(informer, namespace, "a") == "4", 5)
    assert informer.seen == [("a", None, "0"), *(("a", str(was), str(was + 1)) for was in range(4))]
    assert sum(not request.watches for request in proxy.requests) == 1
    assert not tracebacks(caplog)


def test_refused_connections_are_tried_ever_more_seldom_and_the_cache_stays(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    informer = follow(proxied, namespace, first_delay=0.1, longest_delay=2)
    before = calls()
    proxy.refuse()
    time.sleep(3)
    tried = calls() - before
    assert 3 <= tried <= 9, f"{tried:.0f} calls in 3 s"  # 0.05…0.1 + 0.1…0.2 + 0.2…0.4 + 0.4…0.8 + 0.8…1.6 + 1…2
    assert value(informer, namespace, "a") == "1"
    assert informer.problem(silent_for=2) == f"configmaps: no sign of the API server for {time.monotonic() - (informer.last_contact or 0):.0f} s"  # fmt: skip
    api.create(CONFIG_MAPS, namespace, config_map("b", x="1"))
    proxy.accept()
    eventually(lambda: value(informer, namespace, "b") == "1", 4)
    assert informer.problem(silent_for=2) is None
    assert not tracebacks(caplog)


def test_an_api_server_that_is_not_there_at_the_start_is_waited_for(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow
) -> None:
    proxy.refuse()
    informer = follow(proxied, namespace, wait=False)
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    assert not informer.wait_synced(1)
    proxy.accept()
    assert informer.wait_synced(4)
    assert value(informer, namespace, "a") == "1"


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_errors_for_a_while_are_tried_again_without_haste(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow, status: int
) -> None:
    informer = follow(proxied, namespace, first_delay=0.1)
    eventually(lambda: len(proxy.requests) == 2)  # the list and the watch
    proxy.rule = lambda request: Answer(status)
    proxy.cut()
    time.sleep(1.5)
    assert 3 <= len(proxy.requests) - 2 <= 8
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    proxy.rule = lambda request: None
    eventually(lambda: value(informer, namespace, "a") == "1", 3)


def test_a_list_waits_as_long_as_the_server_asked(
    proxy: ApiProxy, proxied: Api, namespace: str, follow: Follow
) -> None:
    refused: list[Request] = []

    def rule(request: Request) -> Answer | None:
        if refused:
            return None
        refused.append(request)
        return Answer(429, (("Retry-After", "1"),))

    proxy.rule = rule
    follow(proxied, namespace, first_delay=0.01)
    assert proxy.requests[1].at - proxy.requests[0].at >= 1


def test_watches_that_end_at_once_make_no_hot_loop(
    proxy: ApiProxy, proxied: Api, namespace: str, follow: Follow
) -> None:
    proxy.rule = lambda request: Answer(200) if request.watches else None
    follow(proxied, namespace, first_delay=0.1)
    before = len(proxy.requests)
    time.sleep(1.5)
    assert 2 <= len(proxy.requests) - before <= 8


def test_an_answer_that_is_no_json_is_tried_again(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    informer = follow(proxied, namespace, first_delay=0.05)
    eventually(lambda: len(proxy.requests) == 2)  # the list and the watch
    proxy.rule = lambda request: Answer(200, body=b"<html>a captive portal</html>\n")
    proxy.cut()
    time.sleep(0.5)
    assert len(proxy.requests) > 3
    proxy.rule = lambda request: None
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    eventually(lambda: value(informer, namespace, "a") == "1", 4)
    assert not tracebacks(caplog)


def test_stopping_ends_an_open_watch_at_once_and_quietly(
    proxied: Api, namespace: str, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    informer = follow(proxied, namespace)
    time.sleep(0.2)
    started = time.monotonic()
    informer.stop()
    assert time.monotonic() - started < 0.5
    assert not [thread for thread in threading.enumerate() if thread.name == "informer-configmaps"]
    assert not caplog.records


def test_a_handler_with_a_defect_is_survived(
    api: Api, namespace: str, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    informer = follow(api, namespace, first_delay=0.05)
    failures: list[int] = []

    def defect(old: Object | None, new: Object | None) -> None:
        if len(failures) < 2 and new and new["metadata"]["name"] == "a":
            failures.append(1)
            raise KeyError("spec")

    informer.add_handler(defect)
    api.create(CONFIG_MAPS, namespace, config_map("a", x="1"))
    api.create(CONFIG_MAPS, namespace, config_map("b", x="1"))
    eventually(lambda: value(informer, namespace, "b") == "1", 5)
    assert tracebacks(caplog)


def test_a_restarted_api_server_is_followed_and_a_forgotten_moment_listed_again(
    new_control_plane: Callable[..., ControlPlane], follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane = new_control_plane()
    api = Api.connect(control_plane.kubeconfig, user_agent="test")
    with proxy_to(control_plane) as proxy:
        straight = follow(api, "default", read_timeout=5)
        kept = follow(Api.connect(proxy.kubeconfig, user_agent="test"), "default")
        api.create(CONFIG_MAPS, "default", config_map("deleted", x="1"))
        eventually(lambda: value(kept, "default", "deleted") == "1")
        proxy.refuse()
        api.delete(CONFIG_MAPS, "default", "deleted")
        api.create(CONFIG_MAPS, "default", config_map("made", x="1"))
        before = calls()
        control_plane.restart_api_server(signal.SIGKILL)  # its watch cache begins anew, after what `kept` has seen
        api.create(CONFIG_MAPS, "default", config_map("after", x="1"))
        eventually(lambda: value(straight, "default", "after") == "1", 20)
        proxy.accept()
        eventually(lambda: value(kept, "default", "deleted") is None, 20)  # the last thing that a list does
        assert (value(kept, "default", "after"), value(kept, "default", "made")) == ("1", "1")
        assert ("deleted", "1", None) in kept.seen
        assert sum(not request.watches for request in proxy.requests) == 2, "it was not listed again"
        assert calls() - before < 60
        assert not tracebacks(caplog)
        kept.stop()
        straight.stop()
