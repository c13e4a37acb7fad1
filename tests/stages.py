"""For tests of whole stages: data files, stage documents, and the real supervisor in a subprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubepeft import digest, manifest, progress, stage
from kubepeft.stage import InferStage, PreparedRef, PrepareStage, Result, TrainStage
from kubepeft.types import FineTune

Stage = PrepareStage | TrainStage | InferStage


@dataclass(frozen=True)
class Ended:
    """A stage that has ended."""

    code: int
    result: Result
    log: str


def write_chats(path: Path, rows: int = 48) -> Path:
    """Chat rows with something to learn: the answer repeats the question's number."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"question {number % 7} " + "x " * (number % 5)},
                {"role": "assistant", "content": f"answer {number % 7}"},
            ]
        }
        for number in range(rows)
    ]
    return write_lines(path, lines)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def uri(place: Path | str) -> str:
    return f"file://{place}" if str(place).startswith("/") else str(place)


def fine_tune(model: Path | str, train: Path | str, output: Path | str, /, **spec: Any) -> FineTune:
    """A FineTune with small, quick settings; `spec` overrides or adds whole sections, merged one level deep."""
    sections: dict[str, Any] = {
        "model": {"uri": uri(model), "dtype": "float32"},
        "data": {"train": uri(train)},
        "method": {"lora": {"r": 4, "loraAlpha": 8}},
        "training": {"maxSteps": 8, "learningRate": 5e-3, "loggingSteps": 1, "saveSteps": 2},
        "output": {"uri": uri(output)},
    }
    for name, section in spec.items():
        merged = {**sections.get(name, {}), **section} if isinstance(section, dict) and name != "method" else section
        sections[name] = merged
    if "inference" in sections:
        sections["inference"]["input"] = uri(sections["inference"]["input"])
    text = json.dumps(
        {"apiVersion": "kubepeft.io/v1alpha1", "kind": "FineTune", "metadata": {"name": "test"}, "spec": sections}
    )
    (found,) = manifest.load(text, "test.yaml", local=True)
    assert isinstance(found, FineTune)
    return found


def prepare_document(found: FineTune) -> PrepareStage:
    assert found.spec.output.uri is not None
    return stage.prepare_stage("test", found.spec, found.spec.output.uri)


def train_document(found: FineTune, prepared: PreparedRef, workers: int = 1) -> TrainStage:
    return stage.train_stage(prepare_document(found), prepared, gpus=workers)


def infer_document(found: FineTune, **changes: Any) -> InferStage:
    inference = stage.batch_inference_of("test", found.spec)
    assert inference is not None
    assert found.spec.output.uri is not None
    document = stage.infer_stage(
        "test",
        inference,
        stage.adapter_uri(found.spec.output.uri),
        stage.predictions_uri(found.spec.output.uri, "test"),
        gpus=0,
    )
    return document.model_copy(update={"spec_digest": digest.of_spec(inference), **changes})


class Running:
    """A stage's process. Its environment hides GPUs, so that results are the same everywhere."""

    def __init__(self, document: Stage, work: Path, env: Mapping[str, str] | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        number = len(list(work.glob("*.log")))
        self.result_file, self.port_file = work / f"{number}.json", work / f"{number}.port"
        self.log_file = work / f"{number}.log"
        temporary = work / "tmp"
        temporary.mkdir(exist_ok=True)
        settings = {
            stage.ENV_STAGE: document.dumps(),
            stage.ENV_RESULT: str(self.result_file),
            stage.ENV_PORT: "0",
            stage.ENV_PORT_FILE: str(self.port_file),
            "KUBEPEFT_LOG": "text",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(temporary),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",  # several threads on a tiny model cost more than they give
        }
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kubepeft_jobs", document.stage],
                env={**os.environ, **settings, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: str | Callable[[], bool], timeout: float = 120) -> None:
        """Wait until the log holds a text, or a condition holds."""
        deadline = time.monotonic() + timeout
        while not (what in self.log() if isinstance(what, str) else what()):
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what!r}:\n{self.log()}"
            assert time.monotonic() < deadline, f"no {what!r} within {timeout} s:\n{self.log()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of the supervisor and its workers, as when the machine goes away."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout: float = 300) -> Ended:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log()}") from None
        assert self.result_file.exists(), self.log()
        return Ended(code, Result.model_validate_json(self.result_file.read_bytes()), self.log())


def figures_of(running: Running) -> dict[str, float]:
    """What the stage's metrics page says; nothing before there is one."""
    if not running.port_file.exists() or not (port := running.port_file.read_text()):
        return {}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        return progress.parse(page.read().decode())


def run(document: Stage, work: Path, env: Mapping[str, str] | None = None) -> Ended:
    """Run a stage to its end."""
    return Running(document, work, env).end()


def prepared(found: FineTune, work: Path, env: Mapping[str, str] | None = None) -> PreparedRef:
    """Run the prepare stage and return what it found."""
    ended = run(prepare_document(found), work, env)
    assert ended.code == 0, ended.log
    assert ended.result.prepared is not None
    return ended.result.prepared
