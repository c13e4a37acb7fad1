"""What the chart makes of values: refused where they are wrong, else accepted by a real API server and read by the operator itself."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.alias_generators import to_camel

from kubepeft_operator import config
from tests.chart.helm import CHART, NAMESPACE, HelmError, Object, helm, of_kind, only, render
from tests.cluster import build
from tests.cluster.control_plane import ControlPlane

DIGEST = "sha256:" + 64 * "a"
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one replica without election": {"replicaCount": 1, "config": {"leaderElection": {"enabled": False}}},
    "two namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "pinned images": {
        "image": {"repository": "registry.example/operator", "digest": DIGEST},
        "jobs": {
            "image": {"repository": "registry.example:5000/jobs", "tag": "v1", "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "pull"}],
        },
        "imagePullSecrets": [{"name": "pull"}],
    },
    "S3 of one's own": {
        "jobs": {
            "outputUri": "s3://adapters",
            "s3": {"endpoint": "https://minio.storage:9000", "region": "eu-west-1"},
            "caBundle": {"configMap": "company-ca", "key": "bundle.pem"},
            "env": [
                {"name": "HF_ENDPOINT", "value": "https://hub.example"},
                {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
            ],
        }
    },
    "workload identity": {"jobs": {"serviceAccountName": "trainer", "outputUri": "s3://adapters/all"}},
    "scheduling": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {},
            }
        ],
        "jobs": {
            "prepare": {"nodeSelector": {"pool": "cpu"}, "resources": {"limits": {"memory": "8Gi"}}},
            "train": {
                "nodeSelector": {"pool": "gpu"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "priorityClassName": "batch",
                "runtimeClassName": "nvidia",
                "gracePeriodSeconds": 300,
                "resources": {"requests": {"cpu": 8, "memory": "64Gi"}},
            },
            "gpuResource": "amd.com/gpu",
            "runAsUser": 1000,
            "labels": {"team": "ml"},
            "annotations": {"sidecar.istio.io/inject": "false"},
        },
    },
    "closed network": {
        "networkPolicy": {
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "jobs": {
                "namespaces": ["team-a"],
                "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9000, "protocol": "TCP"}]}],
            },
        }
    },
    "as little as possible": {
        "crds": {"install": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "mine"},
        "admissionPolicy": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "monitoring": {
            "serviceMonitor": {"enabled": False},
            "podMonitor": {"enabled": False},
            "prometheusRule": {"enabled": False},
        },
        "dashboards": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
    "decorated": {
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "serviceAccount": {"annotations": {"iam": "role"}},
        "dashboards": {"labels": {"grafana": "yes"}, "annotations": {"folder": "ml"}},
        "monitoring": {"podMonitor": {"labels": {"release": "prometheus"}}},
        "admissionPolicy": {"exemptUsers": ["system:serviceaccount:argocd:argocd"]},
        "fullnameOverride": "tuning",
    },
    "nothing acts": {"replicaCount": 0},
}
"""A name → values. Together they touch every branch of the templates."""


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    return {name: render(values) for name, values in VALUES.items()}


@pytest.mark.parametrize("name", VALUES)
def test_lint_finds_nothing(name: str) -> None:
    helm("lint", "--strict", CHART, values=VALUES[name])


@pytest.fixture(scope="module")
def monitored_cluster(chart_cluster: ControlPlane) -> Iterator[ControlPlane]:
    """With prometheus-operator's own CRDs."""
    files = build.PARTS["prometheus-operator"].programs
    for file in files:
        chart_cluster.kubectl("apply", "--server-side", "-f", str(build.program(file)))
    chart_cluster.kubectl("wait", "--for=condition=Established", "crd", "--all")
    yield chart_cluster
    for file in files:
        chart_cluster.kubectl("delete", "-f", str(build.program(file)))


@pytest.mark.parametrize("name", VALUES)
def test_the_api_server_takes_every_object(
    rendered: dict[str, list[Object]], name: str, monitored_cluster: ControlPlane
) -> None:
    objects = rendered[name]
    namespaces = {one["metadata"].get("namespace") for one in objects} - {None}
    monitored_cluster.apply(
        *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": one}} for one in namespaces)
    )
    told = monitored_cluster.kubectl(
        "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", input=yaml.safe_dump_all(objects)
    )
    assert len(told.splitlines()) == len(objects)


def configuration(objects: list[Object], folder: Path) -> config.Config:
    """What the operator reads out of the ConfigMap."""
    text = next(one for one in of_kind(objects, "ConfigMap") if "config.yaml" in one["data"])["data"]["config.yaml"]
    file = folder / "config.yaml"
    file.write_text(text)
    return config.load(file)


@pytest.mark.parametrize("name", VALUES)
def test_the_operator_reads_its_configuration(rendered: dict[str, list[Object]], name: str, tmp_path: Path) -> None:
    read = configuration(rendered[name], tmp_path)
    assert read.watch_namespaces == VALUES[name].get("watchNamespaces", [])


def test_values_arrive_in_the_configuration(rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    jobs = configuration(rendered["S3 of one's own"], tmp_path).jobs
    assert jobs.output_uri == "s3://adapters"
    assert {one.name: one.value for one in jobs.env if one.value} == {
        "AWS_ENDPOINT_URL": "https://minio.storage:9000",
        "AWS_REGION": "eu-west-1",
        "HF_ENDPOINT": "https://hub.example",
    }
    assert jobs.ca_bundle == config.CaBundle.model_validate({"configMap": "company-ca", "key": "bundle.pem"})
    jobs = configuration(rendered["pinned images"], tmp_path).jobs
    assert (jobs.image, jobs.image_pull_policy) == ("registry.example:5000/jobs:v1", "Always")
    assert [one.name for one in jobs.image_pull_secrets] == ["pull"]
    jobs = configuration(rendered["scheduling"], tmp_path).jobs
    assert (jobs.gpu_resource, jobs.run_as_user, jobs.labels) == ("amd.com/gpu", 1000, {"team": "ml"})
    assert jobs.train.resources.requests == {"cpu": 8, "memory": "64Gi"}
    assert (jobs.train.grace_period_seconds, jobs.train.runtime_class_name) == (300, "nvidia")
    assert jobs.train.tolerations[0].key == "nvidia.com/gpu"
    assert jobs.prepare.node_selector == {"pool": "cpu"}
    assert jobs.infer == configuration(rendered["defaults"], tmp_path).jobs.infer


def test_every_field_of_the_configuration_is_a_value() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def fields(of: type[config.Type]) -> set[str]:
        return {to_camel(name) for name in of.model_fields}

    assert set(values["config"]) == fields(config.Config) - {"jobs", "watchNamespaces", "metricsPort", "healthPort"}
    assert set(values["config"]["leaderElection"]) == fields(config.LeaderElection)
    # The pull policy goes with the image, and S3's address is a variable of the environment.
    assert set(values["jobs"]) == fields(config.JobDefaults) - {"imagePullPolicy"} | {"s3"}
    for stage in ("prepare", "train", "infer"):
        assert set(values["jobs"][stage]) == fields(config.StageDefaults)


def test_every_value_is_in_the_schema_and_only_those() -> None:
    values, schema = (
        yaml.safe_load((CHART / "values.yaml").read_text()),
        yaml.safe_load((CHART / "values.schema.json").read_text()),
    )

    def compare(value: Any, node: dict[str, Any], path: str) -> None:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if "properties" in node and isinstance(value, dict):
            absent = set(node["properties"]) - set(value) - ({"global"} if not path else set())
            assert not absent or path.endswith("resources"), f"{path}: {absent} is in the schema and not in values.yaml"
            for name, inner in value.items():
                assert name in node["properties"], f"{path}.{name}"
                compare(inner, node["properties"][name], f"{path}.{name}")

    compare(values, schema, "")


BAD_VALUES = {
    "a misspelt value": {"replicas": 3},
    "a misspelt value within": {"jobs": {"train": {"nodeSelektor": {}}}},
    "root": {"jobs": {"runAsUser": 0}},
    "a namespace with capitals": {"watchNamespaces": ["Team"]},
    "a digest that is none": {"image": {"digest": "latest"}},
    "an output without a scheme": {"jobs": {"outputUri": "adapters"}},
    "an endpoint without a scheme": {"jobs": {"s3": {"endpoint": "minio:9000"}}},
    "too short a grace period": {"jobs": {"infer": {"gracePeriodSeconds": 5}}},
    "a name of kubepeft's own": {"jobs": {"env": [{"name": "KUBEPEFT_STAGE", "value": "x"}]}},
    "a number where a text must be": {"jobs": {"env": [{"name": "A", "value": 1}]}},
    "a label that is no text": {"podLabels": {"a": 1}},
    "no workers": {"config": {"workers": 0}},
    "two replicas that would both act": {"config": {"leaderElection": {"enabled": False}}},
    "no account": {"serviceAccount": {"create": False}},
    "a user's name with a quote": {"admissionPolicy": {"exemptUsers": ["it's"]}},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused(name: str) -> None:
    with pytest.raises(HelmError):
        render(BAD_VALUES[name])


def test_the_definitions_are_those_of_the_types(rendered: dict[str, list[Object]]) -> None:
    """And `helm uninstall` leaves them, and so everyone's objects, unless told otherwise."""
    expected = list(yaml.safe_load_all((CHART / "files/crds.yaml").read_text()))
    found = copy.deepcopy(of_kind(rendered["defaults"], "CustomResourceDefinition"))
    assert [one["metadata"].pop("annotations") for one in found] == 2 * [{"helm.sh/resource-policy": "keep"}]
    assert found == expected
    assert of_kind(render({"crds": {"keep": False}}), "CustomResourceDefinition") == expected
    assert not of_kind(rendered["as little as possible"], "CustomResourceDefinition")


@pytest.mark.parametrize("name", VALUES)
def test_pods_pass_the_restricted_standard(
    rendered: dict[str, list[Object]], name: str, chart_cluster: ControlPlane
) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    chart_cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "restricted", "labels": label}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator", "namespace": "restricted"}},
    )
    template = only(rendered[name], "Deployment")["spec"]["template"]
    template["spec"] = template["spec"] | {"serviceAccountName": "operator"}
    test = only(rendered[name], "Pod")
    for pod in (template, test):
        metadata = {"name": "x", "namespace": "restricted", "labels": pod["metadata"]["labels"]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        assert body["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        chart_cluster.kubectl("create", "--dry-run=server", "-f", "-", input=yaml.safe_dump(body))


def test_a_change_of_the_configuration_starts_the_operator_anew(rendered: dict[str, list[Object]]) -> None:
    def checksum(name: str) -> str:
        return str(only(rendered[name], "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert checksum("workload identity") != checksum("defaults") == checksum("decorated")


def test_an_install_makes_monitors_where_the_cluster_knows_them(monitored_cluster: ControlPlane) -> None:
    told = helm(
        "install", "fresh", CHART, "--dry-run=server", "--hide-notes", "--set=crds.install=false",
        kubeconfig=monitored_cluster.kubeconfig,
    )  # fmt: skip
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= set(re.findall(r"^kind: (\w+)$", told, re.MULTILINE))


def test_monitors_are_left_out_where_the_cluster_does_not_know_them() -> None:
    objects = render(apis=())
    assert not [one for one in objects if one["apiVersion"].startswith("monitoring")]
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= {one["kind"] for one in render()}


def test_objects_have_the_chart_s_labels_and_a_namespace_of_the_release(rendered: dict[str, list[Object]]) -> None:
    for objects in rendered.values():
        for one in objects:
            if one["kind"] != "CustomResourceDefinition":
                assert one["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm", one
            if one["kind"] in ("Deployment", "ConfigMap", "Service", "ServiceAccount", "PodDisruptionBudget"):
                assert one["metadata"]["namespace"] == NAMESPACE
