"""The operator's rights are those that it uses: its whole life under the chart's own account, read off the API server's audit log."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kubepeft_operator.reconcile import BATCH_INFERENCES
from kubepeft_operator.runtime.api import Api, Object, Resource
from tests.chart.helm import of_kind, only, render
from tests.cluster.control_plane import ControlPlane
from tests.operator.harness import Cluster, eventually, operator
from tests.operator.player import Play, Player, stage_of
from tests.operator.world import FINE_TUNE, INFERENCE, changed

Right = tuple[str, str, str]
"""API group, resource with subresource, verb."""
ACCOUNT = "kubepeft-operator"
RARE: dict[Right, str] = {
    ("kubepeft.io", "finetunes/finalizers", "update"): "asked by OwnerReferencesPermissionEnforcement, never called",
    (
        "kubepeft.io",
        "batchinferences/finalizers",
        "update",
    ): "asked by OwnerReferencesPermissionEnforcement, never called",
    ("batch", "jobs", "get"): "after a Job's name was taken",
    (
        "kubepeft.io",
        "batchinferences",
        "get",
    ): "after its name was taken, or before a Job is made without a change of status",
    ("kubepeft.io", "finetunes", "get"): "before a Job is made without a change of status",
    ("events.k8s.io", "events", "patch"): "the same event again after a minute",
}
"""Rights that a short life need not use, and when they are used."""


def rights(rules: list[Object]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_rights_are_the_same_in_every_namespace_and_hold_no_wildcard_and_no_secret() -> None:
    whole, some = render(), render({"watchNamespaces": ["a", "b"]})
    (everywhere,) = [one for one in of_kind(whole, "ClusterRole") if one["metadata"]["name"] == ACCOUNT]
    roles = [one for one in of_kind(some, "Role") if one["metadata"]["name"] == ACCOUNT]
    assert [one["metadata"]["namespace"] for one in roles] == ["a", "b"]
    assert all(one["rules"] == everywhere["rules"] for one in roles)
    assert not of_kind(some, "ClusterRoleBinding")
    assert {one["metadata"]["name"] for one in of_kind(some, "ClusterRole")} == {"kubepeft-edit", "kubepeft-view"}
    for role in (*of_kind(whole, "ClusterRole"), *of_kind(whole, "Role"), *roles):
        for group, resource, verb in rights(role["rules"]):
            assert "*" not in (group, resource, verb)
            assert resource not in ("secrets", "configmaps", "serviceaccounts", "pods/exec", "pods/proxy", "nodes")


@pytest.fixture(scope="module")
def installed(chart_cluster: ControlPlane) -> Iterator[str]:
    """The chart's account and rights in a namespace that it watches alone, and that it lives in."""
    namespace = "rbac"
    chart_cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    objects = render({"watchNamespaces": [namespace]}, namespace=namespace)
    wanted = [
        one
        for kind in ("CustomResourceDefinition", "ServiceAccount", "Role", "RoleBinding")
        for one in of_kind(objects, kind)
    ]
    chart_cluster.apply(*wanted)
    chart_cluster.kubectl("wait", "--for=condition=Established", "crd", "--all")
    yield namespace
    chart_cluster.kubectl(
        "delete", "finetunes,batchinferences,jobs,resourcequotas", "--all", f"--namespace={namespace}"
    )
    chart_cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def test_the_operator_may_do_what_it_calls_and_little_else(
    chart_cluster: ControlPlane, installed: str, tmp_path: Path
) -> None:
    admin = Api.connect(chart_cluster.kubeconfig, user_agent="test")
    player = Player(admin)
    player.start()
    cluster = Cluster(admin, installed)
    quotas = Resource("", "v1", "resourcequotas", "ResourceQuota")
    account = chart_cluster.kubeconfig_for_service_account(installed, ACCOUNT)
    try:
        with operator(account, installed, tmp_path, leaderElection={"leaseDuration": 15}) as running:
            # To its end, with predictions; then the Jobs are removed.
            cluster.create(changed(FINE_TUNE, **INFERENCE, ttlSecondsAfterFinished=0))
            eventually(lambda: cluster.phase() == "Succeeded", 60, cluster.status)
            # Suspended and resumed while it trains, and while it answers.
            player.script = lambda pod: Play(runs=None) if stage_of(pod) == "train" else Play()
            cluster.create(changed(FINE_TUNE, **INFERENCE), "held")
            eventually(lambda: cluster.phase("held") == "Training", 60)
            cluster.patch({"suspend": True}, "held")
            eventually(lambda: cluster.phase("held") == "Suspended", 60)
            player.script = lambda pod: Play(runs=None) if stage_of(pod) == "infer" else Play()
            cluster.patch({"suspend": False}, "held")
            # The phase is written first, and then the BatchInference is made.
            eventually(
                lambda: "held" in [one["metadata"]["name"] for one in admin.list(BATCH_INFERENCES, installed)], 60
            )
            cluster.patch({"suspend": True}, "held")
            eventually(lambda: cluster.inference("held")["spec"].get("suspend"), 60)
            # Refused by a quota: why is found in the Job's events.
            admin.create(
                quotas,
                installed,
                {
                    "apiVersion": "v1",
                    "kind": "ResourceQuota",
                    "metadata": {"name": "none"},
                    "spec": {"hard": {"pods": "0"}},
                },
            )
            cluster.create(changed(FINE_TUNE), "refused")
            eventually(
                lambda: cluster.reason("Complete", "refused") == "QuotaExceeded", 60, lambda: cluster.status("refused")
            )
            eventually(
                lambda: (
                    len(
                        [
                            one
                            for one in cluster.jobs()
                            if one["metadata"]["ownerReferences"][0]["name"] == "support-bot"
                        ]
                    )
                    == 0
                ),
                60,
            )
            assert running.stop() == 0
    finally:
        player.stop()
        admin.close()
    calls = chart_cluster.api_calls(user=f"system:serviceaccount:{installed}:{ACCOUNT}")
    refused = [
        one
        for one in calls
        if one["responseStatus"]["code"] in (401, 403) and "quota" not in str(one["responseStatus"])
    ]
    assert refused == []
    called = {right(one["objectRef"], one["verb"]) for one in calls}
    granted = {
        one for role in of_kind(render({"watchNamespaces": [installed]}), "Role") for one in rights(role["rules"])
    }
    assert called <= granted
    assert granted - called <= set(RARE), "a right that the operator does not use"


def right(reference: Object, verb: str) -> Right:
    subresource = f"/{reference['subresource']}" if "subresource" in reference else ""
    return reference.get("apiGroup", ""), reference["resource"] + subresource, verb


@pytest.mark.usefixtures("installed")
def test_users_get_their_roles_by_aggregation(chart_cluster: ControlPlane) -> None:
    roles = [one for one in of_kind(render(), "ClusterRole") if one["metadata"]["name"] != ACCOUNT]
    chart_cluster.apply(*roles, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "people"}})
    for user in ("view", "edit"):
        chart_cluster.kubectl(
            "create", "rolebinding", user, f"--clusterrole={user}", f"--user={user}", "--namespace=people"
        )

    def may(user: str, verb: str, resource: str, *more: str) -> bool:
        try:
            return (
                chart_cluster.kubectl(
                    "auth", "can-i", verb, resource, *more, f"--as={user}", "--namespace=people"
                ).strip()
                == "yes"
            )
        except RuntimeError:
            return False

    eventually(lambda: may("edit", "create", "finetunes.kubepeft.io"))
    eventually(lambda: may("view", "list", "batchinferences.kubepeft.io"))
    assert may("edit", "patch", "batchinferences.kubepeft.io")
    assert not may("edit", "update", "finetunes.kubepeft.io", "--subresource=status"), "the status is the operator's"
    assert not may("view", "create", "finetunes.kubepeft.io")
    chart_cluster.kubectl("delete", "namespace", "people", "--wait=false")
    chart_cluster.kubectl("delete", "clusterrole", *(one["metadata"]["name"] for one in roles))


def test_an_account_of_one_s_own_gets_no_role() -> None:
    objects = render({"rbac": {"create": False}, "serviceAccount": {"create": False, "name": "mine"}})
    assert not of_kind(objects, "Role") + of_kind(objects, "ClusterRoleBinding") + of_kind(objects, "ServiceAccount")
    assert only(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
