"""What goes wrong in a cluster, made for real: pods killed, memory limits, wrong Secrets, full quotas, drains, upgrades."""

import base64
import contextlib
import os
import re
import signal
import time
from pathlib import Path

from tests.chart.helm import NAMESPACE
from tests.cluster.node import NODE
from tests.e2e.installation import S3_SECRET, Team, fine_tune

LONG = {"maxSteps": 300, "saveSteps": 20, "perDeviceTrainBatchSize": 4, "evalStrategy": "no"}
"""Half a minute: long enough to be interrupted."""
SHORT = {"maxSteps": 5, "saveStrategy": "no"}


def trained_to(team: Team, name: str, step: int) -> None:
    team.wait_until(name, lambda status: (status.get("training") or {}).get("step", 0) >= step)


def test_a_pod_deleted_in_training_saves_and_the_next_goes_on_from_its_checkpoint(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training=LONG))
    trained_to(team, "bot", 30)
    team.kubectl("delete", "pod", team.running("train", "bot")["metadata"]["name"])
    status = team.wait_for("bot", "Succeeded")
    saved, resumed = [one for one in status["attempts"] if one["stage"] == "train"]
    assert (saved["outcome"], saved["exitCode"]) == ("Saved", 143)
    said = re.search(r"saved at step (\d+)", saved["message"])
    assert said, saved
    assert resumed["resumedFromStep"] == int(said[1]) >= 30
    assert status["training"]["step"] == 300


def kill_processes(pod: str) -> None:
    """kill -9 of all that runs in a pod, from the node."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOSTNAME={pod}\0".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def test_a_pod_that_vanishes_without_a_word_costs_the_steps_since_its_last_checkpoint(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training=LONG))
    trained_to(team, "bot", 50)
    kill_processes(team.running("train", "bot")["metadata"]["name"])
    status = team.wait_for("bot", "Succeeded")
    killed, resumed = [one for one in status["attempts"] if one["stage"] == "train"]
    assert killed["exitCode"] == 137
    assert resumed["resumedFromStep"] >= 20
    assert resumed["resumedFromStep"] % 20 == 0
    assert status["training"]["step"] == 300


def test_a_memory_limit_that_is_hit_says_so_and_what_to_do(team: Team) -> None:
    team.apply(fine_tune("big", backoffLimit=0, pod={"resources": {"limits": {"memory": "96Mi"}}}))
    team.wait_for("big", "Failed")
    failed = team.condition("big", "Failed")
    assert failed["reason"] == "OOMKilled"
    assert "pod.resources.limits.memory" in failed["message"]


def test_wrong_credentials_say_which_and_nothing_of_them(team: Team) -> None:
    wrong = base64.b64encode(b"NotTheSecretKeyAtAll").decode()
    team.kubectl(
        "patch", "secret", S3_SECRET, "--type=merge", "-p", f'{{"data":{{"AWS_SECRET_ACCESS_KEY":"{wrong}"}}}}'
    )
    team.apply(fine_tune("bot"))
    team.wait_for("bot", "Failed")
    failed = team.condition("bot", "Failed")
    assert failed["reason"] in ("AccessDenied", "BadCredentials"), failed
    assert "credentials" in failed["message"]
    assert "NotTheSecretKeyAtAll" not in str(team.status("bot"))


def test_a_missing_secret_is_waited_for(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training=SHORT, credentials={"s3": "later"}))
    team.wait_until("bot", lambda _: team.condition("bot").get("reason") == "MissingSecret")
    assert '"later"' in team.condition("bot")["message"]
    team.wait_until("bot", lambda _: team.condition("bot", "Stalled").get("status") == "True")
    secret = team.cluster.request(f"/api/v1/namespaces/{team.namespace}/secrets/{S3_SECRET}")
    team.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later"}, "data": secret["data"]})
    team.wait_for("bot", "Succeeded", seconds=240)


def test_missing_data_fails_at_the_first_try_and_names_it(team: Team) -> None:
    team.apply(fine_tune("bot", data={"train": "s3://data/nowhere.jsonl"}))
    status = team.wait_for("bot", "Failed")
    assert "s3://data/nowhere.jsonl" in team.condition("bot", "Failed")["message"]
    assert len(status["attempts"]) == 1
    assert status["attempts"][0]["exitCode"] == 65


def test_a_full_quota_is_waited_for(team: Team) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}, "spec": {"hard": {"pods": "0"}}}
    team.apply(quota)
    team.apply(fine_tune("bot", inference=None, training=SHORT))
    team.wait_until("bot", lambda _: team.condition("bot").get("reason") == "QuotaExceeded")
    team.kubectl("delete", "resourcequota", "full")
    team.wait_for("bot", "Succeeded", seconds=240)


def test_an_upgrade_leaves_a_run_alone_and_a_bad_image_says_so(team: Team) -> None:
    team.apply(fine_tune("before", inference=None, training=LONG))
    trained_to(team, "before", 5)
    team.installation.upgrade(image={"tag": "nowhere"})
    try:
        team.apply(fine_tune("after", inference=None, training=SHORT))
        team.wait_until("after", lambda _: team.condition("after").get("reason") == "ImagePull")
        assert "localhost/kubepeft/jobs:nowhere" in team.condition("after")["message"]
        status = team.wait_for("before", "Succeeded")
        assert [one["outcome"] for one in status["attempts"]] == ["Succeeded", "Succeeded"]
    finally:
        team.installation.upgrade()


def test_a_killed_operator_is_replaced_and_the_run_goes_on(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training=LONG))
    trained_to(team, "bot", 5)
    operators = "app.kubernetes.io/component=operator"
    team.cluster.kubectl("delete", "pod", "-n", NAMESPACE, "-l", operators, "--grace-period=0", "--force")
    status = team.wait_for("bot", "Succeeded")
    assert [(one["stage"], one["outcome"]) for one in status["attempts"]] == [
        ("prepare", "Succeeded"), ("train", "Succeeded"),
    ]  # fmt: skip
    assert len(team.pods("train", "bot")) <= 1
    team.cluster.kubectl("wait", "pod", "-n", NAMESPACE, "-l", operators, "--for=condition=Ready", "--timeout=60s")


def test_a_drained_node_costs_no_step(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training=LONG, backoffLimit=0))
    trained_to(team, "bot", 30)
    selector = "app.kubernetes.io/managed-by=kubepeft-operator"
    team.cluster.kubectl(
        "drain", NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--force", f"--pod-selector={selector}",
        "--timeout=90s",
    )  # fmt: skip
    try:
        team.wait_until("bot", lambda _: team.condition("bot").get("reason") == "Unschedulable")
        assert "unschedulable" in team.condition("bot")["message"]
    finally:
        team.cluster.kubectl("uncordon", NODE)
    status = team.wait_for("bot", "Succeeded")
    assert status["attempts"][-1]["resumedFromStep"] >= 30


def test_deleted_in_training_it_ends_gently_and_leaves_nothing_behind(team: Team) -> None:
    team.apply(fine_tune("bot", training=LONG))
    trained_to(team, "bot", 30)
    output = team.installation.stored(f"s3://adapters/{team.namespace}/bot")
    team.kubepeft("cancel", "bot", "--yes")
    deadline = time.monotonic() + 90
    while team.pods() or "No resources" not in (team.kubectl("get", "jobs,bi") or "No resources"):
        assert time.monotonic() < deadline, team.kubectl("get", "jobs,bi,pods")
        time.sleep(0.5)
    steps = [int(folder.name) for folder in (output / "checkpoints").glob("*/*")]
    assert max(steps) >= 30, "SIGTERM came before it was killed, and it saved"
    assert not (output / "adapter").exists()
