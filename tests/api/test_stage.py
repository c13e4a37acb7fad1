"""The documents between whoever starts a stage and the stage."""

from kubepeft import manifest, stage
from kubepeft.stage import PreparedRef, Result
from kubepeft.types import FineTune

TEXT = """
apiVersion: kubepeft.io/v1alpha1
kind: FineTune
metadata: {name: a}
spec:
  model: {uri: hf://org/model, dtype: float32, trustRemoteCode: true}
  data: {train: s3://bucket/train.jsonl, packing: never}
  method: {peft: {type: IA3, config: {feedforward_modules: [down_proj]}}}
  inference: {input: s3://bucket/questions.jsonl, maxNewTokens: 7, doSample: true, temperature: 0.5, shards: 3}
  gpus: 2
  output: {overwrite: true}
  credentials: {s3: secret}
"""


def fine_tune() -> FineTune:
    (found,) = manifest.load(TEXT, "a.yaml", local=False)
    assert isinstance(found, FineTune)
    return found


def test_stage_documents_come_back_as_they_were_sent() -> None:
    spec = fine_tune().spec
    prepare = stage.prepare_stage(
        "a", spec, "s3://bucket/out", namespace="n", mounts={"claim": "/mnt"}, cache_dir="/cache"
    )
    train = stage.train_stage(
        prepare, PreparedRef(digest="d", model_commit="c", rows=1, tokens=2), gpus=2, image="image"
    )
    inference = stage.batch_inference_of("a", spec)
    assert inference is not None
    infer = stage.infer_stage(
        "a", inference, stage.adapter_uri("s3://bucket/out"), stage.predictions_uri("s3://bucket/out", "a")
    )
    for document in (prepare, train, infer):
        assert stage.loads(document.dumps()) == document
    assert train.spec_digest == prepare.spec_digest
    assert train.method.peft is not None
    assert train.method.peft.config == {"feedforward_modules": ["down_proj"]}


def test_the_inference_of_a_fine_tune_takes_over_what_it_shares_with_it() -> None:
    inference = stage.batch_inference_of("a", fine_tune().spec)
    assert inference is not None
    assert (inference.adapter.fine_tune, inference.shards, inference.gpus) == ("a", 3, 1)
    assert (inference.max_new_tokens, inference.temperature) == (7, 0.5)
    assert (inference.trust_remote_code, inference.overwrite, inference.credentials.s3) == (True, True, "secret")


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    prepare = stage.prepare_stage("a", fine_tune().spec, "s3://bucket/out")
    newer = prepare.dumps().replace('{"version"', '{"fieldOfTomorrow":1,"version"', 1)
    assert stage.loads(newer) == prepare


def test_a_result_fits_a_termination_message_whatever_its_words() -> None:
    for words in ("ä" * 5000, '"\n\\' * 3000, "x" * 100):
        result = Result(stage="train", outcome="Failed", exit_code=65, reason="BadRow", message=words, hint=words)
        text = result.dumps()
        assert len(text.encode()) <= stage.RESULT_LIMIT
        back = Result.model_validate_json(text)
        assert back.reason == "BadRow"
        assert words.startswith(back.message.rstrip("…"))
        assert back.message
