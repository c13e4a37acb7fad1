"""What becomes of a key after each way a reconcile can end."""

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import REGISTRY

from kubepeft_operator.runtime.api import ApiError, Conflict, NotLeading
from kubepeft_operator.runtime.controller import Controller
from kubepeft_operator.runtime.queue import Queue
from tests.operator.runtime.parts import eventually

Reconcile = Callable[[str], float | None]
Run = Callable[[Reconcile], Controller[str]]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    running: list[Controller[str]] = []

    def start(reconcile: Reconcile) -> Controller[str]:
        name = request.node.name
        controller = Controller(name, reconcile, 2, Queue(name, first_delay=0.01))
        running.append(controller)
        controller.start()
        return controller

    yield start
    for controller in running:
        assert controller.stop(5)


def results(controller: Controller[str], result: str) -> float:
    labels = {"controller": controller.name, "result": result}
    return REGISTRY.get_sample_value("controller_runtime_reconcile_total", labels) or 0


class Script:
    """A reconcile whose calls end one after another as `endings` say; then it wants nothing more."""

    def __init__(self, *endings: float | Exception) -> None:
        self.endings = list(endings)
        self.times: list[float] = []

    def __call__(self, key: str) -> float | None:
        self.times.append(time.monotonic())
        if not self.endings:
            return None
        ending = self.endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        return ending


def test_a_key_that_wants_nothing_more_is_left_alone(run: Run) -> None:
    script = Script()
    controller = run(script)
    controller.queue.add("a")
    eventually(lambda: results(controller, "success") == 1)
    time.sleep(0.05)
    assert len(script.times) == 1


def test_a_key_comes_again_after_the_seconds_it_asked_for(run: Run) -> None:
    script = Script(0.1)
    controller = run(script)
    controller.queue.add("a")
    eventually(lambda: results(controller, "success") == 1)
    assert results(controller, "requeue_after") == 1
    assert script.times[1] - script.times[0] >= 0.1


def test_a_conflict_comes_again_soon_and_is_not_an_error(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(Conflict(409, "Conflict", "the object has been modified"), NotLeading(0, "NotLeading", "not sent"))
    controller = run(script)
    with caplog.at_level(logging.INFO):
        controller.queue.add("a")
        eventually(lambda: results(controller, "success") == 1)
    assert results(controller, "requeue") == 2
    assert results(controller, "error") == 0
    assert not caplog.records


def test_a_refused_call_waits_as_long_as_the_server_asked_and_says_so_in_a_line(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(ApiError(429, "TooManyRequests", "slow down", retry_after=0.3))
    controller = run(script)
    controller.queue.add("a")
    eventually(lambda: results(controller, "success") == 1)
    assert script.times[1] - script.times[0] >= 0.3
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert "slow down" in record.getMessage()


def test_while_one_key_waits_for_the_server_the_workers_go_on_with_others(run: Run) -> None:
    seen: list[str] = []

    def reconcile(key: str) -> None:
        seen.append(key)
        if key.startswith("refused"):
            raise ApiError(429, "TooManyRequests", "slow down", retry_after=60)

    controller = run(reconcile)
    for number in range(10):
        controller.queue.add(f"refused-{number}")
    controller.queue.add("fine")
    eventually(lambda: "fine" in seen, timeout=2)


def test_a_defect_keeps_its_traceback_and_its_worker_and_comes_again(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(*(KeyError("spec") for _ in range(5)))
    controller = run(script)
    controller.queue.add("a")
    eventually(lambda: results(controller, "success") == 1)
    assert [record.exc_info is not None for record in caplog.records] == [True] * 5
    errors = REGISTRY.get_sample_value("controller_runtime_reconcile_errors_total", {"controller": controller.name})
    assert errors == 5
    assert controller.problem() is None


def test_success_makes_the_delays_small_again(run: Run) -> None:
    script = Script(*(ValueError() for _ in range(4)), 0.001, ValueError())
    controller = run(script)
    controller.queue.add("a")
    eventually(lambda: results(controller, "success") == 1)
    assert script.times[4] - script.times[3] > 0.03
    assert script.times[6] - script.times[5] < 0.03


def test_a_worker_that_has_been_at_one_object_for_too_long_is_a_problem(run: Run) -> None:
    free = threading.Event()

    def reconcile(key: str) -> None:
        free.wait(10)

    controller = run(reconcile)
    controller.queue.add("a")
    eventually(lambda: controller.problem(stuck_after=0.05) is not None)
    assert controller.problem() is None
    free.set()
    eventually(lambda: controller.problem(stuck_after=0.05) is None)


def test_stopping_waits_for_what_is_in_hand_and_takes_nothing_more(run: Run) -> None:
    started, finished = threading.Event(), []

    def reconcile(key: str) -> None:
        started.set()
        time.sleep(0.1)
        finished.append(key)

    controller = run(reconcile)
    controller.queue.add("a")
    assert started.wait(2)
    for number in range(10):
        controller.queue.add(f"more-{number}")
    assert controller.stop(5)
    assert "a" in finished
    assert len(finished) <= 3  # what the two workers had when it was said
