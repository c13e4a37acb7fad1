"""The one-node cluster of the tests: that it runs real pods, as clusters do, and leaves nothing."""

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import build, images
from tests.cluster.leftovers import addresses, cgroups_of, wait_until_gone
from tests.cluster.node import HOST_NAME, NODE, Cluster
from tests.servers import REPOSITORY, S3Server


@pytest.fixture(scope="module", autouse=True)
def base(node: Cluster) -> str:
    name = images.build_base()
    node.load_image(name)
    return name


def pod(name: str, program: str, **spec: Any) -> dict[str, Any]:
    """A pod as restricted as the operator's, that runs a Python program."""
    container = {
        "name": "main",
        "image": images.BASE,
        "command": ["python3", "-c", textwrap.dedent(program)],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **spec.pop("container", {}),
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    common = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {**common, **spec}}


def run_pod(node: Cluster, namespace: str, manifest: dict[str, Any], *phases: str) -> dict[str, Any]:
    """Make a pod and wait until it has one of these phases."""
    path = f"/api/v1/namespaces/{namespace}/pods"
    node.request(path, "POST", manifest)
    deadline = time.monotonic() + 60
    while (seen := node.request(f"{path}/{manifest['metadata']['name']}"))["status"]["phase"] not in phases:
        assert time.monotonic() < deadline, json.dumps(seen["status"], indent=1)
        time.sleep(0.1)
    return dict(seen)


def test_runs_a_pod_with_a_gpu(node: Cluster, node_namespace: str) -> None:
    limits = {"nvidia.com/gpu": "1", "memory": "64Mi", "cpu": "500m"}
    program = "open('/dev/termination-log', 'w').write('done'); raise SystemExit(3)"
    ended = run_pod(node, node_namespace, pod("gpu", program, container={"resources": {"limits": limits}}), "Failed")
    state = ended["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["message"]) == (3, "done")


def test_gpus_are_counted_and_come_back_with_the_kubelet(node: Cluster, node_namespace: str) -> None:
    def gpus() -> Any:
        return node.request(f"/api/v1/nodes/{NODE}")["status"]["allocatable"].get("nvidia.com/gpu")

    assert gpus() == "2"
    node.stop("kubelet")
    node.start("kubelet")
    assert gpus() == "2"
    greedy = pod("greedy", "", container={"resources": {"limits": {"nvidia.com/gpu": "3"}}})
    node.request(f"/api/v1/namespaces/{node_namespace}/pods", "POST", greedy)
    deadline = time.monotonic() + 20
    while "Insufficient nvidia.com/gpu" not in (words := node.kubectl("get", "events", "-n", node_namespace)):
        assert time.monotonic() < deadline, words
        time.sleep(0.2)


def test_a_pod_over_its_memory_is_killed(node: Cluster, node_namespace: str) -> None:
    hungry = pod("hungry", "bytearray(1 << 30)", container={"resources": {"limits": {"memory": "32Mi"}}})
    ended = run_pod(node, node_namespace, hungry, "Failed")
    state = ended["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["reason"], state["exitCode"]) == ("OOMKilled", 137)


def test_a_pod_reaches_the_api_services_and_this_machine(node: Cluster, node_namespace: str, tmp_path: Path) -> None:
    s3 = S3Server(tmp_path / "s3", host=node.host_address)
    try:
        service = node.host_service("s3", s3.port, node_namespace)
        program = f"""
            import json, ssl, urllib.error, urllib.request
            def status(url, **headers):
                context = ssl.create_default_context(cafile="/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
                try:
                    request = urllib.request.Request(url, headers=headers)
                    return urllib.request.urlopen(request, timeout=10, context=context).status
                except urllib.error.HTTPError as error:
                    return error.code
            token = open("/var/run/secrets/kubernetes.io/serviceaccount/token").read()
            print(json.dumps([
                status("https://kubernetes.default.svc/api", Authorization=f"Bearer {{token}}"),
                status("https://kubernetes.default/api/v1/namespaces/{node_namespace}/secrets", Authorization=f"Bearer {{token}}"),
                status("http://{node.host_address}:{s3.port}/"),
                status("http://{HOST_NAME}:{s3.port}/"),
                status("http://{service}:{s3.port}/"),
            ]))
        """
        run_pod(node, node_namespace, pod("client", program), "Succeeded", "Failed")
        assert json.loads(node.kubectl("logs", "client", "-n", node_namespace)) == [200, 403, 403, 403, 403]
    finally:
        s3.stop()


def test_this_machine_and_other_pods_reach_a_pod(node: Cluster, node_namespace: str) -> None:
    server = pod("server", "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=9090, bind='0.0.0.0')")
    server["metadata"]["labels"] = {"app": "server"}
    seen = run_pod(node, node_namespace, server, "Running")
    ports = [{"port": 80, "targetPort": 9090}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "server"}}
    spec = {"selector": {"app": "server"}, "ports": ports}
    made = node.request(f"/api/v1/namespaces/{node_namespace}/services", "POST", {**service, "spec": spec})
    for address in (f"{seen['status']['podIP']}:9090", made["spec"]["clusterIP"]):
        wait_for_answer(f"http://{address}/")
    words = node.kubectl("exec", "-n", node_namespace, "server", "--", "python3", "-c", "import os; print(os.getuid())")
    assert words == "65532\n"
    program = f"""
        import time, urllib.request
        for _ in range(50):
            try:
                raise SystemExit(urllib.request.urlopen("http://server.{node_namespace}.svc/", timeout=2).status != 200)
            except OSError:
                time.sleep(0.1)
        raise SystemExit("no answer")
    """
    run_pod(node, node_namespace, pod("client", program), "Succeeded")


def wait_for_answer(url: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            assert time.monotonic() < deadline, url
            time.sleep(0.1)


def test_a_claim_is_a_folder_of_this_machine(node: Cluster, node_namespace: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "question").write_text("6 * 7")
    folder = node.volume("data", node_namespace, files=tmp_path / "in")
    program = "open('/data/answer', 'w').write(str(eval(open('/data/question').read())))"
    container = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    run_pod(node, node_namespace, pod("reader", program, container=container, volumes=volumes), "Succeeded")
    assert (folder / "answer").read_text() == "42"


def test_a_drain_ends_a_pod_gently(node: Cluster, node_namespace: str) -> None:
    program = """
        import signal, sys, time
        def saved(*_):
            open("/dev/termination-log", "w").write("saved")
            sys.exit(143)
        signal.signal(signal.SIGTERM, saved)
        print("ready", flush=True)
        time.sleep(600)
    """
    run_pod(node, node_namespace, pod("trainer", program), "Running")
    while "ready" not in node.kubectl("logs", "trainer", "-n", node_namespace):
        time.sleep(0.1)
    watch = subprocess.Popen(
        [
            build.BIN / "kubectl",
            "--kubeconfig",
            node.kubeconfig,
            "get",
            "pod",
            "trainer",
            "-n",
            node_namespace,
            "-w",
            "-ojson",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with watch:
        try:
            node.kubectl("drain", NODE, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
        finally:
            node.kubectl("uncordon", NODE)
            time.sleep(0.5)
            watch.terminate()
        assert watch.stdout
        words = watch.stdout.read()
    assert '"message": "saved"' in words
    assert '"exitCode": 143' in words


def test_leaves_nothing_when_its_owner_is_killed(node: Cluster) -> None:
    program = """
        import time
        from tests.cluster.node import Cluster
        cluster = Cluster(images_kept=False)
        print(cluster.folder, cluster.host_address, flush=True)
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
        words = owner.stdout.readline().split()
        folder, address = Path(words[0]), words[1]
        assert cgroups_of(folder)
        assert address in addresses()
        owner.kill()
    wait_until_gone(folder)
    deadline = time.monotonic() + 10
    while address in addresses():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert node.is_ready()  # another owner's
