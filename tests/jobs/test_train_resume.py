"""Training that is stopped or killed, and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from kubepeft.types import FineTune
from tests.stages import Running, fine_tune, prepared, run, train_document, write_chats

STEPS = 100
"""A second or two even of a fast machine, so that a signal comes before the end."""


def run_of(qwen2: Path, tmp_path: Path, name: str, **training: object) -> FineTune:
    settings = {"maxSteps": STEPS, "saveSteps": 4, "evalSteps": 4, "learningRate": 1e-3, **training}
    return fine_tune(
        qwen2,
        write_chats(tmp_path / "train.jsonl"),
        tmp_path / name,
        training=settings,
        data={"evalFraction": 0.2},
        method={"lora": {"r": 4, "loraDropout": 0.1}},
    )


def history(output: Path) -> list[dict[str, float]]:
    """Losses and eval losses by step, as the published run's last checkpoint tells them; times and speeds left out."""
    newest = sorted(output.glob("checkpoints/*/*/manifest.json"))[-1].parent
    (state,) = newest.rglob("trainer_state.json")
    kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    return [
        {name: entry[name] for name in kept if name in entry} for entry in json.loads(state.read_text())["log_history"]
    ]


@pytest.fixture(scope="module")
def undisturbed(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    found = run_of(qwen2, tmp_path, "out")
    ended = run(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w")
    assert ended.code == 0, ended.log
    return history(tmp_path / "out")


def test_sigterm_saves_and_the_next_attempt_goes_on_to_the_last_digit(
    qwen2: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    found = run_of(qwen2, tmp_path, "out")
    document = train_document(found, prepared(found, tmp_path / "w"))
    running = Running(document, tmp_path / "w")
    running.wait_for("checkpoint of step 8 is in storage")
    running.process.send_signal(signal.SIGTERM)
    saved = running.end()
    assert (saved.code, saved.result.outcome) == (143, "Saved"), saved.log
    assert saved.result.training is not None
    assert f"saved at step {saved.result.training.step} of {STEPS}" in saved.result.message
    assert not (tmp_path / "out/adapter/manifest.json").exists()

    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert ended.result.resumed_from_step == saved.result.training.step
    assert history(tmp_path / "out") == undisturbed


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(
    qwen2: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    found = run_of(qwen2, tmp_path, "out")
    document = train_document(found, prepared(found, tmp_path / "w"))
    running = Running(document, tmp_path / "w")
    running.wait_for("checkpoint of step 12 is in storage")
    running.kill()
    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert ended.result.resumed_from_step is not None
    assert ended.result.resumed_from_step >= 12
    assert history(tmp_path / "out") == undisturbed


def test_two_workers_stop_at_the_same_step_and_go_on(qwen2: Path, tmp_path: Path) -> None:
    found = run_of(qwen2, tmp_path, "out", perDeviceTrainBatchSize=2, maxSteps=2 * STEPS)
    document = train_document(found, prepared(found, tmp_path / "w"), workers=2)
    running = Running(document, tmp_path / "w")
    running.wait_for("checkpoint of step 4 is in storage")
    # Only one worker is told, as when a node's signals are slow to arrive.
    worker = int(
        subprocess.run(
            ["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()[1]
    )
    os.kill(worker, signal.SIGTERM)
    saved = running.end()
    assert saved.code == 143, saved.log
    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert ended.result.resumed_from_step


def test_early_stopping_publishes_the_best_checkpoint_even_after_a_resume(qwen2: Path, tmp_path: Path) -> None:
    found = run_of(
        qwen2, tmp_path, "out", learningRate=0.5, lrSchedulerType="constant", earlyStoppingPatience=3, maxSteps=400
    )
    document = train_document(found, prepared(found, tmp_path / "w"))
    running = Running(document, tmp_path / "w")
    running.wait_for("checkpoint of step 8 is in storage")
    running.kill()
    ended = run(document, tmp_path / "w")
    assert ended.code == 0, ended.log
    assert ended.result.training is not None
    assert ended.result.training.step < 400
    evaluations = [entry["eval_loss"] for entry in history(tmp_path / "out") if "eval_loss" in entry]
    assert ended.result.training.eval_loss == pytest.approx(min(evaluations), rel=1e-5)
