"""Nobody gets through a FineTune what they could not get by themselves: real users, RBAC and the chart's policy on a real API server."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chart.helm import NAMESPACE, Object, get, of_kind, only, render
from tests.cluster.control_plane import ControlPlane

FINE_TUNE: Object = {"model": {"uri": "hf://a/b"}, "data": {"train": "s3://b/d.jsonl"}, "output": {"uri": "s3://b/o"}}
BATCH: Object = {"adapter": {"uri": "s3://b/o/adapter"}, "input": "s3://b/q.jsonl"}
SECRETS: dict[str, Object] = {
    "credentials.s3": {"credentials": {"s3": "theirs"}},
    "credentials.huggingFace": {"credentials": {"huggingFace": "theirs"}},
    "pod.env": {
        "pod": {
            "env": [
                {"name": "A", "value": "1"},
                {"name": "T", "valueFrom": {"secretKeyRef": {"name": "theirs", "key": "k"}}},
            ]
        }
    },
    "pod.imagePullSecrets": {"pod": {"imagePullSecrets": [{"name": "ours"}, {"name": "theirs"}]}},
    "one among several": {
        "credentials": {"s3": "ours", "huggingFace": "theirs"},
        "pod": {"imagePullSecrets": [{"name": "ours"}]},
    },
}
"""Every place where a spec names a Secret."""

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(chart_cluster: ControlPlane) -> Iterator[ControlPlane]:
    """With the chart's definitions, policy and roles, two namespaces, and their people."""
    wanted = (
        "CustomResourceDefinition",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
    )
    objects = [one for kind in wanted for one in of_kind(render(), kind)]
    chart_cluster.apply(
        *(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            for name in (NAMESPACE, "team", "other")
        )
    )
    chart_cluster.apply(*of_kind(objects, "CustomResourceDefinition"))
    chart_cluster.kubectl("wait", "--for=condition=Established", "crd", "--all")
    chart_cluster.apply(*objects)
    chart_cluster.apply(
        role("reads-ours", [rule("", "secrets", ["get"], names=["ours"])]),
        role("tunes-only", [rule("kubepeft.io", "finetunes,batchinferences", ["create", "get", "patch", "update"])]),
        role("reads-all", [rule("", "secrets", ["get"])]),
        # `edit` holds the right to read all Secrets: what a careful team grants instead.
        role(
            "tunes",
            [
                rule("kubepeft.io", "finetunes,batchinferences", ["create", "get", "patch", "update", "delete"]),
                rule("", "pods", ["create"]),
            ],
        ),
        *binding("ann", "tunes", "reads-ours"),
        *binding("bob", "tunes-only", "reads-all"),
        *binding("eve", "tunes"),
        *binding("max", "tunes", "reads-all"),
    )
    wait_for_the_policy(chart_cluster)
    yield chart_cluster
    chart_cluster.kubectl("delete", "finetunes,batchinferences", "--all", "--namespace=team")
    for one in reversed(objects):
        place = [f"--namespace={NAMESPACE}"] if "namespace" in one["metadata"] else []
        chart_cluster.kubectl("delete", "--ignore-not-found", one["kind"], one["metadata"]["name"], *place)


def rule(group: str, resources: str, verbs: list[str], names: list[str] | None = None) -> Object:
    found: Object = {"apiGroups": [group], "resources": resources.split(","), "verbs": verbs}
    return found | ({"resourceNames": names} if names else {})


def role(name: str, rules: list[Object]) -> Object:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": name, "namespace": "team"},
        "rules": rules,
    }


def binding(user: str, *roles: str) -> list[Object]:
    group = "rbac.authorization.k8s.io"
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{user}-{name}", "namespace": "team"},
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        }
        for name in roles
    ]


def wait_for_the_policy(cluster: ControlPlane) -> None:
    """Policies act a moment after they were made; and their type check is a controller's."""
    deadline = time.monotonic() + 30
    while True:
        refused = create(cluster, "eve", "FineTune", FINE_TUNE | {"credentials": {"s3": "theirs"}}, dry_run=True)
        checked = get(cluster, "validatingadmissionpolicy", "kubepeft-may-run").get("status", {}).get("typeChecking")
        if refused and checked is not None:
            return
        assert time.monotonic() < deadline, "the policy does not act"
        time.sleep(0.1)


def create(cluster: ControlPlane, user: str, kind: str, spec: Object, *, dry_run: bool = False, name: str = "") -> str:
    """Create an object as a user. Returns what the server says against it, "" where it takes it."""
    body = {
        "apiVersion": "kubepeft.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name or f"x{next(_numbers)}", "namespace": "team"},
        "spec": spec,
    }
    return tried(cluster, user, "create", *(["--dry-run=server"] if dry_run else []), "-f", "-", input=json.dumps(body))


def tried(cluster: ControlPlane, user: str, *arguments: str, input: str | None = None) -> str:
    try:
        cluster.kubectl(*arguments, "--namespace=team", input=input, kubeconfig=kubeconfig(cluster, user))
    except RuntimeError as error:
        return str(error)
    return ""


def kubeconfig(cluster: ControlPlane, user: str) -> Path:
    known = cluster.folder / f"user-{user}.kubeconfig"
    return known if known.exists() else cluster.kubeconfig_for(user)


@pytest.mark.parametrize("kind, base", [("FineTune", FINE_TUNE), ("BatchInference", BATCH)])
@pytest.mark.parametrize("place", SECRETS)
def test_a_secret_that_one_may_not_read_can_t_be_named(
    cluster: ControlPlane, kind: str, base: Object, place: str
) -> None:
    assert create(cluster, "max", kind, base | SECRETS[place]) == ""
    told = create(cluster, "ann", kind, base | SECRETS[place])
    assert "ann may not read the Secret theirs of the namespace team" in told
    assert "Forbidden" in told


@pytest.mark.parametrize("kind, base", [("FineTune", FINE_TUNE), ("BatchInference", BATCH)])
def test_a_secret_that_one_may_read_can_be_named(cluster: ControlPlane, kind: str, base: Object) -> None:
    assert create(cluster, "ann", kind, base | {"credentials": {"s3": "ours", "huggingFace": "ours"}}) == ""
    assert create(cluster, "eve", kind, base) == "", "none named, none to be read"


@pytest.mark.parametrize("kind, base", [("FineTune", FINE_TUNE), ("BatchInference", BATCH)])
def test_whoever_may_not_create_pods_may_not_create_what_makes_them(
    cluster: ControlPlane, kind: str, base: Object
) -> None:
    assert "bob may not create pods in the namespace team" in create(cluster, "bob", kind, base)


def test_a_right_in_another_namespace_does_not_count(cluster: ControlPlane) -> None:
    cluster.apply(
        *(
            {**one, "metadata": {"name": one["metadata"]["name"], "namespace": "other"}}
            for one in (role("all", [rule("", "secrets", ["get"])]), *binding("eve", "all"))
        )
    )
    assert "eve may not read the Secret theirs" in create(
        cluster, "eve", "FineTune", FINE_TUNE | SECRETS["credentials.s3"]
    )


def test_each_of_many_secrets_is_looked_at(cluster: ControlPlane) -> None:
    """The cost of a policy is limited: past sixteen, the right to read all of them is asked for."""

    def names(count: int) -> Object:
        sources = [
            {"name": f"V{n}", "valueFrom": {"secretKeyRef": {"name": f"s{n}", "key": "k"}}} for n in range(count)
        ]
        return FINE_TUNE | {"pod": {"env": sources}}

    def readable(count: int) -> Object:
        return role("reads-some", [rule("", "secrets", ["get"], names=[f"s{n}" for n in range(count)])])

    cluster.apply(readable(16), *binding("ann", "reads-some"))
    assert create(cluster, "ann", "FineTune", names(16)) == ""
    cluster.apply(readable(15))
    assert "ann may not read the Secret s15" in create(cluster, "ann", "FineTune", names(16))
    cluster.apply(readable(17))
    assert "names more than 16 Secrets" in create(cluster, "ann", "FineTune", names(17))
    assert create(cluster, "max", "FineTune", names(60)) == ""


def test_the_operator_is_not_asked(cluster: ControlPlane) -> None:
    """It makes a FineTune's BatchInference with the Secrets that the FineTune's maker was asked about; it may read no Secret itself."""
    config = cluster.kubeconfig_for_service_account(NAMESPACE, "kubepeft-operator")
    body = {
        "apiVersion": "kubepeft.io/v1alpha1",
        "kind": "BatchInference",
        "metadata": {"name": "made"},
        "spec": BATCH | SECRETS["credentials.s3"],
    }
    cluster.kubectl("create", "--namespace=team", "-f", "-", input=json.dumps(body), kubeconfig=config)
    with pytest.raises(RuntimeError, match="cannot get resource"):
        cluster.kubectl("get", "secret", "theirs", "--namespace=team", kubeconfig=config)
    # Status writes of an object that names a Secret, and the change of suspend that it passes on.
    cluster.kubectl(
        "patch",
        "batchinference",
        "made",
        "--namespace=team",
        "--type=merge",
        '--patch={"spec":{"suspend":true}}',
        kubeconfig=config,
    )
    now = get(cluster, "batchinference", "made", "team") | {"status": {"phase": "Pending"}}
    cluster.kubectl("replace", "--subresource=status", "-f", "-", input=json.dumps(now), kubeconfig=config)
    assert get(cluster, "batchinference", "made", "team")["status"]["phase"] == "Pending"


def test_a_change_is_asked_about_when_it_changes_what_runs(cluster: ControlPlane) -> None:
    assert create(cluster, "max", "FineTune", FINE_TUNE | SECRETS["credentials.s3"], name="changed") == ""

    def patch(user: str, body: Any) -> str:
        return tried(cluster, user, "patch", "finetune", "changed", "--type=merge", f"--patch={json.dumps(body)}")

    assert "eve may not read the Secret theirs" in patch("eve", {"spec": {"suspend": True}})
    assert patch("max", {"spec": {"suspend": True}}) == ""
    assert patch("eve", {"metadata": {"labels": {"a": "b"}, "finalizers": ["example.com/x"]}}) == "", (
        "labels and finalizers name no Secret"
    )
    assert patch("eve", {"metadata": {"finalizers": None}}) == ""


def test_the_policy_agrees_with_the_definitions(cluster: ControlPlane) -> None:
    """The API server checks the policy's expressions against the schema of both kinds: a renamed field would be found here."""
    checked = get(cluster, "validatingadmissionpolicy", "kubepeft-may-run")["status"]["typeChecking"]
    assert not checked.get("expressionWarnings"), checked


def test_only_the_operator_is_exempt() -> None:
    (condition, _) = only(render(), "ValidatingAdmissionPolicy")["spec"]["matchConditions"]
    assert (
        condition["expression"]
        == """!(request.userInfo.username in ["system:serviceaccount:kubepeft-system:kubepeft-operator"])"""
    )
