"""An installed kubepeft on a real node, as a user has it: the chart by helm, S3 over TLS, a Prometheus that scrapes the pods.

What a test asks of the cluster goes through kubectl or the API, as a person of the namespace would.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.chart.helm import CHART, NAMESPACE, RELEASE, helm
from tests.cluster import build, images
from tests.cluster.node import HOST_NAME, Cluster
from tests.servers import ACCESS_KEY, REPOSITORY, SECRET_KEY, S3Server, free_port

Object = dict[str, Any]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
S3_SECRET, CA_BUNDLE = "s3", "company-ca"
HUB_TOKEN = "hf_PlantedTokenThatNobodyMaySee"
TERMINAL = ("Succeeded", "Failed")
FINE_TUNES = "/apis/kubepeft.io/v1alpha1/namespaces/{}/finetunes"
BATCH_INFERENCES = "/apis/kubepeft.io/v1alpha1/namespaces/{}/batchinferences"


@dataclass
class Installation:
    """The cluster, the release in it, and the servers beside it."""

    cluster: Cluster
    s3: S3Server
    values: Object
    namespaces: list[str] = field(default_factory=list)

    def upgrade(self, **jobs: Any) -> None:
        """helm upgrade --install with these values below `jobs` laid over the installation's own; waits until it is ready."""
        values = {**self.values, "jobs": _merged(self.values["jobs"], jobs)}
        helm(
            *("upgrade", "--install", RELEASE, CHART, "--namespace", NAMESPACE, "--create-namespace"),
            *("--wait", "--timeout", "120s"),
            values=values,
            kubeconfig=self.cluster.kubeconfig,
        )

    def bucket(self, name: str, files: Mapping[str, Path | bytes]) -> str:
        """A bucket with these objects; a folder's files lie below its key."""
        root = self.s3.root / name
        root.mkdir(exist_ok=True)
        for key, content in files.items():
            place = root / key
            if isinstance(content, bytes):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            elif content.is_dir():
                for file in content.iterdir():
                    if file.is_file():
                        place.mkdir(parents=True, exist_ok=True)
                        (place / file.name).write_bytes(file.read_bytes())
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read_bytes())
        return name

    def stored(self, uri: str) -> Path:
        """The file or folder of the S3 server that an s3:// address names."""
        return self.s3.root / uri.removeprefix("s3://")


@dataclass
class Team:
    """A namespace with restricted Pod Security, the S3 Secret and the CA bundle: what a team has before its first FineTune."""

    installation: Installation
    namespace: str

    @property
    def cluster(self) -> Cluster:
        return self.installation.cluster

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl(*arguments, "--namespace", self.namespace, input=input)

    def kubepeft(self, *arguments: str) -> str:
        """What the command prints, with this namespace."""
        done = subprocess.run(
            [Path(sys.executable).parent / "kubepeft", *arguments, "-n", self.namespace],
            env={**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig)}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(objects))

    def get(self, name: str, path: str = FINE_TUNES) -> Object:
        return dict(self.cluster.request(f"{path.format(self.namespace)}/{name}"))

    def status(self, name: str, path: str = FINE_TUNES) -> Object:
        return self.get(name, path).get("status") or {}

    def wait_for(
        self, name: str, *phases: str, path: str = FINE_TUNES, seconds: float = 300, poll: float = 0.3
    ) -> Object:
        """The status once the object is in one of these phases; an unexpected end fails at once."""
        deadline = time.monotonic() + seconds
        while (status := self.status(name, path)).get("phase") not in phases:
            if status.get("phase") in TERMINAL or time.monotonic() > deadline:
                raise AssertionError(f"{name} is not {' or '.join(phases)}: {self.told(name, status)}")
            time.sleep(poll)
        return status

    def wait_until(
        self, name: str, reached: Callable[[Object], Any], path: str = FINE_TUNES, seconds: float = 120
    ) -> Object:
        """The status once `reached` says so."""
        deadline = time.monotonic() + seconds
        while not reached(status := self.status(name, path)):
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} did not get there: {self.told(name, status)}")
            time.sleep(0.3)
        return status

    def told(self, name: str, status: Object) -> str:
        """What a person would look at next."""
        words = [json.dumps(status, indent=1)]
        for command in (("get", "pods", "-o", "wide"), ("get", "events", "--sort-by=.lastTimestamp")):
            words.append(self.kubectl(*command))
        for pod in self.pods():
            try:
                log = self.kubectl("logs", pod["metadata"]["name"], "--tail=15")
            except RuntimeError as error:
                log = str(error)
            words.append(f"{pod['metadata']['name']}:\n{log}")
        return "\n".join(words)

    def pods(self, stage: str = "", name: str = "") -> list[Object]:
        """Pods of the namespace, oldest first; of a stage, or of an object."""
        found = self.cluster.request(f"/api/v1/namespaces/{self.namespace}/pods")["items"]
        found.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        return [
            pod
            for pod in found
            if stage in ("", pod["metadata"]["labels"].get("kubepeft.io/stage"))
            and name in ("", pod["metadata"]["labels"].get("app.kubernetes.io/instance"))
        ]

    def running(self, stage: str, name: str, seconds: float = 90) -> Object:
        """The running pod of a stage of an object, once there is one."""
        deadline = time.monotonic() + seconds
        while True:
            for pod in self.pods(stage, name):
                if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]:
                    return pod
            assert time.monotonic() < deadline, self.told(name, self.status(name))
            time.sleep(0.2)

    def condition(self, name: str, type: str = "Complete", path: str = FINE_TUNES) -> Object:
        conditions = self.status(name, path).get("conditions") or ()
        return next((one for one in conditions if one["type"] == type), {})

    def watching(self, name: str, kind: str = "ft") -> "Watch":
        """`kubectl get KIND NAME -w` from now on."""
        return Watch(self.cluster, self.namespace, kind, name)


class Watch:
    """A `kubectl get -w`; `lines` are what it printed, once it is over."""

    def __init__(self, cluster: Cluster, namespace: str, kind: str, name: str) -> None:
        command = ["--kubeconfig", cluster.kubeconfig, "get", kind, name, "-n", namespace, "--watch"]
        self._process = subprocess.Popen([build.BIN / "kubectl", *command], stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with self._process:
            assert self._process.stdout
            self.lines = self._process.stdout.read().splitlines()


def install(cluster: Cluster, folder: Path) -> Iterator[Installation]:
    """Build the images, load them into the node, start S3 with the cluster's CA, and install the chart."""
    for target in ("operator", "jobs"):
        cluster.load_image(images.build_image(target))
    certificate, key = cluster.authority.issue("s3", "s3", hosts=[HOST_NAME, cluster.host_address])
    s3 = S3Server(folder / "s3", cert=certificate, key=key, host=cluster.host_address)
    small = {"requests": {"cpu": "100m", "memory": "256Mi"}}
    values: Object = {
        "image": {"repository": f"{images.PREFIX}/operator", "tag": "test"},
        "config": {"progressIntervalSeconds": 1, "stuckAfterSeconds": 10},
        "networkPolicy": {"apiServerPorts": [443, cluster.port]},
        "jobs": {
            "image": {"repository": f"{images.PREFIX}/jobs", "tag": "test"},
            "outputUri": "s3://adapters",
            "s3": {"endpoint": f"https://{HOST_NAME}:{s3.port}", "region": "us-east-1"},
            "caBundle": {"configMap": CA_BUNDLE},
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],  # the cluster itself runs on the same two cores
            **{stage: {"resources": small} for stage in ("prepare", "train", "infer")},
        },
    }
    installation = Installation(cluster, s3, values)
    installation.bucket("adapters", {})
    installation.bucket("models", {"quickstart": QUICKSTART / "base"})
    installation.bucket("data", {"support": QUICKSTART / "data"})
    try:
        installation.upgrade()
        yield installation
    finally:
        s3.stop()


def found_team(installation: Installation, name: str) -> Team:
    cluster = installation.cluster
    secret = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "HF_TOKEN": HUB_TOKEN}
    metadata = {"namespace": name}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {**metadata, "name": S3_SECRET},
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in secret.items()},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {**metadata, "name": CA_BUNDLE},
            "data": {"ca.crt": cluster.ca.read_text()},
        },
    )
    installation.namespaces.append(name)
    return Team(installation, name)


def fine_tune(name: str, /, **spec: Any) -> Object:
    """The quickstart's FineTune on the cluster's S3, with the GPU, fewer steps, and these sections laid over it."""
    there: Object = yaml.safe_load((QUICKSTART / "finetune.yaml").read_text())["spec"]
    ours: Object = {
        "model": {"uri": "s3://models/quickstart"},
        "data": {"train": "s3://data/support/train.jsonl", "eval": "s3://data/support/eval.jsonl"},
        "training": {"numTrainEpochs": None, "maxSteps": 40, "saveSteps": 20, "loggingSteps": 5},
        "output": None,
        "inference": {"input": "s3://data/support/questions.jsonl"},
        "gpus": 1,
        "credentials": {"s3": S3_SECRET},
        "backoffLimit": 1,
    }
    merged = _merged(_merged(there, ours), spec)
    return {
        "apiVersion": "kubepeft.io/v1alpha1",
        "kind": "FineTune",
        "metadata": {"name": name},
        "spec": _without_none(merged),
    }


def batch_inference(name: str, /, **spec: Any) -> Object:
    ours = {
        "credentials": {"s3": S3_SECRET},
        "input": "s3://data/support/questions.jsonl",
        "gpus": 0,
        "maxNewTokens": 48,
    }
    return {
        "apiVersion": "kubepeft.io/v1alpha1",
        "kind": "BatchInference",
        "metadata": {"name": name},
        "spec": _merged(ours, spec),
    }


class Prometheus:
    """A real Prometheus that scrapes the pods as the chart's monitors would have it. Debian's has no Kubernetes discovery, so a thread tells it of them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.since = time.time()
        self._cluster, self._targets = cluster, folder / "targets.json"
        folder.mkdir()
        address = f"{cluster.host_address}:{free_port(cluster.host_address)}"
        self.url = f"http://{address}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "5s"},
            "scrape_configs": [
                {"job_name": "pods", "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": "1s"}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._targets.write_text("[]")
        command = [
            build.program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._discover, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=2).close()
                return
            except OSError:
                said = (folder / "log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)

    def _discover(self) -> None:
        while not self._stopping.wait(1):
            try:
                pods = self._cluster.request("/api/v1/pods")["items"]
            except OSError:
                continue
            fresh = self._targets.with_suffix(".new")
            fresh.write_text(json.dumps([found for pod in pods for found in _scraped(pod)]))
            fresh.rename(self._targets)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._process.terminate()
        self._process.wait(20)


def _scraped(pod: Object) -> Iterator[Object]:
    """The pod's target with the labels that the chart's ServiceMonitor and PodMonitor give."""
    labels = pod["metadata"].get("labels", {})
    operator = labels.get("app.kubernetes.io/component") == "operator"
    if not operator and labels.get("app.kubernetes.io/managed-by") != "kubepeft-operator":
        return
    if pod["status"].get("phase") != "Running" or not pod["status"].get("podIP"):
        return
    given = {"job": "kubepeft-operator" if operator else "kubepeft-jobs"}
    given |= {"namespace": pod["metadata"]["namespace"], "pod": pod["metadata"]["name"]}
    for name, label in (("finetune", "kubepeft.io/fine-tune"), ("batchinference", "kubepeft.io/batch-inference")):
        if label in labels:
            given[name] = labels[label]
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            if port.get("name") == "metrics":
                yield {"targets": [f"{pod['status']['podIP']}:{port['containerPort']}"], "labels": given}


def _merged(under: Object, over: Mapping[str, Any]) -> Object:
    """`over` laid over `under`, mapping by mapping."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return out


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return value
