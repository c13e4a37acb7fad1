"""The Job that a stage gets: names, the stage's document, what the pods may do and see."""

import json
from typing import Any

import pytest

from kubepeft import stage
from kubepeft.storage.uri import parse_uri
from kubepeft.types.objects import BatchInferenceSpec, FineTuneSpec
from kubepeft_operator import job
from kubepeft_operator.config import Config
from kubepeft_operator.job import Owner, build, job_name
from tests.operator.world import CONFIG, FINE_TUNE, Object, World, changed

LONG = "a-name-that.has-" + 200 * "x"
OWNER = Owner("FineTune", "ml", "support-bot", "uid-ft", {})


def made(config: dict[str, Any] | None = None, **spec: Any) -> Object:
    """The prepare Job of a FineTune."""
    jobs = {"image": "registry.example/jobs:1", **(config or {})}
    world = World(changed(FINE_TUNE, **spec), config=Config.model_validate({"jobs": jobs}))
    world.settle()
    return world.job("prepare")


def pod(**arguments: Any) -> Object:
    spec: Object = made(**arguments)["spec"]["template"]["spec"]
    return spec


def env(spec: Object) -> dict[str, Any]:
    names = [one["name"] for one in spec["containers"][0]["env"]]
    assert len(names) == len(set(names)), "a name given twice"
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in spec["containers"][0]["env"]}


@pytest.mark.parametrize("name", ["a", "support-bot", "support.bot", LONG, "x" * 40 + "." + "y" * 40])
@pytest.mark.parametrize("of", ["prepare", "train", "infer"])
def test_a_job_name_leaves_room_for_pods_and_their_host_names(name: str, of: Any) -> None:
    found = job_name(Owner("FineTune", "ml", name, "uid", {}), of)
    assert len(found + "-999") <= 63 - len("-xxxxx")
    assert parse_uri(f"pvc://{found}").root == found
    assert "." not in found


def test_a_job_name_is_one_owners_alone() -> None:
    def named(name: str, uid: str) -> str:
        return job_name(Owner("FineTune", "ml", name, uid, {}), "train")

    assert named("a", "1") == named("a", "1")
    assert len({named("a", "1"), named("a", "2"), named(LONG, "3"), named(LONG + "y", "4")}) == 4


def test_labels_of_a_long_name_are_labels() -> None:
    owner = Owner("FineTune", "ml", LONG[:62] + "." + LONG, "uid", {})
    spec = FineTuneSpec.model_validate(FINE_TUNE["spec"])
    body = build(owner, spec, stage.prepare_stage("x", spec, "s3://b/x"), CONFIG)
    for value in body["metadata"]["labels"].values():
        assert len(value) <= 63
        assert value[-1] not in ".-"


def test_the_document_comes_by_the_downward_api_so_that_nothing_in_it_is_expanded() -> None:
    body = made(data={"train": "s3://b/$(HOME)/x.jsonl"})
    template = body["spec"]["template"]
    variables = env(template["spec"])
    assert variables["KUBEPEFT_STAGE"] == {"fieldRef": {"fieldPath": "metadata.annotations['kubepeft.io/document']"}}
    document = stage.loads(template["metadata"]["annotations"]["kubepeft.io/document"], local=False)
    assert isinstance(document, stage.PrepareStage)
    assert document.data.train == "s3://b/$(HOME)/x.jsonl"
    assert variables["KUBEPEFT_RESULT"] == template["spec"]["containers"][0]["terminationMessagePath"]
    assert variables["KUBEPEFT_ATTEMPT"] == "$(KUBEPEFT_POD_NAME)-$(KUBEPEFT_POD_UID)"


def test_pods_are_restricted_hold_no_token_and_may_write_to_their_own_volumes_only() -> None:
    spec = pod()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    container = spec["containers"][0]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    variables = env(spec)
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    assert {variables[name] for name in ("HOME", "TMPDIR")} == {"/tmp"}
    assert variables["HF_HOME"].startswith("/tmp/")
    assert spec["terminationGracePeriodSeconds"] >= 120


def test_65_ends_the_job_143_and_disruptions_are_tried_again_for_nothing_and_the_rest_counts() -> None:
    spec = made(backoffLimit=5)["spec"]
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [65]), ("Ignore", [143]), ("Ignore", None)]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (5, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in spec


def test_claims_of_addresses_are_mounted_and_only_the_output_can_be_written() -> None:
    body = made(
        model={"uri": "pvc://models/qwen"},
        data={"train": "pvc://data/train.jsonl", "eval": "pvc://data/eval.jsonl"},
        output={"uri": "pvc://results/out"},
    )
    spec = body["spec"]["template"]["spec"]
    claims = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in spec["volumes"][1:]}
    mounts = {
        claims[one["name"]]: (one["mountPath"], one.get("readOnly", False))
        for one in spec["containers"][0]["volumeMounts"][1:]
    }
    assert mounts == {
        "data": ("/mnt/claims/data", True),
        "models": ("/mnt/claims/models", True),
        "results": ("/mnt/claims/results", False),
    }
    text = body["spec"]["template"]["metadata"]["annotations"]["kubepeft.io/document"]
    assert json.loads(text)["mounts"] == {claim: folder for claim, (folder, _) in mounts.items()}


def test_a_cache_claim_keeps_models_between_pods() -> None:
    body = made(cache={"claim": "models"})
    variables = env(body["spec"]["template"]["spec"])
    assert variables["HF_HOME"] == "/mnt/cache/huggingface"
    text = body["spec"]["template"]["metadata"]["annotations"]["kubepeft.io/document"]
    assert json.loads(text)["cacheDir"] == "/mnt/cache/models"


def test_secrets_come_as_environment_and_are_never_read_here() -> None:
    container = pod(credentials={"s3": "s3-secret", "huggingFace": "hf-secret"})["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "s3-secret"}}, {"secretRef": {"name": "hf-secret"}}]


def test_the_manifests_environment_wins_over_the_installations_and_neither_over_ours() -> None:
    config = {"env": [{"name": "AWS_REGION", "value": "eu-1"}, {"name": "A", "value": "1"}]}
    variables = env(pod(config=config, pod={"env": [{"name": "AWS_REGION", "value": "us-1"}]}))
    assert (variables["AWS_REGION"], variables["A"]) == ("us-1", "1")


def test_a_ca_bundle_reaches_every_client() -> None:
    spec = pod(config={"caBundle": {"configMap": "our-ca", "key": "ca.pem"}})
    variables = env(spec)
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        assert variables[name] == "/etc/kubepeft/ca/ca.pem"
    assert {"name": "kubepeft-ca", "configMap": {"name": "our-ca"}} in spec["volumes"]


def test_the_manifests_figures_win_over_the_stages_defaults_and_never_contradict_them() -> None:
    defaults = {"requests": {"cpu": "500m", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}
    config = {"prepare": {"resources": defaults}}
    small = {"resources": {"limits": {"memory": "1Gi"}}}
    assert pod(config=config, pod=small)["containers"][0]["resources"] == {
        "requests": {"cpu": "500m"},
        "limits": {"memory": "1Gi"},
    }
    large = {"resources": {"requests": {"memory": "64Gi"}}}
    assert pod(config=config, pod=large)["containers"][0]["resources"] == {
        "requests": {"cpu": "500m", "memory": "64Gi"},
        "limits": {},
    }


def test_training_gets_gpus_and_shared_memory_where_it_has_several_workers() -> None:
    spec = FineTuneSpec.model_validate({**FINE_TUNE["spec"], "gpus": 2})
    prepared = stage.PreparedRef(digest="p", model_commit="c")
    document = stage.train_stage(stage.prepare_stage("x", spec, "s3://b/x"), prepared, 2)
    found = build(OWNER, spec, document, CONFIG)["spec"]["template"]["spec"]
    assert found["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert {"name": "kubepeft-shm", "emptyDir": {"medium": "Memory"}} in found["volumes"]


def test_a_folder_that_the_manifest_mounts_itself_is_left_to_it() -> None:
    own = {
        "volumes": [{"name": "big", "emptyDir": {"sizeLimit": "1Ti"}}],
        "volumeMounts": [{"name": "big", "mountPath": "/tmp"}],
    }
    spec = pod(pod=own)
    assert [one["name"] for one in spec["volumes"]] == ["big"]


def test_the_pods_of_an_inference_know_their_shard() -> None:
    spec = BatchInferenceSpec.model_validate(
        {"adapter": {"uri": "s3://b/a/adapter"}, "input": "s3://b/q.jsonl", "shards": 1000}
    )
    document = stage.infer_stage("x", spec, "s3://b/a/adapter", "s3://b/p")
    body = build(Owner("BatchInference", "ml", "x", "u", {}), spec, document, CONFIG)
    variables = env(body["spec"]["template"]["spec"])
    assert variables["KUBEPEFT_SHARD"]["fieldRef"]["fieldPath"].endswith("job-completion-index']")
    assert job.DOCUMENT in body["spec"]["template"]["metadata"]["annotations"]
