"""What nobody may see or do: secrets in anything that is shown or kept, tokens in pods, rights that the operator does not need."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from tests.chart.helm import NAMESPACE, RELEASE, render
from tests.e2e.installation import HUB_TOKEN, Installation, Team, fine_tune
from tests.servers import ACCESS_KEY, SECRET_KEY


def test_secrets_appear_in_nothing_that_is_shown_or_kept(team: Team, installation: Installation) -> None:
    team.apply(
        fine_tune("good", training={"maxSteps": 5, "saveStrategy": "no"}),
        fine_tune("bad", data={"train": "s3://data/nowhere.jsonl"}),
        fine_tune(
            "gated",
            model={"uri": "hf://nobody/nothing"},
            backoffLimit=0,
            pod={"env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]},
        ),
    )
    for name, end in (("good", "Succeeded"), ("bad", "Failed"), ("gated", "Failed")):
        team.wait_for(name, end)
    planted = [SECRET_KEY, HUB_TOKEN, ACCESS_KEY]
    looked_at = 0
    for where, text in everything(team, installation):
        looked_at += 1
        for value in planted:
            assert value not in text, f"a planted secret is in {where}"
    assert looked_at > 20


def everything(team: Team, installation: Installation) -> Iterator[tuple[str, str]]:
    """What a person or a program may come to see, and where it stands."""
    kinds = "finetunes,batchinferences,jobs,pods,events,configmaps"
    yield f"objects ({kinds})", team.kubectl("get", kinds, "-o", "yaml")
    for namespace in (team.namespace, NAMESPACE):
        for pod in team.cluster.request(f"/api/v1/namespaces/{namespace}/pods")["items"]:
            name = pod["metadata"]["name"]
            yield f"the log of {name}", team.cluster.kubectl("logs", "-n", namespace, name)
            for container in pod["status"].get("containerStatuses", ()):
                yield f"the termination message of {name}", json.dumps(container["state"])
    for file in (installation.s3.root / "adapters" / team.namespace).rglob("*"):
        if file.is_file():
            yield f"the object {file.relative_to(installation.s3.root)}", file.read_bytes().decode(errors="replace")


def test_pods_of_a_stage_hold_no_token_and_write_nowhere_but_to_their_own_volumes(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None, training={"maxSteps": 2000}))
    pod = team.running("train", "bot")["metadata"]["name"]
    program = """
import json, os, pathlib
def writable(folder):
    try:
        path = pathlib.Path(folder, ".try")
        path.write_text("x")
        path.unlink()
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(),
    "token": os.path.exists("/var/run/secrets/kubernetes.io"),
    "writable": [one for one in ("/", "/app", "/opt", "/etc", "/root", "/usr", "/var", "/tmp") if writable(one)],
    "capabilities": status["CapEff"].strip(), "no_new_privileges": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "kubernetes": [name for name in os.environ if name.endswith("_SERVICE_HOST")],
}))
"""
    inside = ("exec", "--namespace", team.namespace, pod, "--", "python", "-c", program)
    found = json.loads(team.cluster.kubectl(*inside))
    assert found == {
        "uid": 65532,
        "gid": 65532,
        "token": False,
        "writable": ["/tmp"],
        "capabilities": "0000000000000000",
        "no_new_privileges": "1",
        "seccomp": "2",
        "kubernetes": ["KUBERNETES_SERVICE_HOST"],  # the kubelet's own; other Services' addresses stay out
    }


def test_the_operator_uses_no_right_that_the_chart_does_not_give(installation: Installation) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:{RELEASE}-operator"
    used = set()
    for call in installation.cluster.api_calls(user=account):
        if "objectRef" not in call:
            continue  # discovery and health
        assert call["annotations"]["authorization.k8s.io/decision"] == "allow", call
        about = call["objectRef"]
        resource = "/".join(part for part in (about["resource"], about.get("subresource")) if part)
        used.add((about.get("apiGroup", ""), resource, call["verb"]))
    granted = set(rights(render(installation.values)))
    assert used <= granted, f"used and not granted by the chart's own rules: {used - granted}"
    assert len(used) > 10


def rights(objects: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(group, resource, verb) of the Roles that the operator's account is bound to."""
    bound = {
        one["roleRef"]["name"]
        for one in objects
        if one["kind"] in ("RoleBinding", "ClusterRoleBinding")
        and any(subject["name"] == f"{RELEASE}-operator" for subject in one["subjects"])
    }
    for one in objects:
        if one["kind"] in ("Role", "ClusterRole") and one["metadata"]["name"] in bound:
            for rule in one["rules"]:
                assert "*" not in yaml.safe_dump(rule), rule
                yield from (
                    (group, resource, verb)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                )
