"""A FineTune's life while things break, on a real API server: always the same end, nothing twice, nothing left behind, no busy loop."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kubepeft_operator.reconcile import FINE_TUNES
from kubepeft_operator.runtime.api import JOBS, PODS, Object
from tests.cluster.control_plane import SCALE, ControlPlane
from tests.operator.conftest import played
from tests.operator.faults import Answer, ApiProxy, Request
from tests.operator.harness import WRITES, Cluster, Operator, always, eventually, operator, writes
from tests.operator.player import Play, Player, stage_of
from tests.operator.world import FINE_TUNE, INFERENCE, changed

Run = Callable[..., Operator]
WHOLE = changed(FINE_TUNE, **INFERENCE)
ALONE = {"leaderElection": {"enabled": False}}


def refusal(status: int, reason: str, *, retry_after: int | None = None) -> Answer:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": status,
        "message": reason,
    }
    headers = (("Content-Type", "application/json"), *((("Retry-After", str(retry_after)),) if retry_after else ()))
    return Answer(status, headers, json.dumps(body).encode())


def is_write(request: Request) -> bool:
    return request.method in WRITES and "/leases" not in request.path


def check_whole(cluster: Cluster, player: Player, name: str = "support-bot") -> None:
    """It has ended well, with one Job a stage, one pod a Job, and nothing that belongs to nobody."""
    status = cluster.status(name)
    assert status["phase"] == "Succeeded", status
    assert status["adapter"]["digest"] == "a" * 64
    assert status["inference"]["completed"] == 7
    mine = [job for job in cluster.jobs() if job["metadata"]["labels"]["app.kubernetes.io/instance"] == name]
    assert sorted(job["metadata"]["labels"]["kubepeft.io/stage"] for job in mine) == ["infer", "prepare", "train"]
    owners = {cluster.fine_tune(name)["metadata"]["uid"], cluster.inference(name)["metadata"]["uid"]}
    assert {job["metadata"]["ownerReferences"][0]["uid"] for job in mine} == owners
    ran = [stage_of(pod) for pod in player.started if pod["metadata"]["labels"]["app.kubernetes.io/instance"] == name]
    assert ran == ["prepare", "train", "infer"], "a stage ran twice"


def test_killed_before_the_kth_write_for_every_k_it_comes_to_the_same_end(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    """Each state that a crash can leave lies before some write: everything up to there is done, and nothing after it."""
    running = run_operator(**ALONE)
    count = 0

    def dies_at(name: str, kth: int) -> Callable[[Request], Answer | None]:
        seen = 0

        def rule(request: Request) -> Answer | None:
            nonlocal seen
            if (
                is_write(request)
                and "/events" not in request.path
                and name.encode() in request.target.encode() + request.body
            ):
                seen += 1
                if seen == kth:
                    running.kill()
                    return Answer(cut=True)
            return None

        return rule

    for kth in range(1, 30):
        name = f"life-{kth:02d}"
        proxy.rule = dies_at(name, kth)
        cluster.create(WHOLE, name)
        eventually(
            lambda: not running.process.is_alive() or cluster.phase(name) == "Succeeded",  # noqa: B023
            what=lambda: cluster.status(name),  # noqa: B023
        )
        if running.process.is_alive():
            break
        running = run_operator(**ALONE)
        eventually(lambda: cluster.phase(name) == "Succeeded", what=lambda: cluster.status(name))  # noqa: B023
        check_whole(cluster, player, name)
        count += 1
    assert count == 10, "a life has ten writes beside its events"


def test_a_write_whose_answer_is_lost_is_not_done_twice(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    lost: set[tuple[str, str]] = set()

    def rule(request: Request) -> Answer | None:
        if is_write(request) and "/events" not in request.path and (request.method, request.path) not in lost:
            lost.add((request.method, request.path))
            return Answer(forwarded=True, cut=True)
        return None

    proxy.rule = rule
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", 30, cluster.status)
    assert len(lost) >= 4
    check_whole(cluster, player)


REFUSALS: dict[str, Callable[[Request], Answer]] = {
    "409 on every write": lambda request: refusal(409, "AlreadyExists" if request.method == "POST" else "Conflict"),
    "429 with Retry-After on every write": lambda request: refusal(429, "TooManyRequests", retry_after=1),
    "500 on every write": lambda request: refusal(500, "InternalError"),
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
def test_every_write_is_refused_once(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run, answer: Callable[[Request], Answer]
) -> None:
    refused: dict[bytes, float] = {}
    again: dict[bytes, float] = {}

    def rule(request: Request) -> Answer | None:
        if not is_write(request):
            return None
        status = json.loads(request.body).get("status", {}) if request.method == "PUT" else {}
        key = f"{request.method} {request.path} {status.get('phase')}".encode()
        if key in refused:
            again.setdefault(key, request.at)
            return None
        refused[key] = request.at
        return answer(request)

    proxy.rule = rule
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)
    check_whole(cluster, player)
    assert len(refused) >= 9
    if answer is REFUSALS["429 with Retry-After on every write"]:
        assert all(again[key] - refused[key] >= 0.99 for key in again), "earlier than the server asked"
    assert len(writes(proxy)) <= 40, "a busy loop"


def test_thirty_seconds_of_500s_are_outlived_without_haste(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "train")
    proxy.cut()
    proxy.rule = lambda request: refusal(500, "InternalError")
    before = len(proxy.requests)
    player.script = lambda pod: Play()
    cluster.api.delete(PODS, cluster.namespace, player.started[-1]["metadata"]["name"])
    time.sleep(30)
    assert len(proxy.requests) - before < 100
    proxy.rule = lambda request: None
    eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)


def test_watches_that_are_too_old_begin_again(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    gone: set[str] = set()

    def rule(request: Request) -> Answer | None:
        if request.watches and request.path not in gone:
            gone.add(request.path)
            return refusal(410, "Expired")
        return None

    proxy.rule = rule
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)
    assert len(gone) == 4
    check_whole(cluster, player)


def test_the_api_server_is_restarted_in_the_middle(
    control_plane: ControlPlane, cluster: Cluster, player: Player, run_operator: Run
) -> None:
    player.script = lambda pod: Play(runs=4.0)
    run_operator()
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "train", 30)
    control_plane.restart_api_server(signal.SIGKILL)
    operator = run_operator()  # the first may have lost its lease meanwhile, as it should
    eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)
    check_whole(cluster, player)
    assert operator.defects() == []


@pytest.mark.parametrize("seconds", [-120, 120], ids=["two minutes slow", "two minutes fast"])
def test_a_wrong_clock_changes_nothing_but_times(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run, seconds: float
) -> None:
    run_operator(clock_offset=seconds)
    cluster.create(changed(WHOLE, activeDeadlineSeconds=3600))
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)
    check_whole(cluster, player)
    assert len(writes(proxy)) <= 14


def test_a_leader_that_was_paused_wakes_up_and_writes_nothing(
    control_plane: ControlPlane, cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run, tmp_path: Path
) -> None:
    certificate, key = control_plane.authority.issue("second", "second", groups=["system:masters"])
    with ApiProxy(control_plane.url, control_plane.ca, certificate, key, control_plane.folder) as other:
        player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
        leader = run_operator()
        cluster.create(WHOLE)
        eventually(lambda: player.started and stage_of(player.started[-1]) == "train")
        second = Operator(other.kubeconfig, cluster.namespace, tmp_path)
        try:
            always(lambda: writes(other) == [], 1)
            leader.signal(signal.SIGSTOP)
            paused = time.monotonic()
            eventually(lambda: second.said("acting"), 20)
            assert time.monotonic() - paused < 20
            player.script = lambda pod: Play()
            cluster.api.delete(PODS, cluster.namespace, player.started[-1]["metadata"]["name"])
            before = len(writes(proxy))
            eventually(lambda: cluster.phase() == "Succeeded", 40, cluster.status)
            leader.signal(signal.SIGCONT)
            leader.process.join(10)
            assert leader.process.exitcode == 1
            assert len(writes(proxy)) == before, "one that has lost its lease wrote"
        finally:
            second.kill()
        assert second.defects() == []


def test_sigterm_hands_over_at_once(cluster: Cluster, player: Player, run_operator: Run) -> None:
    first = run_operator()
    eventually(lambda: first.said("acting"))
    second = run_operator()
    eventually(lambda: second.said("started"))
    assert first.stop() == 0
    stopped = time.monotonic()
    eventually(lambda: second.said("acting"))
    assert time.monotonic() - stopped < 2
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)
    check_whole(cluster, player)


def test_edits_by_hand_change_nothing_in_the_end(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "train")
    train = next(job for job in cluster.jobs() if job["metadata"]["labels"]["kubepeft.io/stage"] == "train")
    name = train["metadata"]["name"]
    nonsense: Object = {"phase": "Succeeded", "specDigest": None, "prepared": None, "conditions": None}
    cluster.api.patch(FINE_TUNES, cluster.namespace, "support-bot", {"status": nonsense}, subresource="status")
    eventually(lambda: cluster.phase() == "Training" and "prepared" in cluster.status(), what=cluster.status)
    cluster.api.patch(JOBS, cluster.namespace, name, {"spec": {"suspend": True}})
    eventually(lambda: not cluster.api.get(JOBS, cluster.namespace, name)["spec"]["suspend"])
    player.script = lambda pod: Play()
    cluster.api.patch(JOBS, cluster.namespace, name, {"metadata": {"labels": {"kubepeft.io/fine-tune": "another"}}})
    eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)


def test_a_job_deleted_by_hand_is_made_again_and_the_run_goes_on(
    cluster: Cluster, player: Player, run_operator: Run
) -> None:
    player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
    run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "train")
    player.script = lambda pod: Play()
    train = next(job for job in cluster.jobs() if job["metadata"]["labels"]["kubepeft.io/stage"] == "train")
    cluster.api.delete(JOBS, cluster.namespace, train["metadata"]["name"])
    eventually(lambda: cluster.phase() == "Succeeded", 30, cluster.status)
    assert [stage_of(pod) for pod in player.started] == ["prepare", "train", "train", "infer"]


def test_an_outcome_that_went_with_its_pod_is_found_again(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = lambda pod: Play(runs=1.5) if stage_of(pod) == "train" else Play()
    running = run_operator(**ALONE)
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "train")
    running.kill()
    train = next(job for job in cluster.jobs() if job["metadata"]["labels"]["kubepeft.io/stage"] == "train")
    name = train["metadata"]["name"]
    eventually(lambda: cluster.api.get(JOBS, cluster.namespace, name)["status"].get("succeeded"))
    cluster.api.delete(PODS, cluster.namespace, player.started[-1]["metadata"]["name"])
    eventually(lambda: len(cluster.pods()) == 1)
    run_operator(**ALONE)
    eventually(lambda: cluster.phase() == "Succeeded", 30, cluster.status)
    assert [stage_of(pod) for pod in player.started] == ["prepare", "train", "train", "infer"]
    assert "OutcomeLost" in [one.get("reason") for one in cluster.status()["attempts"]]


def test_watches_that_lag_behind_make_nothing_twice_and_no_ended_object_change(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    proxy.lag_watches(7)  # longer than the operator waits for its own writes to come back
    run_operator(**ALONE)
    cluster.create(changed(WHOLE, ttlSecondsAfterFinished=1))
    eventually(lambda: cluster.phase() == "Succeeded", 120, cluster.status)
    version = cluster.fine_tune()["metadata"]["resourceVersion"]
    ran = [stage_of(pod) for pod in player.started]
    assert ran == ["prepare", "train", "infer"]
    eventually(lambda: cluster.jobs() == [], 40)
    always(lambda: cluster.jobs() == [], 8)
    assert cluster.fine_tune()["metadata"]["resourceVersion"] == version
    assert len(writes(proxy)) <= 40, [f"{one.method} {one.path}" for one in writes(proxy)]


def test_two_hundred_objects_made_while_it_was_down_all_come_to_their_end(
    new_control_plane: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    plane = new_control_plane(arguments=SCALE)  # the controllers' own limits would be what takes the time
    with played(plane) as (admin, player):
        cluster = Cluster(admin, "default")
        names = [f"many-{number:03d}" for number in range(200)]
        for name in names:
            cluster.create(FINE_TUNE, name)
        with operator(plane.kubeconfig, "default", tmp_path, **ALONE):
            eventually(lambda: all(cluster.phase(name) == "Succeeded" for name in names), 300)
        assert len(cluster.jobs()) == 400
        assert len(player.started) == 400
