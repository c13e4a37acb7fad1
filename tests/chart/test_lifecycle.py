"""The release's life with a real Helm on a real API server: install, upgrade, rollback, uninstall, install again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chart.helm import CHART, NAMESPACE, RELEASE, HelmError, get, helm
from tests.cluster.control_plane import ControlPlane

FINE_TUNE = {
    "apiVersion": "kubepeft.io/v1alpha1",
    "kind": "FineTune",
    "metadata": {"name": "kept", "namespace": "default"},
    "spec": {"model": {"uri": "hf://a/b"}, "data": {"train": "s3://b/d.jsonl"}},
}


@pytest.fixture
def cluster(new_control_plane: Callable[..., ControlPlane]) -> ControlPlane:
    """One of its own: a release owns what belongs to the whole cluster."""
    return new_control_plane()


def test_a_release_lives_and_its_users_objects_outlive_it(cluster: ControlPlane, tmp_path: Path) -> None:
    def run(*arguments: str | Path, **values: object) -> str:
        return helm(*arguments, "--namespace", NAMESPACE, values=values or None, kubeconfig=cluster.kubeconfig)

    def columns() -> list[str]:
        (version,) = get(cluster, "crd", "finetunes.kubepeft.io")["spec"]["versions"]
        return [column["name"] for column in version["additionalPrinterColumns"]]

    notes = run("install", RELEASE, CHART, "--create-namespace")
    assert "kubectl get ft --watch" in notes
    assert "jobs.outputUri is not set" in notes
    cluster.kubectl("create", "-f", "-", input=json.dumps(FINE_TUNE))
    before = columns()
    assert "No resources" not in cluster.kubectl("get", "ft")

    # A newer chart: `helm upgrade` brings the definitions along.
    newer = tmp_path / "kubepeft"
    shutil.copytree(CHART, newer)
    definitions = (newer / "files" / "crds.yaml").read_text()
    (newer / "files" / "crds.yaml").write_text(definitions.replace("name: Loss\n", "name: Newer\n", 1))
    run("upgrade", RELEASE, newer, jobs={"outputUri": "s3://adapters"})
    assert columns() == ["Newer" if name == "Loss" else name for name in before]
    assert "s3://adapters" in get(cluster, "configmap", "kubepeft-operator", NAMESPACE)["data"]["config.yaml"]
    run("rollback", RELEASE, "1")
    assert columns() == before

    # Uninstalled, nothing of it is left but the definitions and what users made.
    told = run("uninstall", RELEASE)
    assert "finetunes.kubepeft.io" in told, "Helm says what it keeps"
    assert get(cluster, "finetune", "kept")["spec"]["model"] == {
        "uri": "hf://a/b",
        "dtype": "auto",
        "quantization": "none",
        "task": "CAUSAL_LM",
        "trustRemoteCode": False,
    }
    left = cluster.kubectl(
        "get", "all,configmaps,networkpolicies,pdb,roles,rolebindings", f"--namespace={NAMESPACE}", "--output=name"
    )
    assert [line for line in left.split() if "kubepeft" in line] == []
    policies = cluster.kubectl("get", "validatingadmissionpolicies,clusterroles,clusterrolebindings", "--output=name")
    assert "kubepeft" not in policies

    # Installed again it takes them up; and with crds.keep=false they go.
    run("install", RELEASE, CHART)
    assert cluster.kubectl("get", "ft", "kept", "--output=name")
    with pytest.raises(HelmError, match="invalid ownership metadata"):
        run("install", "second", CHART)
    run("upgrade", RELEASE, CHART, crds={"keep": False})
    cluster.kubectl("delete", "ft", "kept")
    run("uninstall", RELEASE)
    cluster.kubectl("wait", "--for=delete", "crd/finetunes.kubepeft.io", "--timeout=60s")
    with pytest.raises(RuntimeError, match="NotFound"):
        get(cluster, "crd", "finetunes.kubepeft.io")
