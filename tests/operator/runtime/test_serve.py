"""The health and metrics pages, over real HTTP."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from kubepeft_operator.runtime.queue import Queue
from kubepeft_operator.runtime.serve import HealthServer, MetricsServer


def read(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class State:
    informer: str | None = None
    synced: str | None = "pods are not listed yet"


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def port(state: State) -> Iterator[int]:
    server = HealthServer(0, healthy=[lambda: state.informer], ready=[lambda: state.synced], address="127.0.0.1")
    yield server.port
    server.stop()


def test_a_process_that_is_alive_is_healthy_before_it_is_ready(port: int, state: State) -> None:
    assert read(port, "/healthz") == (200, "ok\n")
    assert read(port, "/readyz") == (503, "pods are not listed yet\n")
    state.synced = None
    assert read(port, "/readyz?verbose") == (200, "ok\n")


def test_what_is_wrong_is_said_on_both_pages(port: int, state: State) -> None:
    state.informer = "jobs: no sign of the API server for 121 s"
    assert read(port, "/healthz") == (503, "jobs: no sign of the API server for 121 s\n")
    assert read(port, "/readyz") == (503, "jobs: no sign of the API server for 121 s\npods are not listed yet\n")


def test_other_paths_are_not_there(port: int) -> None:
    assert read(port, "/metrics")[0] == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_both_pages_are_there_for_ipv4_and_ipv6(host: str) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    health, metrics = HealthServer(0, healthy=[], ready=[]), MetricsServer(0)
    try:
        assert read(health.port, "/healthz", host)[0] == 200
        assert read(metrics.port, "/metrics", host)[0] == 200
    finally:
        health.stop()
        metrics.stop()


def test_metrics_are_served_where_prometheus_looks_for_them() -> None:
    queue: Queue[str] = Queue("served")
    queue.add("a")
    server = MetricsServer(0, "127.0.0.1")
    try:
        status, text = read(server.port, "/metrics")
    finally:
        server.stop()
    assert status == 200
    assert 'workqueue_depth{name="served"} 1.0' in text
    assert "process_resident_memory_bytes" in text
