"""What users get wrong, and what they are told: one clear message with what, where and what to do, and nothing left that looks finished."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kubepeft.errors import KubepeftError
from kubepeft.stage import PreparedRef
from kubepeft_jobs.infer import stage as infer_stage
from kubepeft_jobs.prepare import stage as prepare_stage
from kubepeft_jobs.supervisor import ENV_WORK
from tests.servers import FaultProxy, S3Server
from tests.stages import (
    Running,
    fine_tune,
    infer_document,
    prepare_document,
    prepared,
    run,
    train_document,
    uri,
    write_chats,
    write_lines,
)

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
PAIR = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stage's own folder, for stages that are called in this process."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setenv(ENV_WORK, str(folder))
    return folder


def refusal(call: Callable[[], object]) -> KubepeftError:
    with pytest.raises(KubepeftError) as caught:
        call()
    assert caught.value.exit_code == 65, caught.value
    assert caught.value.mend, f"no word on what to do: {caught.value}"
    return caught.value


DATA: dict[str, tuple[bytes | dict[str, bytes], dict[str, Any], str, str]] = {
    # case: (content of train.jsonl, or files of the folder; data section; reason; words)
    "an empty file": (b"", {}, "EmptyFile", "train.jsonl"),
    "a file without a column it needs": (b'{"question": "a", "answer": "b"}\n', {}, "MissingColumn", "question"),
    "two formats in one file": ((CHAT * 3 + PAIR).encode(), {}, "BadRow", ":4"),
    "not UTF-8": (CHAT.encode() * 2 + b'{"messages": "\xff"}\n', {}, "BadRow", ":3"),
    "a broken line in the middle": (CHAT.encode() * 5 + b'{"messages": [\n' + CHAT.encode() * 5, {}, "BadRow", ":6"),
    "NUL bytes": (CHAT.encode() + b"\0\0\0\n", {}, "BadRow", ":2"),
    "a row that is too long, with tooLong: fail": (
        ('{"prompt": "%s", "completion": "b"}\n' % ("long " * 200)).encode(), {"tooLong": "fail", "maxLength": 64}, "RowTooLong", ":1",
    ),
    "all rows dropped": (
        ('{"prompt": "%s", "completion": "b"}\n' % ("long " * 200)).encode(), {"tooLong": "drop", "maxLength": 64}, "NothingLeft", "maxLength",
    ),
    "no row left to evaluate on": (PAIR.encode(), {"evalFraction": 0.001}, "EvalEmpty", "evalFraction"),
    "a folder without data": ({"notes.md": b"hello"}, {}, "NothingFound", "notes.md"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_with_file_and_line(case: str, qwen2: Path, tmp_path: Path, work: Path) -> None:
    content, section, reason, words = DATA[case]
    data = tmp_path / "train.jsonl"
    if isinstance(content, dict):
        data = tmp_path / "folder"
        data.mkdir()
        for name, body in content.items():
            (data / name).write_bytes(body)
    else:
        data.write_bytes(content)
    document = prepare_document(fine_tune(qwen2, data, tmp_path / "out", data=section))
    error = refusal(lambda: prepare_stage.run(document))
    assert words in str(error)
    assert error.reason == reason
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_a_row_longer_than_max_length_is_cut_or_dropped_and_counted(
    policy: str, qwen2: Path, tmp_path: Path, work: Path
) -> None:
    rows = [{"prompt": "short", "completion": "b " * 200}, {"prompt": "short", "completion": "b"}]
    found = fine_tune(
        qwen2, write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out", data={"tooLong": policy, "maxLength": 64}
    )
    result = prepare_stage.run(prepare_document(found)).prepared
    assert result is not None
    assert result.rows == (2 if policy == "truncate" else 1)
    (report_file,) = (tmp_path / "out").rglob("report.json")
    report = json.loads(report_file.read_text())
    assert (report["rows_truncated"], report["rows_dropped_too_long"]) == ((1, 0) if policy == "truncate" else (0, 1))


def test_bad_rows_are_tolerated_only_as_many_as_asked_for(qwen2: Path, tmp_path: Path, work: Path) -> None:
    (tmp_path / "t.jsonl").write_text(PAIR * 3 + "{broken\n" + PAIR * 3 + '{"prompt": 1, "completion": "b"}\n')
    willing = fine_tune(qwen2, tmp_path / "t.jsonl", tmp_path / "out", data={"maxBadRows": 2})
    result = prepare_stage.run(prepare_document(willing)).prepared
    assert result is not None
    assert result.rows == 6
    strict = fine_tune(qwen2, tmp_path / "t.jsonl", tmp_path / "strict", data={"maxBadRows": 1})
    assert ":8" in str(refusal(lambda: prepare_stage.run(prepare_document(strict))))


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def pickle_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def grow_tokenizer(model: Path) -> None:
    """A token beyond the embedding's rows, which AutoPeftModel would give random weights with only a log line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(400)])
    tokenizer.save_pretrained(model)


def lose_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def lose_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


MODEL: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], str, str]] = {
    "a folder that is not there": (shutil.rmtree, {}, "NothingFound", "qwen2"),
    "a broken config.json": (break_config, {}, "BadModel", "config.json"),
    "weights that are no safetensors": (pickle_weights, {}, "NoSafetensors", "pytorch_model.bin"),
    "a vocabulary larger than the embedding": (grow_tokenizer, {}, "TokenizerMismatch", "320"),
    "no tokenizer": (lose_tokenizer, {}, "NoTokenizer", "tokenizer"),
    "no chat template for chat data": (lose_template, {}, "NoChatTemplate", "chat template"),
    "a task it can't do": (None, {"model": {"task": "SEQ_2_SEQ_LM"}}, "WrongTask", "model.task: CAUSAL_LM"),
    "a target that matches nothing": (
        None, {"method": {"lora": {"targetModules": ["query_proj"]}}}, "NoSuchModule", "q_proj",
    ),
    "a method PEFT has not": (None, {"method": {"peft": {"type": "IA4", "config": {}}}}, "UnknownMethod", "IA3"),
    "a field the method has not": (
        None, {"method": {"peft": {"type": "IA3", "config": {"target_module": ["k_proj"]}}}}, "UnknownMethodField", "target_modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODEL)
def test_a_model_that_cannot_be_trained_so_is_refused_before_any_gpu_is_asked_for(
    case: str, qwen2: Path, tmp_path: Path, work: Path
) -> None:
    fault, spec, reason, words = MODEL[case]
    model = shutil.copytree(qwen2, tmp_path / "qwen2")
    if fault is not None:
        fault(model)
    document = prepare_document(fine_tune(model, write_chats(tmp_path / "train.jsonl"), tmp_path / "out", **spec))
    error = refusal(lambda: prepare_stage.run(document))
    assert words in str(error)
    assert error.reason == reason
    assert not list(tmp_path.glob("out/**/manifest.json"))


def test_an_encoder_decoder_is_no_causal_model(t5: Path, tmp_path: Path, work: Path) -> None:
    rows = write_lines(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}])
    error = refusal(lambda: prepare_stage.run(prepare_document(fine_tune(t5, rows, tmp_path / "out"))))
    assert (error.reason, "model.task: SEQ_2_SEQ_LM" in error.mend) == ("WrongTask", True)


@pytest.fixture(scope="module")
def trained(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    found = fine_tune(qwen2, write_chats(folder / "t.jsonl"), folder / "out", training={"maxSteps": 2})
    ended = run(train_document(found, prepared(found, folder / "w")), folder / "w")
    assert ended.code == 0, ended.log
    return folder / "out"


def questions(tmp_path: Path) -> dict[str, Any]:
    return {"input": str(write_lines(tmp_path / "q.jsonl", [{"prompt": "question 1"}])), "maxNewTokens": 3}


def test_inference_refuses_an_adapter_with_changed_bytes(
    trained: Path, qwen2: Path, tmp_path: Path, work: Path
) -> None:
    output = shutil.copytree(trained, tmp_path / "out")
    file = output / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    found = fine_tune(qwen2, tmp_path / "none.jsonl", output, inference=questions(tmp_path))
    error = refusal(lambda: infer_stage.run(infer_document(found)))
    assert (error.reason, "adapter_model.safetensors" in str(error)) == ("ChangedBytes", True)
    assert not list(output.glob("predictions/**/manifest.json"))


def test_inference_refuses_another_base_than_the_adapter_was_trained_on(
    trained: Path, qwen2: Path, tmp_path: Path, work: Path
) -> None:
    other = shutil.copytree(qwen2, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    output = shutil.copytree(trained, tmp_path / "out")
    found = fine_tune(qwen2, tmp_path / "none.jsonl", output, inference=questions(tmp_path))
    error = refusal(lambda: infer_stage.run(infer_document(found, model_uri=uri(other))))
    assert error.reason == "WrongBase"


def test_inference_without_an_adapter_says_where_it_looked(qwen2: Path, tmp_path: Path, work: Path) -> None:
    found = fine_tune(qwen2, tmp_path / "none.jsonl", tmp_path / "out", inference=questions(tmp_path))
    error = refusal(lambda: infer_stage.run(infer_document(found)))
    assert (error.reason, "/out/adapter" in str(error)) == ("NoAdapter", True)


def test_training_refuses_a_base_that_changed_since_its_data_was_prepared(qwen2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(qwen2, tmp_path / "model")
    found = fine_tune(model, write_chats(tmp_path / "t.jsonl"), tmp_path / "out", training={"maxSteps": 2})
    reference = prepared(found, tmp_path / "w")
    weights = load_file(model / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    ended = run(train_document(found, reference), tmp_path / "w")
    assert (ended.code, ended.result.reason) == (65, "BaseChanged"), ended.log


def test_training_says_when_its_prepared_data_is_gone(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(qwen2, write_chats(tmp_path / "t.jsonl"), tmp_path / "out")
    ended = run(train_document(found, PreparedRef(digest="v1-none", model_commit="0" * 40)), tmp_path / "w")
    assert (ended.code, ended.result.reason) == (65, "NotPrepared"), ended.log
    assert "Traceback" not in ended.log


def test_a_loss_that_is_no_number_ends_the_run_with_advice(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(
        qwen2, write_chats(tmp_path / "t.jsonl"), tmp_path / "out",
        training={"maxSteps": 50, "learningRate": 10, "optim": "sgd", "maxGradNorm": 0, "lrSchedulerType": "constant"},
        method={"lora": {"r": 64, "loraAlpha": 65536}},
    )  # fmt: skip
    ended = run(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w")
    assert (ended.code, ended.result.reason) == (65, "Diverged"), ended.log
    assert "learningRate" in ended.result.hint
    assert not list(tmp_path.glob("out/adapter/manifest.json"))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.make_bucket("bucket")
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("data", "change", "reason"),
    [
        ("s3://bucket/none.jsonl", {}, "NothingFound"),
        ("s3://no-bucket/t.jsonl", {}, "NoSuchBucket"),
        ("s3://bucket/t.jsonl", {"AWS_SECRET_ACCESS_KEY": "wrong-secret-value"}, "BadCredentials"),
        ("s3://bucket/t.jsonl", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "NoCredentials"),
    ],
)
def test_what_s3_has_not_or_refuses_is_told_without_the_secret(
    data: str, change: dict[str, str], reason: str, s3: S3Server, qwen2: Path, tmp_path: Path
) -> None:
    env = s3.environment() | change
    ended = run(prepare_document(fine_tune(qwen2, data, "s3://bucket/out")), tmp_path / "w", env)
    assert (ended.code, ended.result.reason) == (65, reason), ended.log
    assert data.split("/")[2] in ended.result.message
    assert ended.result.hint
    assert "Traceback" not in ended.log
    for secret in (env["AWS_SECRET_ACCESS_KEY"], env["AWS_ACCESS_KEY_ID"]):
        assert not secret or secret not in ended.log + ended.result.dumps()


def test_an_s3_server_that_stays_away_is_something_to_try_again(s3: S3Server, qwen2: Path, tmp_path: Path) -> None:
    proxy = FaultProxy("127.0.0.1", s3.port)
    proxy.answer_503(3600)
    env = s3.environment(proxy.endpoint) | {"KUBEPEFT_STORAGE_ATTEMPTS": "3"}
    ended = run(prepare_document(fine_tune(qwen2, "s3://bucket/t.jsonl", "s3://bucket/out")), tmp_path / "w", env)
    proxy.stop()
    assert (ended.code, ended.result.outcome) == (75, "Failed"), ended.log
    assert proxy.requests_refused >= 3
    assert "Traceback" not in ended.log


def test_a_whole_run_bears_an_s3_server_that_fails_for_a_while(s3: S3Server, qwen2: Path, tmp_path: Path) -> None:
    write_chats(s3.root / "bucket" / "train.jsonl")
    write_lines(s3.root / "bucket" / "questions.jsonl", [{"id": "a", "prompt": "question 1"}])
    proxy = FaultProxy("127.0.0.1", s3.port)
    env = s3.environment(proxy.endpoint)
    found = fine_tune(
        qwen2,
        "s3://bucket/train.jsonl",
        "s3://bucket/whole",
        training={"maxSteps": 12},
        inference={"input": "s3://bucket/questions.jsonl", "maxNewTokens": 3},
    )
    proxy.answer_503(3)
    reference = prepared(found, tmp_path / "w", env)
    training = Running(train_document(found, reference), tmp_path / "w", env)
    training.wait_for("micro-batches:")
    proxy.answer_503(5)
    ended = training.end()
    assert ended.code == 0, ended.log
    proxy.cut_after(300, 300, 300)
    answered = run(infer_document(found), tmp_path / "w", env)
    proxy.stop()
    assert answered.code == 0, answered.log
    (line,) = (s3.root / "bucket/whole/predictions/test/part-00000-of-00001.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "a"
    assert proxy.requests_refused > 0
