"""FineTunes and BatchInferences on a real API server with real Job controllers and a real scheduler; only the kubelet is played."""

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

import pytest

from kubepeft.progress import FIGURES
from kubepeft_jobs.progress import Page
from kubepeft_operator.job import QUEUE_LABEL
from kubepeft_operator.reconcile import BATCH_INFERENCES, FINE_TUNES
from kubepeft_operator.runtime.api import JOBS, PODS, Api, ApiError, Object, Resource
from tests.operator.faults import ApiProxy
from tests.operator.harness import Cluster, Operator, always, eventually, writes
from tests.operator.player import Play, Player, index_of, stage_of, success
from tests.operator.world import BATCH_INFERENCE, FINE_TUNE, INFERENCE, changed, failure

Run = Callable[..., Operator]
WHOLE = changed(FINE_TUNE, **INFERENCE)
QUOTAS = Resource("", "v1", "resourcequotas", "ResourceQuota")


def holding(*stages: str) -> Callable[[Object], Play]:
    """Pods of these stages run until they are deleted; the others succeed."""
    return lambda pod: Play(runs=None) if stage_of(pod) in stages else Play()


def events_of(cluster: Cluster, kind: str = "FineTune") -> list[str]:
    events = cluster.api.list(Resource("events.k8s.io", "v1", "events", "Event"), cluster.namespace)
    return [event["reason"] for event in events if event["regarding"]["kind"] == kind]


def test_a_fine_tune_goes_to_its_predictions_in_twelve_writes_and_then_none(
    cluster: Cluster, proxy: ApiProxy, run_operator: Run
) -> None:
    run_operator()
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)
    output = "s3://adapters/support-bot/predictions/support-bot"
    assert cluster.status()["inference"] == {"total": 8, "completed": 7, "failed": 1, "output": output}
    assert [one["outcome"] for one in cluster.status()["attempts"]] == ["Succeeded", "Succeeded"]
    assert len(cluster.jobs()) == 3
    eventually(lambda: sorted(events_of(cluster)) == ["Succeeded", "Trained"])
    calls = [f"{one.method} {one.path}" for one in writes(proxy)]
    assert len(calls) <= 12, calls
    time.sleep(8)
    assert len(writes(proxy)) == len(calls), "an idle object is written to"


def test_the_columns_of_kubectl_show_how_it_goes(
    cluster: Cluster, player: Player, run_operator: Run, control_plane
) -> None:  # type: ignore[no-untyped-def]
    player.script = holding("train")
    run_operator()
    cluster.create(FINE_TUNE)
    eventually(lambda: cluster.phase() == "Training")
    header, row = control_plane.kubectl("get", "ft", "-n", cluster.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "ETA", "AGE"]
    assert row.split()[:5] == ["support-bot", "Training", "LORA", "hf://Qwen/Qwen2.5-0.5B-Instruct", "0%"]


# ── failures


def test_failures_and_disruptions(cluster: Cluster, player: Player, run_operator: Run) -> None:
    """All at once, because the Job controller waits ten seconds before it tries anything again."""

    def script(pod: Object) -> Play:
        name, stage = pod["metadata"]["labels"]["app.kubernetes.io/instance"], stage_of(pod)
        again = [one["metadata"]["labels"]["app.kubernetes.io/instance"] for one in player.started].count(name) > 1
        if (name, stage) == ("bad-data", "train"):
            return Play(code=65, message=failure("train", 65, "BadRow", "line 3"))
        if (name, stage) == ("busy-storage", "train"):
            return Play(code=75, message=failure("train", 75, "SlowDown", "503"))
        if (name, stage) == ("small-memory", "train"):
            return Play(code=137, message="", reason="OOMKilled")
        if (name, stage) == ("deleted-pod", "train") and not again:
            return Play(runs=None)
        if (name, stage) == ("bad-shard", "infer") and index_of(pod) == 2:
            return Play(code=1, message=failure("infer", 1, "InternalError", "ZeroDivisionError"))
        return Play()

    def tries(name: str, stage: str) -> list[Object]:
        labels = [(pod["metadata"]["labels"]["app.kubernetes.io/instance"], stage_of(pod)) for pod in player.started]
        return [pod for pod, label in zip(player.started, labels, strict=True) if label == (name, stage)]

    def ended(name: str) -> bool:
        return cluster.phase(name) in ("Failed", "Succeeded")

    player.script = script
    run_operator()
    for name in ("bad-data", "busy-storage", "small-memory"):
        cluster.create(changed(FINE_TUNE, backoffLimit=1), name)
    cluster.create(changed(FINE_TUNE, backoffLimit=0), "deleted-pod")
    four_shards = {"inference": {**INFERENCE["inference"], "shards": 4}, "backoffLimit": 1}
    cluster.create(changed(FINE_TUNE, **four_shards), "bad-shard")

    eventually(lambda: tries("deleted-pod", "train"))
    cluster.api.delete(PODS, cluster.namespace, tries("deleted-pod", "train")[0]["metadata"]["name"])
    names = ("bad-data", "busy-storage", "small-memory", "deleted-pod", "bad-shard")
    eventually(lambda: all(ended(name) for name in names), 60)

    reasons = {name: cluster.reason("Failed", name) for name in names}
    assert reasons == {
        "bad-data": "BadRow",
        "busy-storage": "SlowDown",
        "small-memory": "OOMKilled",
        "deleted-pod": "",
        "bad-shard": "InternalError",
    }
    counts = {name: len(tries(name, "train")) for name in names}
    # 65 ends it at once, the others are tried once more, and a pod that saved counts for nothing.
    assert counts == {"bad-data": 1, "busy-storage": 2, "small-memory": 2, "deleted-pod": 2, "bad-shard": 1}
    outcomes = [one["outcome"] for one in cluster.status("deleted-pod")["attempts"]]
    assert outcomes == ["Succeeded", "Saved", "Succeeded"]
    assert sorted(index_of(pod) for pod in tries("bad-shard", "infer")) == [0, 1, 2, 2, 3]
    assert cluster.reason("Trained", "bad-shard") == "Trained", "the adapter stays usable"
    eventually(lambda: {"BadRow", "SlowDown", "OOMKilled", "InternalError"} <= set(events_of(cluster)))


# ── waits


WAITS: dict[str, tuple[Object, Object | None, str, str]] = {
    "no node has so many GPUs": ({"pod": {"nodeSelector": {"gpu": "h100"}}}, None, "Unschedulable", "0/1 nodes are available"),
    "no such image": (
        {}, {"reason": "ErrImagePull", "message": "manifest unknown"}, "ImagePull", "ErrImagePull: manifest unknown",
    ),
    "no such Secret": (
        {}, {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}, "MissingSecret", 'secret "s3" not found',
    ),
    "no such claim": ({"cache": {"claim": "nowhere"}}, None, "Unschedulable", 'persistentvolumeclaim "nowhere" not found'),
}  # fmt: skip


def test_waits_say_what_for_and_what_to_do(cluster: Cluster, player: Player, run_operator: Run) -> None:
    names = {name.replace(" ", "-").lower(): case for name, case in WAITS.items()}
    player.script = lambda pod: Play(waiting=names[pod["metadata"]["labels"]["app.kubernetes.io/instance"]][1])
    run_operator()
    for name, (spec, *_) in names.items():
        cluster.create(changed(FINE_TUNE, **spec), name)
    for name, (_, _, reason, words) in names.items():
        eventually(lambda: cluster.reason(name=name) == reason, what=lambda: cluster.status(name))  # noqa: B023
        assert cluster.phase(name) == "Pending"
        complete = next(one for one in cluster.status(name)["conditions"] if one["type"] == "Complete")
        assert words in complete["message"]
        assert " → " in complete["message"], "a hint"


@pytest.mark.parametrize(
    "hard,refuser", [({"pods": "0"}, "the pod"), ({"count/jobs.batch": "0"}, "the Job")], ids=["of pods", "of Jobs"]
)
def test_a_quota_that_is_used_up_is_waited_for(
    cluster: Cluster, run_operator: Run, proxy: ApiProxy, hard: Object, refuser: str
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "tight"}, "spec": {"hard": hard}}
    cluster.api.create(QUOTAS, cluster.namespace, quota)
    eventually(lambda: cluster.api.get(QUOTAS, cluster.namespace, "tight").get("status", {}).get("hard"))
    run_operator()
    cluster.create(FINE_TUNE)
    eventually(lambda: cluster.reason() == "QuotaExceeded", 30, cluster.status)
    assert cluster.phase() == "Pending"
    statuses = len([one for one in writes(proxy) if one.path.endswith("/status")])
    time.sleep(2)
    assert len([one for one in writes(proxy) if one.path.endswith("/status")]) == statuses, (
        "the same wait written again"
    )
    cluster.api.delete(QUOTAS, cluster.namespace, "tight")
    if refuser == "the Job":
        eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)


def test_many_that_wait_for_one_quota_ask_for_the_events_of_their_namespace_together(
    cluster: Cluster, run_operator: Run, proxy: ApiProxy
) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "tight"},
        "spec": {"hard": {"pods": "0"}},
    }
    cluster.api.create(QUOTAS, cluster.namespace, quota)
    eventually(lambda: cluster.api.get(QUOTAS, cluster.namespace, "tight").get("status", {}).get("hard"))
    run_operator()
    started = time.monotonic()
    names = [f"number-{number}" for number in range(20)]
    for name in names:
        cluster.create(FINE_TUNE, name)
    for name in names:
        eventually(lambda: cluster.reason(name=name) == "QuotaExceeded", 60, lambda: cluster.status(name))  # noqa: B023
    asked = [one for one in proxy.requests if one.method == "GET" and one.path.endswith("/events") and not one.watches]
    assert 1 <= len(asked) <= 2 + (time.monotonic() - started) / 5


def test_pods_pass_the_restricted_pod_security_standard(cluster: Cluster, run_operator: Run) -> None:
    namespace = Resource("", "v1", "namespaces", "Namespace")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.patch(namespace, None, cluster.namespace, {"metadata": {"labels": labels}})
    run_operator()
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)


def test_an_inference_alone_waits_for_its_fine_tune(cluster: Cluster, player: Player, run_operator: Run) -> None:
    run_operator()
    cluster.create(changed(BATCH_INFERENCE, adapter={"fineTune": "support-bot"}))

    def reason() -> str:
        conditions = cluster.inference("answers").get("status", {}).get("conditions", [])
        return next((one["reason"] for one in conditions if one["type"] == "Complete"), "")

    eventually(lambda: reason() == "NoSuchFineTune")
    player.script = holding("train")
    cluster.create(FINE_TUNE)
    eventually(lambda: reason() == "WaitingForAdapter")
    eventually(lambda: cluster.phase() == "Training")
    player.script = lambda pod: Play()
    cluster.api.delete(PODS, cluster.namespace, player.started[-1]["metadata"]["name"])
    eventually(lambda: reason() == "Succeeded", 40)
    assert cluster.inference("answers")["status"]["adapter"] == cluster.status()["adapter"]


def test_somebody_elses_object_of_the_same_name_is_left_alone(cluster: Cluster, run_operator: Run) -> None:
    run_operator()
    cluster.create(changed(BATCH_INFERENCE, suspend=True), "support-bot")
    cluster.create(WHOLE)
    eventually(lambda: cluster.reason() == "NameConflict", what=cluster.status)
    assert cluster.inference()["spec"]["suspend"] is True
    cluster.delete(resource=BATCH_INFERENCES)
    eventually(lambda: cluster.phase() == "Succeeded", 40, cluster.status)


# ── suspend, deadline, end


def test_suspend_saves_and_resume_ends_the_run(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = holding("train")
    run_operator()
    cluster.create(changed(FINE_TUNE, backoffLimit=0))
    eventually(lambda: cluster.phase() == "Training" and stage_of(player.started[-1]) == "train")
    cluster.patch({"suspend": True})
    eventually(lambda: cluster.phase() == "Suspended")
    eventually(lambda: [one["status"]["phase"] for one in cluster.pods()] == ["Succeeded"])
    always(lambda: cluster.phase() == "Suspended", 1)
    player.script = lambda pod: Play()
    cluster.patch({"suspend": False})
    eventually(lambda: cluster.phase() == "Succeeded", what=cluster.status)
    assert len(cluster.jobs()) == 2


class StandInForKueue(threading.Thread):
    """Suspends and admits Jobs with a queue label as Kueue does; `open` says whether the queue has room."""

    def __init__(self, api: Api, namespace: str) -> None:
        super().__init__(daemon=True)
        self.open, self.ended = False, False
        self.api, self.namespace = api, namespace

    def run(self) -> None:
        while not self.ended:
            for job in self.api.list(JOBS, self.namespace, label_selector=QUEUE_LABEL):
                done = any(one["type"] in ("Complete", "Failed") for one in job["status"].get("conditions", []))
                if not done and job["spec"]["suspend"] == self.open:
                    try:
                        self.api.patch(
                            JOBS, self.namespace, job["metadata"]["name"], {"spec": {"suspend": not self.open}}
                        )
                    except ApiError:
                        continue
            time.sleep(0.05)


def test_kueue_says_when_jobs_run_and_is_never_contradicted(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    kueue = StandInForKueue(cluster.api, cluster.namespace)
    kueue.start()
    try:
        player.script = holding("train")
        run_operator()
        cluster.create({**WHOLE, "metadata": {"name": "support-bot", "labels": {QUEUE_LABEL: "team"}}})
        eventually(lambda: cluster.phase() == "Queued")
        always(lambda: not player.started, 1)
        kueue.open = True
        eventually(lambda: cluster.phase() == "Training" and stage_of(player.started[-1]) == "train")
        kueue.open = False  # preempted
        eventually(lambda: cluster.phase() == "Queued")
        kueue.open = True
        eventually(lambda: cluster.phase() == "Training")
        cluster.patch({"suspend": True})
        eventually(lambda: cluster.phase() == "Suspended")
        eventually(lambda: len(cluster.jobs()) == 1, what=cluster.jobs)
        player.script = lambda pod: Play()
        cluster.patch({"suspend": False})
        eventually(lambda: cluster.phase() == "Succeeded", 40, cluster.status)
        patches = [one for one in writes(proxy) if one.method == "PATCH" and "/jobs/" in one.path]
        assert patches == [], "the Job's suspend is Kueue's"
    finally:
        kueue.ended = True
        kueue.join()


def test_the_deadline_ends_it_and_its_pods_save(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = holding("train")
    run_operator()
    cluster.create(changed(FINE_TUNE, activeDeadlineSeconds=3))
    eventually(lambda: cluster.reason("Failed") == "DeadlineExceeded", 15)
    eventually(lambda: len(cluster.jobs()) == 1, what=cluster.jobs)
    eventually(lambda: len(cluster.pods()) == 1)


def test_the_deadline_covers_the_inference_too(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = holding("infer")
    run_operator()
    cluster.create(changed(WHOLE, activeDeadlineSeconds=4))
    eventually(lambda: cluster.reason("Failed") == "DeadlineExceeded", 15)
    assert cluster.reason("Trained") == "Trained"
    eventually(lambda: cluster.inference()["status"]["phase"] == "Failed")


def test_jobs_go_after_their_time_and_the_object_stays(cluster: Cluster, run_operator: Run) -> None:
    run_operator()
    cluster.create(changed(WHOLE, ttlSecondsAfterFinished=2))
    eventually(lambda: cluster.phase() == "Succeeded")
    before = cluster.status()
    eventually(lambda: cluster.jobs() == [] and cluster.pods() == [])
    assert cluster.status() == before
    always(lambda: cluster.jobs() == [], 1)


@pytest.mark.parametrize("stage", ["prepare", "train", "infer"])
def test_deletion_takes_everything_along_and_pods_save_first(
    cluster: Cluster, player: Player, run_operator: Run, stage: str
) -> None:
    player.script = holding(stage)
    running = run_operator()
    cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == stage)
    cluster.delete()
    eventually(lambda: cluster.gone() and not cluster.jobs() and not cluster.pods(), 30, cluster.jobs)
    assert cluster.api.list(BATCH_INFERENCES, cluster.namespace) == []
    assert [line["message"] for line in running.lines()].count("created") == {"prepare": 1, "train": 2, "infer": 4}[
        stage
    ]


def test_one_made_again_under_its_name_is_another(cluster: Cluster, player: Player, run_operator: Run) -> None:
    player.script = holding("infer")
    run_operator()
    first = cluster.create(WHOLE)
    eventually(lambda: player.started and stage_of(player.started[-1]) == "infer")
    player.script = lambda pod: Play()
    cluster.delete()
    second = cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded", 40, cluster.status)
    eventually(lambda: len(cluster.jobs()) == 3, 40, cluster.jobs)
    uids = {one["metadata"]["ownerReferences"][0]["uid"] for one in cluster.jobs()}
    assert first["metadata"]["uid"] not in uids
    assert second["metadata"]["uid"] in uids


# ── progress


def test_progress_of_a_running_pod_shows_and_is_written_seldom(
    cluster: Cluster, player: Player, proxy: ApiProxy, run_operator: Run
) -> None:
    from prometheus_client import CollectorRegistry, start_http_server

    page = Page("train")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(page)
    server, _ = start_http_server(9090, "127.0.0.1", registry=registry)
    try:
        assert "kubepeft_training_step" in FIGURES
        page.take({"kubepeft_training_step": 10, "kubepeft_training_total_steps": 1000, "kubepeft_training_loss": 2.5})
        player.script = holding("train")
        run_operator()
        cluster.create(FINE_TUNE)
        eventually(lambda: cluster.status().get("progress") == "1%")
        assert cluster.status()["training"] == {"step": 10, "totalSteps": 1000, "loss": 2.5}
        before = len(writes(proxy))
        for step in range(11, 20):  # less than a percent: no write
            page.take({"kubepeft_training_step": step})
            time.sleep(0.3)
        assert len(writes(proxy)) == before
        page.take({"kubepeft_training_step": 500, "kubepeft_training_eta_seconds": 61})
        eventually(lambda: cluster.status().get("progress") == "50%")
        assert cluster.status()["eta"] == "1m1s"
        assert len(writes(proxy)) == before + 1
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_that_never_ends_holds_nothing_up(cluster: Cluster, player: Player, run_operator: Run) -> None:
    with socket.create_server(("127.0.0.2", 9090)) as listener:
        asked = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            asked.set()
            with connection:
                try:
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.2)
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        player.script = lambda pod: Play(runs=None, address="127.0.0.2") if stage_of(pod) == "train" else Play()
        run_operator()
        cluster.create(FINE_TUNE)
        assert asked.wait(20)
        player.script = lambda pod: Play()
        cluster.create(WHOLE, "another")
        eventually(lambda: cluster.phase("another") == "Succeeded")


def test_the_documents_that_pods_get_are_those_of_the_contract(
    cluster: Cluster, player: Player, run_operator: Run
) -> None:
    run_operator()
    cluster.create(WHOLE)
    eventually(lambda: cluster.phase() == "Succeeded")
    documents = [json.loads(pod["metadata"]["annotations"]["kubepeft.io/document"]) for pod in player.started]
    assert [one["stage"] for one in documents] == ["prepare", "train", "infer"]
    assert documents[1]["prepared"]["digest"] == "v1-prepared"
    assert documents[2]["adapterDigest"] == "a" * 64
    assert {one["specDigest"] for one in documents[:2]} == {cluster.status()["specDigest"]}
    assert json.loads(success(player.started[2]))["inference"]["whole"] is True
    assert (
        cluster.api.get(FINE_TUNES, cluster.namespace, "support-bot")["status"]["output"] == documents[0]["outputUri"]
    )


def test_one_for_the_whole_cluster_and_what_its_pages_say(cluster: Cluster, run_operator: Run) -> None:
    running = run_operator(watchNamespaces=[])
    cluster.create(WHOLE, "a-name-of-its-own")
    eventually(
        lambda: cluster.phase("a-name-of-its-own") == "Succeeded", what=lambda: cluster.status("a-name-of-its-own")
    )
    started = running.said("started")
    assert started

    def page(port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    assert [page(started["health"], path) for path in ("/healthz", "/readyz")] == ["ok\n", "ok\n"]
    wanted = (
        'kubepeft_finetunes{phase="Failed"} 0.0',
        'kubepeft_attempts_total{outcome="Succeeded",reason="",stage="train"}',
        'kubepeft_outcomes_total{kind="FineTune",outcome="Succeeded",reason="Succeeded"}',
    )
    eventually(lambda: all(one in page(started["metrics"], "/metrics") for one in wanted))
    metrics = page(started["metrics"], "/metrics")
    assert "a-name-of-its-own" not in metrics
    assert cluster.namespace not in metrics
