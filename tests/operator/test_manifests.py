"""One table of good and bad manifests, held up to the local validation and to a real API server: both take and refuse the same.

A rule of the types (CEL on the server) is told in the same words on both sides. What the schema itself refuses, the server tells in words of
its own; there both name the same field.
"""

import copy
import re
from typing import Any

import pytest

from kubepeft import manifest
from kubepeft.errors import UserError
from kubepeft_operator.reconcile import BATCH_INFERENCES, FINE_TUNES
from kubepeft_operator.runtime.api import Api, ApiError
from tests.operator.world import BATCH_INFERENCE, FINE_TUNE, Object

LEAST = {
    "FineTune": {"model": {"uri": "hf://a/b"}, "data": {"train": "s3://bucket/data.jsonl"}},
    "BatchInference": {"adapter": {"uri": "s3://bucket/adapter"}, "input": "s3://bucket/questions.jsonl"},
}
VOLUME = {"name": "v", "emptyDir": {}}

GOOD: dict[str, tuple[str, Object]] = {
    "the least": ("FineTune", {}),
    "LoRA with fields of its own": ("FineTune", {"method": {"lora": {"r": 16, "targetModules": ["q_proj"], "rankPattern": {"q": 4}}}}),
    "prompt tuning from a text": ("FineTune", {"method": {"promptTuning": {"promptTuningInit": "TEXT", "promptTuningInitText": "Hi"}}}),
    "any PEFT method": ("FineTune", {"method": {"peft": {"type": "IA3", "config": {"feedforward_modules": ["w"]}}}}),
    "a whole number where a fraction may stand": ("FineTune", {"training": {"numTrainEpochs": 3, "learningRate": 1, "warmupSteps": 20}}),
    "training arguments": ("FineTune", {"training": {"learningRate": 2e-4, "lrSchedulerKwargs": {"num_cycles": 2}, "reportTo": ["wandb"]}}),
    "early stopping with data to evaluate on": ("FineTune", {"data": {"train": "s3://b/d", "evalFraction": 0.1}, "training": {"earlyStoppingPatience": 3}}),
    "inference, a cache and credentials": ("FineTune", {"inference": {"input": "s3://b/q.jsonl", "shards": 4}, "cache": {"claim": "models"}, "credentials": {"s3": "s", "huggingFace": "h"}}),
    "the pod": ("FineTune", {"pod": {
        "nodeSelector": {"gpu": "a100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}], "affinity": {"nodeAffinity": {}},
        "resources": {"limits": {"memory": "16Gi", "cpu": 4}}, "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "volumes": [VOLUME], "volumeMounts": [{"name": "v", "mountPath": "/v"}], "labels": {"team": "ml"},
    }}),
    "an inference with an adapter of a FineTune": ("BatchInference", {"adapter": {"fineTune": "support-bot"}, "doSample": True, "temperature": 0.7, "topP": 0.9}),
}  # fmt: skip

RULES: dict[str, tuple[str, Object, str]] = {
    "a folder of one machine": ("FineTune", {"model": {"uri": "file:///models/x"}}, "must begin with one of hf://, s3://, pvc:// (file:// and plain paths work only with kubepeft run)"),
    "a plain path for data": ("FineTune", {"data": {"train": "./data.jsonl"}}, "must begin with one of s3://, https://, hf://, pvc://"),
    "an output that can't be written": ("FineTune", {"output": {"uri": "https://example.org/x"}}, "must begin with one of s3://, pvc://"),
    "two methods": ("FineTune", {"method": {"lora": {}, "promptTuning": {}}}, "give at most one of lora, promptTuning and peft"),
    "an init text without TEXT": ("FineTune", {"method": {"promptTuning": {"promptTuningInitText": "Hi"}}}, "promptTuningInit: TEXT and promptTuningInitText go together: give both or neither"),
    "eval twice": ("FineTune", {"data": {"train": "s3://b/d", "eval": "s3://b/e", "evalFraction": 0.1}}, "give at most one of eval and evalFraction"),
    "early stopping without eval data": ("FineTune", {"training": {"earlyStoppingPatience": 3}}, "earlyStoppingPatience, loadBestModelAtEnd and evalStrategy need data.eval or data.evalFraction"),
    "early stopping without evaluation": ("FineTune", {"data": {"train": "s3://b/d", "evalFraction": 0.1}, "training": {"earlyStoppingPatience": 3, "evalStrategy": "no"}}, "earlyStoppingPatience and loadBestModelAtEnd need evaluation: evalStrategy can't be \"no\""),
    "packing of a sequence-to-sequence model": ("FineTune", {"model": {"uri": "hf://a/b", "task": "SEQ_2_SEQ_LM"}, "data": {"train": "s3://b/d", "packing": "always"}}, "packing: always can't be with task SEQ_2_SEQ_LM, whose examples don't pack"),
    "packing with prompt tuning": ("FineTune", {"method": {"promptTuning": {}}, "data": {"train": "s3://b/d", "packing": "always"}}, "packing: always can't be with promptTuning, which drops position ids"),
    "sampling fields without sampling": ("FineTune", {"inference": {"input": "s3://b/q", "temperature": 0.5}}, "temperature, topP, topK and minP need doSample: true"),
    "the same in a BatchInference": ("BatchInference", {"topK": 5}, "temperature, topP, topK and minP need doSample: true"),
    "two adapters": ("BatchInference", {"adapter": {"uri": "s3://b/a", "fineTune": "x"}}, "give exactly one of fineTune and uri"),
    "no adapter": ("BatchInference", {"adapter": {}}, "give exactly one of fineTune and uri"),
    "an environment name of ours": ("FineTune", {"pod": {"env": [{"name": "KUBEPEFT_STAGE", "value": "x"}]}}, "names that begin with KUBEPEFT_ are kubepeft's own"),
    "a value from two places": ("FineTune", {"pod": {"env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}}, "give at most one of value and valueFrom"),
    "a value from nowhere": ("FineTune", {"pod": {"env": [{"name": "A", "valueFrom": {}}]}}, "give exactly one of secretKeyRef and configMapKeyRef"),
    "a volume of two kinds": ("FineTune", {"pod": {"volumes": [{**VOLUME, "configMap": {"name": "c"}}]}}, "give exactly one of persistentVolumeClaim, configMap and emptyDir"),
    "a volume name of ours": ("FineTune", {"pod": {"volumes": [{**VOLUME, "name": "kubepeft-scratch"}]}}, "volume names that begin with kubepeft- are kubepeft's own"),
    "a mount of no volume": ("FineTune", {"pod": {"volumeMounts": [{"name": "w", "mountPath": "/w"}]}}, "every volumeMounts[].name must be the name of one of volumes[]"),
    "a label of ours": ("FineTune", {"pod": {"labels": {"kubepeft.io/stage": "x"}}}, "keys under kubepeft.io/ are kubepeft's own"),
    "an annotation of ours": ("FineTune", {"pod": {"annotations": {"kubepeft.io/document": "x"}}}, "keys under kubepeft.io/ are kubepeft's own"),
}  # fmt: skip

SCHEMA: dict[str, tuple[str, Object, str]] = {
    "a field that is not there": ("FineTune", {"bakoffLimit": 1}, "spec.bakoffLimit"),
    "a field deep inside that is not there": ("FineTune", {"method": {"lora": {"rank": 1}}}, "spec.method.lora.rank"),
    "no data": ("FineTune", {"data": None}, "spec.data"),
    "too many GPUs": ("FineTune", {"gpus": 17}, "spec.gpus"),
    "a negative number": ("FineTune", {"backoffLimit": -1}, "spec.backoffLimit"),
    "nothing where something is needed": ("FineTune", {"training": {"learningRate": 0}}, "spec.training.learningRate"),
    "a share of one": ("FineTune", {"data": {"train": "s3://b/d", "evalFraction": 1}}, "spec.data.evalFraction"),
    "a word that is no choice": ("FineTune", {"model": {"uri": "hf://a/b", "task": "CHAT"}}, "spec.model.task"),
    "text for a number": ("FineTune", {"training": {"seed": "1"}}, "spec.training.seed"),
    "a number for text": ("FineTune", {"pod": {"env": [{"name": "A", "value": 1}]}}, "spec.pod.env[0].value"),
    "a list for one": ("FineTune", {"data": {"train": ["s3://b/d"]}}, "spec.data.train"),
    "a fraction of an epoch's steps": ("FineTune", {"training": {"maxSteps": 1.5}}, "spec.training.maxSteps"),
    "an empty address": ("FineTune", {"model": {"uri": ""}}, "spec.model.uri"),
    "a name that is none": ("FineTune", {"credentials": {"s3": "My_Secret"}}, "spec.credentials.s3"),
    "a PEFT type in small letters": ("FineTune", {"method": {"peft": {"type": "ia3"}}}, "spec.method.peft.type"),
    "no target module": ("FineTune", {"method": {"lora": {"targetModules": []}}}, "spec.method.lora.targetModules"),
    "too many shards": ("BatchInference", {"shards": 1001}, "spec.shards"),
    "two GPUs a shard": ("BatchInference", {"gpus": 2}, "spec.gpus"),
}  # fmt: skip


def document(kind: str, changes: Object) -> Object:
    obj = copy.deepcopy(FINE_TUNE if kind == "FineTune" else BATCH_INFERENCE)
    spec = {key: value for key, value in {**LEAST[kind], **changes}.items() if value is not None}
    return {"apiVersion": obj["apiVersion"], "kind": kind, "metadata": {"name": "x"}, "spec": spec}


def locally(obj: Object) -> str:
    """What the local validation says; "" where it takes the manifest."""
    import yaml

    try:
        manifest.load(yaml.safe_dump(obj), "x.yaml", local=False)
    except UserError as error:
        return error.what
    return ""


def by_the_server(admin: Api, obj: Object) -> str:
    """What the API server says to a create of it, unknown fields refused as kubectl does; "" where it takes it."""
    resource = FINE_TUNES if obj["kind"] == "FineTune" else BATCH_INFERENCES
    path = resource.path("default") + "?dryRun=All&fieldValidation=Strict"
    try:
        admin._call("create", "POST", resource, path, body=obj)
    except ApiError as error:
        return error.message if error.status in (400, 422) else f"no refusal of the manifest: {error}"
    return ""


@pytest.mark.parametrize("kind,changes", GOOD.values(), ids=GOOD)
def test_a_good_manifest_is_taken_by_both(admin: Api, kind: str, changes: Object) -> None:
    assert locally(document(kind, changes)) == ""
    assert by_the_server(admin, document(kind, changes)) == ""


@pytest.mark.parametrize("kind,changes,words", RULES.values(), ids=RULES)
def test_a_rule_is_told_in_the_same_words_by_both(admin: Api, kind: str, changes: Object, words: str) -> None:
    assert words in locally(document(kind, changes))
    assert words in by_the_server(admin, document(kind, changes))


@pytest.mark.parametrize("kind,changes,field", SCHEMA.values(), ids=SCHEMA)
def test_what_the_schema_refuses_is_named_by_both(admin: Api, kind: str, changes: Object, field: str) -> None:
    assert field in locally(document(kind, changes))
    assert field in by_the_server(admin, document(kind, changes))


def test_every_rule_of_the_types_is_in_the_table() -> None:
    from kubepeft import crd

    told = set(re.findall(r"'message': ['\"](.*?)['\"](?:, 'rule'|\})", str(crd.definitions())))
    told = {words.replace("\\'", "'") for words in told if "fixed at creation" not in words}
    assert told
    covered = [words for _, _, words in RULES.values()]
    assert [words for words in told if not any(one in words or words in one for one in covered)] == []


@pytest.mark.parametrize("field", ["gpus", "model", "training", "method", "data", "output", "inference", "pod", "cache", "credentials", "backoffLimit"])  # fmt: skip
def test_a_field_is_fixed_at_creation(admin: Api, namespace: str, field: str) -> None:
    whole: Object = {
        "gpus": 2, "training": {"seed": 1}, "method": {"lora": {"r": 4}}, "output": {"uri": "s3://b/o"},
        "inference": {"input": "s3://b/q"}, "pod": {"labels": {"a": "b"}}, "cache": {"claim": "c"}, "credentials": {"s3": "s"},
        "backoffLimit": 5,
    }  # fmt: skip
    changes: Object = {
        "gpus": 4, "model": {"dtype": "float32"}, "training": {"seed": 2}, "method": {"lora": {"r": 8}}, "data": {"maxLength": 99},
        "output": {"uri": "s3://b/p"}, "inference": None, "pod": {"labels": {"a": "c"}}, "cache": {"claim": "d"},
        "credentials": {"s3": "t"}, "backoffLimit": 6,
    }  # fmt: skip
    admin.create(FINE_TUNES, namespace, document("FineTune", whole))
    with pytest.raises(ApiError, match=rf"spec: Forbidden: fixed at creation: {field} \(only suspend"):
        admin.patch(FINE_TUNES, namespace, "x", {"spec": {field: changes[field]}})
    allowed: dict[str, Any] = {"suspend": True, "ttlSecondsAfterFinished": 1, "activeDeadlineSeconds": 1}
    admin.patch(FINE_TUNES, namespace, "x", {"spec": allowed})


def test_a_changed_spec_does_not_pass_beside_a_changed_status(admin: Api, namespace: str) -> None:
    """The rule compares the spec only where the status is the same: no request may change both."""
    made = admin.create(FINE_TUNES, namespace, document("FineTune", {"gpus": 2}))
    made["status"] = {"phase": "Training"}
    made = admin.replace(FINE_TUNES, namespace, "x", made, subresource="status")
    made["spec"]["gpus"], made["status"]["phase"] = 4, "Succeeded"
    with pytest.raises(ApiError, match=r"fixed at creation: gpus \("):
        admin.replace(FINE_TUNES, namespace, "x", made)
    written = admin.replace(FINE_TUNES, namespace, "x", made, subresource="status")
    assert (written["spec"]["gpus"], written["status"]["phase"]) == (2, "Succeeded")
    written["metadata"]["labels"] = {"team": "a"}
    assert admin.replace(FINE_TUNES, namespace, "x", written)["status"]["phase"] == "Succeeded"


def test_the_same_manifest_applied_again_changes_nothing(admin: Api, namespace: str) -> None:
    wished = document("FineTune", {"training": {"seed": 1}, "pod": {"labels": {"a": "b"}}, "suspend": False})
    applied = [
        admin.patch(FINE_TUNES, namespace, "x", wished, kind="apply", field_manager=manager)
        for manager in ("kubectl", "kubectl", "gitops")
    ]
    assert applied[0]["spec"]["training"]["learningRate"] == 2e-4, "defaults are filled in within a field"
    assert applied[0]["metadata"]["resourceVersion"] == applied[1]["metadata"]["resourceVersion"]
    assert [one["metadata"]["generation"] for one in applied] == [1, 1, 1]
    assert [one["manager"] for one in applied[2]["metadata"]["managedFields"]] == ["gitops", "kubectl"]


def test_what_is_not_there_is_not_spelled_out(admin: Api, namespace: str) -> None:
    spec = admin.create(FINE_TUNES, namespace, document("FineTune", {}))["spec"]

    def empty(value: Any) -> bool:
        return value in ({}, []) or (isinstance(value, dict) and any(empty(one) for one in value.values()))

    assert not empty(spec)
    assert spec["training"]["learningRate"] == 2e-4
