"""Manifests that are taken and manifests that are refused, with the words a user sees."""

import textwrap

import pytest

from kubepeft import digest, manifest
from kubepeft.errors import UserError
from kubepeft.types import BatchInference, FineTune


def fine_tune(spec: str, name: str = "support-bot") -> str:
    head = f"apiVersion: kubepeft.io/v1alpha1\nkind: FineTune\nmetadata: {{name: {name}}}\nspec:\n"
    return head + textwrap.indent(textwrap.dedent(spec).strip("\n"), "  ") + "\n"


SMALL = """
model: {uri: hf://Qwen/Qwen2.5-0.5B-Instruct}
data: {train: s3://datasets/support/*.jsonl}
"""

WHOLE = """
model: {uri: hf://Qwen/Qwen2.5-0.5B-Instruct, task: CAUSAL_LM, dtype: auto, quantization: none, trustRemoteCode: false}
method:
  lora: {r: 8, loraAlpha: 16, loraDropout: 0.05, targetModules: [q_proj, k_proj, v_proj, o_proj]}
data:
  train: s3://datasets/support/*.jsonl
  eval: s3://datasets/support/eval.jsonl
  format: auto
  columns: {}
  loss: completion
  maxLength: 1024
  tooLong: truncate
  packing: auto
training: {numTrainEpochs: 3, perDeviceTrainBatchSize: 4, learningRate: 2e-4, seed: 0, earlyStoppingPatience: 3}
output: {uri: s3://adapters/support-bot, merged: false, keepCheckpoints: 1}
inference: {input: s3://datasets/questions.jsonl, maxNewTokens: 100, shards: 4}
gpus: 1
pod:
  nodeSelector: {gpu: a100}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  resources: {limits: {memory: 16Gi, cpu: 4}}
  env: [{name: WANDB_API_KEY, valueFrom: {secretKeyRef: {name: wandb, key: key}}}]
  volumes: [{name: scratch, emptyDir: {sizeLimit: 10Gi}}]
  volumeMounts: [{name: scratch, mountPath: /scratch}]
cache: {claim: model-cache}
credentials: {s3: my-s3-secret, huggingFace: my-hf-secret}
suspend: false
backoffLimit: 3
activeDeadlineSeconds: 86400
ttlSecondsAfterFinished: 604800
"""


@pytest.mark.parametrize("spec", [SMALL, WHOLE], ids=["the least", "every field of the design"])
def test_a_manifest_for_a_cluster_is_taken(spec: str) -> None:
    (found,) = manifest.load(fine_tune(spec), "finetune.yaml", local=False)
    assert isinstance(found, FineTune)
    assert found.spec.training.learning_rate == 2e-4


REFUSED = {
    "unknown field, with the right one": (
        SMALL + "bakoffLimit: 1\n",
        "spec.bakoffLimit: unknown field (did you mean backoffLimit?)",
    ),
    "snake case, with the right one": (
        SMALL + "method: {lora: {lora_alpha: 1}}\n",
        "spec.method.lora.lora_alpha: unknown field (did you mean loraAlpha?)",
    ),
    "a word that is no choice": (
        SMALL + "training: {lrSchedulerType: cosin}\n",
        "found 'cosin' (did you mean cosine?)",
    ),
    "text for a number": (
        SMALL + 'training: {seed: "1"}\n',
        "spec.training.seed: expected an integer, found '1' (write it without quotes)",
    ),
    "a truth value for text": (
        SMALL + "method: {lora: {initLoraWeights: true}}\n",
        "spec.method.lora.initLoraWeights: expected a string, found True (write it in quotes)",
    ),
    "two methods": (
        SMALL + "method: {lora: {}, promptTuning: {}}\n",
        "spec.method: give at most one of lora, promptTuning and peft",
    ),
    "two kinds of eval data": (
        SMALL.replace("train:", "eval: s3://b/e.jsonl, evalFraction: 0.1, train:"),
        "give at most one of eval and evalFraction",
    ),
    "early stopping without eval data": (
        SMALL + "training: {earlyStoppingPatience: 1}\n",
        "need data.eval or data.evalFraction",
    ),
    "a text to begin from without TEXT": (
        SMALL + "method: {promptTuning: {promptTuningInitText: hello}}\n",
        "promptTuningInit: TEXT and promptTuningInitText go together",
    ),
    "packing always for an encoder-decoder": (
        SMALL.replace("Instruct}", "Instruct, task: SEQ_2_SEQ_LM}").replace("train:", "packing: always, train:"),
        "SEQ_2_SEQ_LM",
    ),
    "a path on a cluster": (SMALL.replace("hf://Qwen/Qwen2.5-0.5B-Instruct", "./base"), "only with kubepeft run"),
    "a number out of bounds": (SMALL + "gpus: 99\n", "spec.gpus: expected less than or equal to 16, found 99"),
    "a key given twice": (SMALL + "gpus: 1\ngpus: 2\n", "spec.gpus: given twice"),
    "our label": (SMALL + "pod: {labels: {kubepeft.io/name: x}}\n", "keys under kubepeft.io/ are kubepeft's own"),
    "our environment": (SMALL + "pod: {env: [{name: KUBEPEFT_STAGE, value: x}]}\n", "names that begin with KUBEPEFT_"),
    "a mount of no volume": (
        SMALL + "pod: {volumeMounts: [{name: a, mountPath: /a}]}\n",
        "must be the name of one of volumes[]",
    ),
    "temperature without sampling": (
        SMALL + "inference: {input: s3://b/q.jsonl, temperature: 0.5}\n",
        "temperature, topP, topK and minP need doSample: true",
    ),
    "no model": ("data: {train: s3://b/t.jsonl}\n", "spec.model: must be given"),
}


@pytest.mark.parametrize("spec, words", REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_refused_with_line_field_and_mend(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        manifest.load(fine_tune(spec), "finetune.yaml", local=False)
    assert words in str(caught.value)
    assert caught.value.exit_code == 65
    assert str(caught.value).startswith("finetune.yaml:")


def test_every_mistake_is_named_at_once_with_its_line() -> None:
    text = fine_tune(SMALL + "training:\n  seed: -1\n  learnigRate: 1\n")
    with pytest.raises(UserError) as caught:
        manifest.load(text, "f.yaml", local=False)
    lines = caught.value.what.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["f.yaml:8", "f.yaml:9"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no document in it"),
        ("- 1", "expected a mapping"),
        ("a: [", "not YAML"),
        ("kind: FineTun\napiVersion: kubepeft.io/v1alpha1", "did you mean FineTune?"),
        ("kind: FineTune\napiVersion: kubepeft.io/v1", "expected kubepeft.io/v1alpha1, found 'kubepeft.io/v1'"),
        ("kind: FineTune\napiVersion: kubepeft.io/v1alpha1\nmetadata: {name: A B}\nspec: {}", "metadata.name"),
        ("a: \0", "not YAML"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=r"f\.yaml") as caught:
        manifest.load(text, "f.yaml", local=True)
    assert words in str(caught.value)


def test_paths_are_taken_only_without_a_cluster() -> None:
    text = fine_tune("model: {uri: ./base}\ndata: {train: data.jsonl}\noutput: {uri: ./out}\n")
    assert manifest.load(text, "f.yaml", local=True)
    with pytest.raises(UserError, match=r"spec.output.uri: must begin with one of s3://, pvc://"):
        manifest.load(text, "f.yaml", local=False)


def test_what_kubectl_prints_is_taken_back() -> None:
    text = fine_tune(SMALL) + "status: {phase: Training, newThing: 1, training: {step: 3, loss: 0.5}}\n"
    text = text.replace("{name: support-bot}", "{name: support-bot, uid: u, managedFields: [], generation: 1}")
    (found,) = manifest.load(text, "f.yaml", local=False)
    assert isinstance(found, FineTune)
    assert found.status is not None
    assert found.status.training is not None
    assert found.status.training.step == 3


def test_a_field_set_to_nothing_counts_as_not_given() -> None:
    (bare,) = manifest.load(fine_tune(SMALL), "f.yaml", local=False)
    (empty,) = manifest.load(fine_tune(SMALL + "method:\n  lora:\ninference:\n"), "f.yaml", local=False)
    assert isinstance(bare, FineTune)
    assert isinstance(empty, FineTune)
    assert empty.spec == bare.spec


def test_a_batch_inference_names_exactly_one_adapter() -> None:
    head = (
        "apiVersion: kubepeft.io/v1alpha1\nkind: BatchInference\nmetadata: {name: b}\nspec:\n  input: s3://b/q.jsonl\n"
    )
    (found,) = manifest.load(head + "  adapter: {fineTune: support-bot}\n", "f.yaml", local=False)
    assert isinstance(found, BatchInference)
    for adapter in ("{}", "{fineTune: a, uri: s3://b/a}"):
        with pytest.raises(UserError, match="give exactly one of fineTune and uri"):
            manifest.load(head + f"  adapter: {adapter}\n", "f.yaml", local=False)


def test_a_digest_never_changes_for_a_spec_that_was_accepted_once() -> None:
    """These digests lie in the status of users' objects and in their storage: a change here would orphan them all."""
    (small,) = manifest.load(fine_tune(SMALL), "f.yaml", local=False)
    (whole,) = manifest.load(fine_tune(WHOLE), "f.yaml", local=False)
    assert digest.of_spec(small.spec) == "v1-279f0e100fb07cac066d19c34c280f84"
    assert digest.of_spec(whole.spec) == "v1-6f94e8b16e7f209d703db31221620881"


@pytest.mark.parametrize(
    "change, same",
    [("suspend: true", True), ("activeDeadlineSeconds: 5", True), ("backoffLimit: 3", True), ("gpus: 2", False)],
)
def test_only_what_is_fixed_at_creation_and_not_at_its_default_counts_in_the_digest(change: str, same: bool) -> None:
    (bare,) = manifest.load(fine_tune(SMALL), "f.yaml", local=False)
    (changed,) = manifest.load(fine_tune(SMALL + change + "\n"), "f.yaml", local=False)
    assert (digest.of_spec(bare.spec) == digest.of_spec(changed.spec)) is same
