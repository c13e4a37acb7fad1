"""The simulated nodes of the tests: that Jobs on them end as the test says."""

import json
import time
from collections.abc import Callable
from typing import Any

from kubepeft.stage import Result
from tests.cluster.simulated import Outcome, SimulatedNodes, failed, succeeded

Simulate = Callable[..., SimulatedNodes]


def job(name: str, stage: str, completions: int = 1) -> dict[str, Any]:
    document = {"stage": stage, "specDigest": f"digest-of-{name}", "outputUri": f"s3://adapters/{name}"}
    metadata = {"labels": {"kubepeft.io/stage": stage}, "annotations": {"kubepeft.io/document": json.dumps(document)}}
    container = {"name": "kubepeft", "image": "none", "resources": {"limits": {"nvidia.com/gpu": 1}}}
    pod = {"restartPolicy": "Never", "containers": [container]}
    counts = {"completions": completions, "parallelism": completions, "backoffLimit": 0}
    spec = {**counts, "template": {"metadata": metadata, "spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def wait_for_end(cluster: SimulatedNodes, *names: str, seconds: float = 60) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while True:
        jobs = {one["metadata"]["name"]: one["status"] for one in cluster.request("/apis/batch/v1/jobs")["items"]}
        if all("completionTime" in jobs[name] or jobs[name].get("failed") for name in names):
            return jobs
        assert time.monotonic() < deadline, jobs
        time.sleep(0.1)


def results(cluster: SimulatedNodes, name: str) -> list[Result]:
    pods = cluster.request(f"/api/v1/namespaces/default/pods?labelSelector=job-name={name}")["items"]
    states = [pod["status"]["containerStatuses"][0]["state"]["terminated"] for pod in pods]
    return [Result.model_validate_json(state["message"]) for state in states]


def test_jobs_end_with_the_message_of_their_stage(simulate: Simulate) -> None:
    outcomes = [succeeded("train", seconds=0.5), failed("infer", 65, "BadData", "no rows"), Outcome(None, {})]
    cluster = simulate(outcomes, nodes=2, gpus=4)
    cluster.apply(job("trained", "train"), job("broken", "infer"), job("endless", "prepare"))
    jobs = wait_for_end(cluster, "trained", "broken")
    assert (jobs["trained"]["succeeded"], jobs["broken"]["failed"]) == (1, 1)
    [trained], [broken] = results(cluster, "trained"), results(cluster, "broken")
    assert (trained.outcome, trained.spec_digest) == ("Succeeded", "digest-of-trained")
    assert trained.adapter
    assert trained.adapter.uri == "s3://adapters/trained/adapter"
    assert (broken.exit_code, broken.reason, broken.message) == (65, "BadData", "no rows")
    assert jobs["endless"]["active"] == 1  # no outcome, no end


def test_nodes_have_as_many_gpus_as_told(simulate: Simulate) -> None:
    cluster = simulate([], nodes=2, gpus=3)
    cluster.apply(job("wide", "infer", completions=8))
    deadline = time.monotonic() + 30
    phases: list[str] = []
    while phases.count("Running") < 6:
        assert time.monotonic() < deadline, phases
        time.sleep(0.2)
        phases = [pod["status"]["phase"] for pod in cluster.request("/api/v1/pods")["items"]]
    time.sleep(1)
    phases = [pod["status"]["phase"] for pod in cluster.request("/api/v1/pods")["items"]]
    assert sorted(phases) == ["Pending"] * 2 + ["Running"] * 6


def test_outcomes_come_in_their_shares(simulate: Simulate) -> None:
    outcomes = [succeeded("infer", share=3), failed("infer", 75, "NetworkDown", "try again", share=1)]
    cluster = simulate(outcomes, nodes=2, gpus=1000)
    many = job("many", "infer", completions=200)
    many["spec"] |= {"completionMode": "Indexed", "backoffLimitPerIndex": 0}
    del many["spec"]["backoffLimit"]
    cluster.apply(many)
    deadline = time.monotonic() + 60
    status: dict[str, int] = {}
    while status.get("failed", 0) + status.get("succeeded", 0) < 200:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
        status = cluster.request("/apis/batch/v1/namespaces/default/jobs/many")["status"]
    assert 20 <= status["failed"] <= 85  # 50 on average; further off once in a million runs
