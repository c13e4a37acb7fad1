"""The supervisor: what it makes of bad documents, of workers that die, and of memory that runs out."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kubepeft import stage
from kubepeft.stage import Result
from kubepeft_jobs.supervisor import smaller_micro_batch
from tests.stages import (
    Running,
    figures_of,
    fine_tune,
    prepare_document,
    prepared,
    train_document,
    write_chats,
    write_lines,
)


@pytest.mark.parametrize(
    ("now", "effective", "smaller"),
    [(8, 8, 4), (8, 24, 4), (6, 6, 3), (3, 6, 1), (5, 10, 2), (4, 12, 2), (2, 2, 1), (1, 8, None)],
)
def test_the_next_micro_batch_is_at_most_half_and_keeps_the_effective_batch(
    now: int, effective: int, smaller: int | None
) -> None:
    assert smaller_micro_batch(now, effective) == smaller


@pytest.mark.parametrize(
    ("argument", "document", "words"),
    [
        ("train", None, "the environment has no KUBEPEFT_STAGE"),
        ("train", "{", "Invalid JSON"),
        ("train", '{"stage": "dance"}', "dance"),
        ("prepare", '{"stage": "prepare", "name": "a"}', "specDigest"),
    ],
)
def test_a_bad_document_is_the_users_to_mend_and_leaves_a_result(
    argument: str, document: str | None, words: str, tmp_path: Path
) -> None:
    result_file = tmp_path / "result.json"
    env = {**os.environ, stage.ENV_RESULT: str(result_file), stage.ENV_PORT: "0"}
    env |= {} if document is None else {stage.ENV_STAGE: document}
    ended = subprocess.run(
        [sys.executable, "-m", "kubepeft_jobs", argument],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    result = Result.model_validate_json(result_file.read_bytes())
    assert (ended.returncode, result.exit_code, result.reason) == (65, 65, "BadStage")
    assert words in result.message
    assert "Traceback" not in ended.stderr


def test_the_supervisor_starts_without_torch() -> None:
    code = "import sys, kubepeft_jobs.supervisor as s; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )


def training(qwen2: Path, tmp_path: Path, env: dict[str, str] | None = None, workers: int = 1) -> Running:
    """A training run long enough to be disturbed."""
    found = fine_tune(
        qwen2, write_chats(tmp_path / "train.jsonl"), tmp_path / "out", training={"maxSteps": 5000, "saveSteps": 4}
    )
    reference = prepared(found, tmp_path / "w")
    return Running(train_document(found, reference, workers=workers), tmp_path / "w", env)


def workers_of(running: Running) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(running.process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_killed_worker_ends_the_stage_with_a_hint(qwen2: Path, tmp_path: Path) -> None:
    running = training(qwen2, tmp_path)
    running.wait_for("checkpoint of step 4 is in storage")
    (worker,) = workers_of(running)
    os.kill(worker, signal.SIGKILL)
    ended = running.end()
    assert (ended.code, ended.result.reason) == (1, "Killed")
    assert "SIGKILL" in ended.result.message
    assert "memory limit" in ended.result.hint


def test_no_worker_outlives_its_supervisor(qwen2: Path, tmp_path: Path) -> None:
    running = training(qwen2, tmp_path, workers=2)
    running.wait_for("checkpoint of step 4 is in storage")
    workers = workers_of(running)
    assert len(workers) == 2
    os.kill(running.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    running.process.wait()
    while any(runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker still runs"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_metrics_page_shows_how_far_training_is(qwen2: Path, tmp_path: Path) -> None:
    running = training(qwen2, tmp_path)
    running.wait_for("checkpoint of step 4 is in storage")
    figures = figures_of(running)
    running.process.terminate()
    ended = running.end()
    assert ended.code == 143
    assert figures["kubepeft_training_total_steps"] == 5000
    assert figures["kubepeft_training_step"] >= 4
    for name in (
        "loss",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "epoch",
        "eta_seconds",
        "trainable_parameters",
    ):
        assert figures[f"kubepeft_training_{name}"] > 0, name
    assert figures["kubepeft_memory_bytes"] > 1e8


def test_out_of_memory_starts_again_with_a_smaller_micro_batch_and_the_same_losses(qwen2: Path, tmp_path: Path) -> None:
    """A real refusal of the allocator: the kernel grants the worker little more memory than it has when training begins."""
    data = write_lines(tmp_path / "train.jsonl", ({"prompt": "x y " * 100, "completion": f"z {n}"} for n in range(192)))
    results = {}
    for name in ("free", "tight"):
        found = fine_tune(
            qwen2,
            data,
            tmp_path / name,
            training={"maxSteps": 2, "perDeviceTrainBatchSize": 96},
            data={"packing": "never", "maxLength": 512},
        )
        running = Running(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w")
        if name == "tight":
            running.wait_for("micro-batches:")
            (worker,) = workers_of(running)
            status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
            limit = int(status["VmData"].split()[0]) * 1024 + (64 << 20)
            resource.prlimit(worker, resource.RLIMIT_DATA, (limit, limit))
        ended = running.end()
        assert ended.code == 0, ended.log
        assert ended.result.training is not None
        results[name] = ended.result.training
    assert (results["free"].out_of_memory_restarts, results["tight"].out_of_memory_restarts) == (0, 1)
    assert results["tight"].loss == pytest.approx(results["free"].loss, rel=1e-4)


def test_prepare_stops_at_once_on_sigterm(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(qwen2, write_chats(tmp_path / "train.jsonl", rows=400_000), tmp_path / "out")
    running = Running(prepare_document(found), tmp_path / "w")
    running.wait_for(lambda: figures_of(running).get("kubepeft_prepare_rows", 0) > 0)
    running.process.terminate()
    ended = running.end(timeout=30)
    assert (ended.code, ended.result.outcome) == (143, "Saved"), ended.log
    assert not list((tmp_path / "out").rglob("manifest.json"))
