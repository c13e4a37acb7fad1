"""The infer stage as a process: killed, stopped, run again, with bad lines among the good, and in another's folder."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kubepeft.types import FineTune
from tests.stages import (
    Running,
    figures_of,
    fine_tune,
    infer_document,
    prepared,
    run,
    train_document,
    write_chats,
    write_lines,
)

LINES = 2000


@pytest.fixture(scope="module")
def trained(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published adapter."""
    folder = tmp_path_factory.mktemp("trained")
    found = fine_tune(qwen2, write_chats(folder / "t.jsonl"), folder / "out", training={"maxSteps": 2})
    ended = run(train_document(found, prepared(found, folder / "w")), folder / "w")
    assert ended.code == 0, ended.log
    return folder / "out"


def questions(trained: Path, qwen2: Path, tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> FineTune:
    file = write_lines(tmp_path / "questions.jsonl", rows)
    return fine_tune(
        qwen2, tmp_path / "none.jsonl", trained, inference={"input": str(file), "maxNewTokens": 3} | settings
    )


MANY = [{"id": f"q{number}", "prompt": f"question {number}"} for number in range(LINES)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (part,) = folder.glob("part-*.jsonl")
    return [json.loads(line) for line in part.read_text().splitlines()]


def test_after_a_kill_no_kept_answer_is_made_again_and_the_end_is_the_same(
    trained: Path, qwen2: Path, tmp_path: Path
) -> None:
    found = questions(trained, qwen2, tmp_path, MANY)
    quiet = infer_document(found, output_uri=f"file://{tmp_path}/quiet")
    assert run(quiet, tmp_path / "w").code == 0
    expected = rows_of(tmp_path / "quiet")
    assert [row["id"] for row in expected] == [row["id"] for row in MANY]

    document = infer_document(found, output_uri=f"file://{tmp_path}/killed")
    running = Running(document, tmp_path / "w")
    running.wait_for(lambda: any((tmp_path / "killed").glob(".chunks/*/00000/*.jsonl")))
    running.kill()
    assert not list((tmp_path / "killed").rglob("manifest.json"))
    (chunk, *_) = sorted((tmp_path / "killed").glob(".chunks/*/00000/*.jsonl"))
    kept = [json.loads(line) for line in chunk.read_text().splitlines()]
    for answer in kept:  # a mark that only an answer that was left alone can carry to the end
        answer["row"]["text"] = "kept"
    chunk.write_text("".join(json.dumps(answer) + "\n" for answer in kept))

    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert f" of {LINES} lines are answered" in ended.log
    marked = {answer["row"]["id"] for answer in kept}
    assert rows_of(tmp_path / "killed") == [row | {"text": "kept"} if row["id"] in marked else row for row in expected]
    assert not list((tmp_path / "killed").rglob(".chunks/*/*/*"))


def test_sigterm_keeps_the_answers_and_the_next_attempt_goes_on(trained: Path, qwen2: Path, tmp_path: Path) -> None:
    document = infer_document(questions(trained, qwen2, tmp_path, MANY), output_uri=f"file://{tmp_path}/out")
    running = Running(document, tmp_path / "w")
    running.wait_for(lambda: "kubepeft_inference_completed" in figures_of(running))
    assert figures_of(running)["kubepeft_inference_completed"] == 0, "a rate would miss the first answers"
    running.wait_for(lambda: any((tmp_path / "out").glob(".chunks/*/00000/*.jsonl")))
    running.process.send_signal(signal.SIGTERM)
    saved = running.end()
    assert (saved.code, saved.result.outcome) == (143, "Saved"), saved.log
    assert f" of {LINES} answers" in saved.result.message
    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert ended.result.inference is not None
    assert (ended.result.inference.completed, ended.result.inference.total) == (LINES, LINES)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [row["id"] for row in MANY]


def test_bad_lines_are_told_in_errors_jsonl_and_stop_nothing(trained: Path, qwen2: Path, tmp_path: Path) -> None:
    found = questions(trained, qwen2, tmp_path, MANY[:3])
    (tmp_path / "questions.jsonl").write_bytes(
        b'{"id": "a", "prompt": "one"}\n{broken\n{"id": "b"}\n{"id": "a", "prompt": "again"}\n'
        b'{"id": "c", "prompt": "\xff"}\n{"id": "d", "prompt": "'
        + b"long " * 600
        + b'"}\n{"id": "e", "prompt": "two"}\n'
    )
    ended = run(infer_document(found, output_uri=f"file://{tmp_path}/out"), tmp_path / "w")
    assert ended.code == 0, ended.log
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["a", "e"]
    errors = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert len(errors) == 5
    assert all(row["error"] for row in errors)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["total"], summary["completed"], summary["failed"]) == (7, 2, 5)


def test_answers_of_other_settings_are_neither_mixed_nor_overwritten(
    trained: Path, qwen2: Path, tmp_path: Path
) -> None:
    output = {"output_uri": f"file://{tmp_path}/out"}
    assert run(infer_document(questions(trained, qwen2, tmp_path, MANY[:4]), **output), tmp_path / "w").code == 0
    before = rows_of(tmp_path / "out")
    other = infer_document(questions(trained, qwen2, tmp_path, MANY[:4], maxNewTokens=5), **output)
    refused = run(other, tmp_path / "w")
    assert (refused.code, refused.result.reason) == (65, "OutputBelongsToAnotherSpec"), refused.log
    assert rows_of(tmp_path / "out") == before
    willing = run(other.model_copy(update={"overwrite": True}), tmp_path / "w")
    assert willing.code == 0, willing.log
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [row["id"] for row in before]
    assert rows_of(tmp_path / "out") != before
