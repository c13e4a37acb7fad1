"""The queue's promises: once, one worker at a time, later when asked, and delays that grow."""

import threading
import time

import pytest
from prometheus_client import REGISTRY

from kubepeft_operator.runtime.backoff import delay
from kubepeft_operator.runtime.queue import Queue


@pytest.mark.parametrize(
    ("failures", "spread", "seconds"),
    [
        (1, 0.0, 0.5),
        (1, 0.999999, 1.0),
        (2, 0.0, 1.0),
        (4, 0.5, 6.0),
        (7, 0.0, 15.0),  # 64 would be over the cap of 30
        (5000, 0.999999, 30.0),  # and no overflow
    ],
)
def test_delays_double_up_to_the_cap_and_are_spread_over_their_upper_half(
    failures: int, spread: float, seconds: float
) -> None:
    assert delay(failures, spread, base=1, cap=30) == pytest.approx(seconds, rel=1e-4)


def test_a_key_waits_once_however_often_it_is_added() -> None:
    queue: Queue[str] = Queue("once")
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert [queue.get(0), queue.get(0), queue.get(0)] == ["a", "b", None]


def test_a_key_is_with_one_worker_at_a_time_and_comes_again_when_added_meanwhile() -> None:
    queue: Queue[str] = Queue("one at a time")
    queue.add("a")
    assert queue.get(0) == "a"
    queue.add("a")
    queue.add("a")
    assert queue.get(0.02) is None
    queue.done("a")
    assert queue.get(0) == "a"
    queue.done("a")
    assert queue.get(0.02) is None


def test_a_later_key_comes_when_its_time_is_over_and_wakes_a_waiting_worker() -> None:
    queue: Queue[str] = Queue("later")
    threading.Timer(0.05, queue.add_after, ("a", 0.1)).start()
    started = time.monotonic()
    assert queue.get(5) == "a"
    assert 0.14 < time.monotonic() - started < 0.6


def test_of_several_times_for_a_key_the_earliest_holds() -> None:
    queue: Queue[str] = Queue("earliest")
    queue.add_after("a", 60)
    queue.add_after("a", 0.05)
    queue.add_after("a", 30)
    assert queue.get(2) == "a"
    queue.done("a")
    assert queue.get(0.1) is None


def test_a_key_that_is_given_out_is_expected_no_more_and_its_old_times_are_not_kept() -> None:
    queue: Queue[str] = Queue("superseded")
    for _ in range(1000):
        queue.add_after("a", 0.05)
        queue.add("a")
        assert queue.get(0) == "a"
        queue.done("a")
        queue.add_after("b", 3600)
    assert queue.get(0.1) is None
    assert len(queue._later) <= 200


def test_zero_seconds_later_is_now() -> None:
    queue: Queue[str] = Queue("now")
    queue.add_after("a", 0)
    assert queue.get(0) == "a"


def test_failing_keys_wait_longer_each_time_until_they_are_forgotten() -> None:
    queue: Queue[str] = Queue("failing", first_delay=0.02, longest_delay=10)

    def wait() -> float:
        started = time.monotonic()
        queue.add_rate_limited("a")
        assert queue.get(5) == "a"
        queue.done("a")
        return time.monotonic() - started

    waits = [wait() for _ in range(4)]
    assert waits[3] > 0.08  # at least half of 0.02 · 2³
    queue.forget("a")
    assert wait() < 0.06


def test_a_failing_key_waits_at_least_as_long_as_the_server_asked() -> None:
    queue: Queue[str] = Queue("asked", first_delay=0.001)
    started = time.monotonic()
    queue.add_rate_limited("a", at_least=0.2)
    assert queue.get(5) == "a"
    assert time.monotonic() - started >= 0.2


def test_shutting_down_wakes_every_waiting_worker_and_takes_nothing_in() -> None:
    queue: Queue[str] = Queue("shut")
    got: list[str | None] = []
    workers = [threading.Thread(target=lambda: got.append(queue.get())) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.shut_down()
    for worker in workers:
        worker.join(2)
    queue.add("a")
    queue.add_after("b", 0.01)
    assert got == [None, None, None]
    assert queue.get(0.05) is None


def test_many_workers_lose_no_key_and_never_share_one() -> None:
    queue: Queue[int] = Queue("many")
    held: set[int] = set()
    counts = dict.fromkeys(range(20), 0)
    lock = threading.Lock()

    def work() -> None:
        while (key := queue.get(0.5)) is not None:
            with lock:
                assert key not in held
                held.add(key)
                counts[key] += 1
            time.sleep(0.0005)
            with lock:
                held.remove(key)
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for round_ in range(20):
        for key in counts:
            queue.add(key) if round_ % 2 else queue.add_after(key, 0.001)
        time.sleep(0.002)
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)
    assert all(counts.values())
    assert len(queue) == 0


def test_the_metrics_have_the_names_of_client_go() -> None:
    queue: Queue[str] = Queue("measured")
    queue.add("a")
    queue.add("b")
    labels = {"name": "measured"}
    assert REGISTRY.get_sample_value("workqueue_depth", labels) == 2
    assert REGISTRY.get_sample_value("workqueue_adds_total", labels) == 2
    queue.get(0)
    time.sleep(0.02)
    assert (REGISTRY.get_sample_value("workqueue_longest_running_processor_seconds", labels) or 0) >= 0.02
    assert (REGISTRY.get_sample_value("workqueue_unfinished_work_seconds", labels) or 0) >= 0.02
    queue.done("a")
    assert REGISTRY.get_sample_value("workqueue_work_duration_seconds_count", labels) == 1
    assert REGISTRY.get_sample_value("workqueue_queue_duration_seconds_count", labels) == 1
    queue.add_rate_limited("a")
    assert REGISTRY.get_sample_value("workqueue_retries_total", labels) == 1
