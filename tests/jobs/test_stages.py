"""The three stages as processes, from data file to predictions, and again."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from kubepeft.stage import PreparedRef
from tests.stages import (
    Ended,
    fine_tune,
    infer_document,
    prepare_document,
    prepared,
    run,
    train_document,
    write_chats,
    write_lines,
)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses(output: Path) -> list[tuple[float, float]]:
    """(step, loss) of every step, from the newest checkpoint kept after success."""
    newest = sorted(output.glob("checkpoints/*/*/manifest.json"))[-1].parent
    (state,) = newest.rglob("trainer_state.json")
    return [(entry["step"], entry["loss"]) for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, qwen2: Path, output: Path) -> dict[str, Ended]:
    work = tmp_path_factory.mktemp("work")
    questions = [{"id": f"q{n}", "messages": [{"role": "user", "content": f"question {n % 7}"}]} for n in range(9)]
    found = fine_tune(
        qwen2,
        write_chats(work / "train.jsonl"),
        output,
        data={"evalFraction": 0.2},
        inference={"input": str(write_lines(work / "questions.jsonl", questions)), "maxNewTokens": 6, "shards": 2},
    )
    ended = {"prepare": run(prepare_document(found), work)}
    assert ended["prepare"].result.prepared is not None, ended["prepare"].log
    ended["train"] = run(train_document(found, ended["prepare"].result.prepared), work)
    for shard in ("0", "1"):
        ended[f"infer {shard}"] = run(infer_document(found), work, {"KUBEPEFT_SHARD": shard})
    ended["prepare again"] = run(prepare_document(found), work)
    ended["train again"] = run(train_document(found, ended["prepare"].result.prepared), work)
    ended["infer again"] = run(infer_document(found), work, {"KUBEPEFT_SHARD": "1"})
    return ended


def test_every_stage_succeeds(ended: dict[str, Ended]) -> None:
    for name, one in ended.items():
        assert (one.code, one.result.outcome) == (0, "Succeeded"), f"{name}:\n{one.log}"


def test_prepare_counts_its_rows(ended: dict[str, Ended], output: Path) -> None:
    found = ended["prepare"].result.prepared
    assert found is not None
    assert found.rows + found.eval_rows == 48
    assert found.eval_rows > 0
    assert list(output.glob(f"prepared/{found.digest}/**/train-00000.arrow"))


def test_training_learns_and_says_so(ended: dict[str, Ended]) -> None:
    training = ended["train"].result.training
    assert training is not None
    assert (training.step, training.total_steps) == (8, 8)
    assert training.eval_loss is not None
    assert training.base_eval_loss is not None
    assert training.eval_loss < training.base_eval_loss - 0.1
    assert "trainable params" in ended["train"].log


def test_the_adapter_folder_loads_in_plain_peft_and_differs_from_the_base(
    ended: dict[str, Ended], output: Path, qwen2: Path
) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(output / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    inputs = tokenizer("question 1", return_tensors="pt")
    bare = AutoModelForCausalLM.from_pretrained(qwen2).eval()
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, bare(**inputs).logits)
    names = {path.name for path in (output / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "manifest.json",
    } <= names
    assert not any(name.startswith("model") or name.endswith(".bin") for name in names)


def test_the_report_lies_beside_the_adapter(ended: dict[str, Ended], output: Path) -> None:
    assert "<html" in (output / "report.html").read_text()
    assert not (output / ".attempts" / "report").exists() or not list((output / ".attempts" / "report").iterdir())


def test_predictions_come_in_the_order_of_the_input(ended: dict[str, Ended], output: Path) -> None:
    folder = output / "predictions" / "test"
    rows = [
        [json.loads(line)["id"] for line in (folder / f"part-0000{shard}-of-00002.jsonl").read_text().splitlines()]
        for shard in (0, 1)
    ]
    assert rows == [["q0", "q2", "q4", "q6", "q8"], ["q1", "q3", "q5", "q7"]]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["total"], summary["completed"], summary["failed"]) == (9, 9, 0)
    assert (folder / "errors.jsonl").read_text() == ""


def test_a_stage_run_again_reports_what_was_published(ended: dict[str, Ended]) -> None:
    for name in ("prepare", "train", "infer"):
        again = ended[f"{name} again"].result
        assert again.found_published
        first = ended["infer 1" if name == "infer" else name].result
        for field in ("prepared", "training", "adapter", "inference"):
            assert getattr(again, field) == getattr(first, field)


def test_only_as_many_checkpoints_stay_as_asked_for(ended: dict[str, Ended], output: Path) -> None:
    assert len(list(output.glob("checkpoints/*/*/manifest.json"))) == 1


def test_a_seq2seq_prompt_tuning_goes_all_the_way(t5: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"translate {n % 5}", "completion": f"{n % 5} übersetzt"} for n in range(24)]
    questions = write_lines(tmp_path / "q.jsonl", [{"prompt": "translate 3"}, {"prompt": "translate 4"}])
    found = fine_tune(
        t5,
        write_lines(tmp_path / "train.jsonl", rows),
        tmp_path / "out",
        model={"task": "SEQ_2_SEQ_LM"},
        method={
            "promptTuning": {"numVirtualTokens": 4, "promptTuningInit": "TEXT", "promptTuningInitText": "translate:"}
        },
        inference={"input": str(questions), "maxNewTokens": 5},
    )
    trained = run(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w")
    assert trained.code == 0, trained.log
    answered = run(infer_document(found), tmp_path / "w")
    assert answered.code == 0, answered.log
    rows = [
        json.loads(line)
        for line in (tmp_path / "out/predictions/test/part-00000-of-00001.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in rows] == ["line-1", "line-2"]
    AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "adapter")


def test_two_workers_learn_what_one_learns(qwen2: Path, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "train.jsonl")
    one = fine_tune(qwen2, data, tmp_path / "one", training={"perDeviceTrainBatchSize": 4})
    two = fine_tune(qwen2, data, tmp_path / "two", training={"perDeviceTrainBatchSize": 2})
    for found, workers in ((one, 1), (two, 2)):
        ended = run(train_document(found, prepared(found, tmp_path / "w"), workers=workers), tmp_path / "w")
        assert ended.code == 0, ended.log
    for (step, alone), (_, together) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert together == pytest.approx(alone, rel=1e-4), step


def test_changed_data_is_never_mistaken_for_what_was_trained_on(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(qwen2, write_chats(tmp_path / "train.jsonl"), tmp_path / "out", training={"maxSteps": 2})
    first = prepared(found, tmp_path / "w")
    assert run(train_document(found, first), tmp_path / "w").code == 0
    before = files_below(tmp_path / "out" / "adapter")
    write_chats(tmp_path / "train.jsonl", rows=40)
    refused = run(prepare_document(found), tmp_path / "w")
    assert (refused.code, refused.result.reason) == (65, "OutputBelongsToAnotherSpec"), refused.log
    assert "output.overwrite" in refused.result.hint
    assert files_below(tmp_path / "out" / "adapter") == before

    willing = fine_tune(
        qwen2, tmp_path / "train.jsonl", tmp_path / "out", training={"maxSteps": 2}, output={"overwrite": True}
    )
    second: PreparedRef = prepared(willing, tmp_path / "w")
    assert second.digest != first.digest
    assert run(train_document(willing, second), tmp_path / "w").code == 0
    assert files_below(tmp_path / "out" / "adapter") != before
