"""The control plane of the tests: that it is a real one, is quick, says what happened, and leaves nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.leftovers import processes_of, wait_until_gone
from tests.servers import REPOSITORY

NewControlPlane = Callable[..., ControlPlane]


def test_starts_in_seconds_and_leaves_nothing(new_control_plane: NewControlPlane) -> None:
    begun = time.monotonic()
    cluster = new_control_plane()
    assert time.monotonic() - begun < 30  # 5 s on an idle machine
    assert '"gitVersion": "v1.36.3"' in cluster.kubectl("version", "--output=json")
    assert len(processes_of(cluster.folder)) >= 4
    cluster.close()
    wait_until_gone(cluster.folder)


def test_leaves_nothing_when_its_owner_is_killed(control_plane: ControlPlane) -> None:
    program = """
        import time
        from tests.cluster.control_plane import ControlPlane
        print(ControlPlane().folder, flush=True)
        time.sleep(600)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with owner:
        assert owner.stdout
        folder = Path(owner.stdout.readline().strip())
        assert len(processes_of(folder)) >= 4
        owner.kill()
    wait_until_gone(folder)
    assert control_plane.is_ready()  # another owner's


def test_controllers_and_scheduler_work(control_plane: ControlPlane, namespace: str) -> None:
    """A Job gets its pod, and the scheduler says why it can't run."""
    container = {"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": 1}}}
    template = {"spec": {"restartPolicy": "Never", "containers": [container], "nodeSelector": {"no-node": "has-this"}}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one", "namespace": namespace}}
    control_plane.apply({**job, "spec": {"template": template}})
    deadline = time.monotonic() + 20
    words = ""
    while "FailedScheduling" not in words:
        assert time.monotonic() < deadline, words
        words = control_plane.kubectl("get", "events", "--namespace", namespace)
        time.sleep(0.1)


def test_users_are_held_to_their_rights(control_plane: ControlPlane, namespace: str) -> None:
    nobody = control_plane.kubeconfig_for("eve", ["team-a"])
    with pytest.raises(RuntimeError, match='User "eve" cannot list resource "secrets"'):
        control_plane.kubectl("get", "secrets", "--namespace", namespace, kubeconfig=nobody)
    grant = ("create", "rolebinding", "readers", "--clusterrole=view", "--namespace", namespace)
    control_plane.kubectl(*grant, "--group=team-a", f"--serviceaccount={namespace}:default")
    control_plane.kubectl("get", "pods", "--namespace", namespace, kubeconfig=nobody)
    account = control_plane.kubeconfig_for_service_account(namespace, "default")
    control_plane.kubectl("get", "pods", "--namespace", namespace, kubeconfig=account)
    with pytest.raises(RuntimeError, match=f'User "system:serviceaccount:{namespace}:default" cannot list'):
        control_plane.kubectl("get", "secrets", "--namespace", namespace, kubeconfig=account)


def test_api_calls_are_counted_by_user(control_plane: ControlPlane, namespace: str) -> None:
    counted = control_plane.kubeconfig_for("counted", ["system:masters"])
    before = time.time()
    for _ in range(3):
        control_plane.kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods", kubeconfig=counted)
    calls = control_plane.api_calls(user="counted", since=before)
    assert [(call["verb"], call["objectRef"]["resource"]) for call in calls] == [("list", "pods")] * 3
    assert control_plane.api_calls(user="counted", user_agent="kubectl/", since=before) == calls
    assert control_plane.api_calls(user="counted", since=time.time() + 1) == []


def test_components_stop_and_start(new_control_plane: NewControlPlane) -> None:
    cluster = new_control_plane()
    cluster.kubectl("create", "configmap", "kept")
    url = cluster.url
    cluster.restart_api_server(signal.SIGKILL)
    assert cluster.url == url
    cluster.request("/api/v1/namespaces/default/configmaps/kept")
    cluster.stop("kube-apiserver")
    assert not cluster.is_ready()
    cluster.stop("etcd", signal.SIGKILL)
    cluster.start("etcd")
    cluster.start("kube-apiserver")
    cluster.request("/api/v1/namespaces/default/configmaps/kept")


def test_what_does_not_start_says_why(new_control_plane: NewControlPlane) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)kube-apiserver ended with code 1.*unknown flag: --no-such-flag"):
        new_control_plane(arguments={"kube-apiserver": ["--no-such-flag"]})
