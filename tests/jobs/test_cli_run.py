"""`kubepeft run` from a user's seat: on a pipe, on a terminal, interrupted, and with a manifest that goes wrong."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stages import write_chats, write_lines

KUBEPEFT = Path(sys.executable).parent / "kubepeft"
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def write_manifest(folder: Path, model: Path, training: str) -> Path:
    write_chats(folder / "train.jsonl")
    write_lines(folder / "questions.jsonl", [{"id": str(n), "prompt": f"question {n}"} for n in range(3)])
    path = folder / "finetune.yaml"
    path.write_text(
        f"""apiVersion: kubepeft.io/v1alpha1
kind: FineTune
metadata: {{name: a-bot}}
spec:
  model: {{uri: {model}, dtype: float32}}
  data: {{train: train.jsonl, evalFraction: 0.2}}
  training: {training}
  output: {{uri: out}}
  inference: {{input: questions.jsonl, maxNewTokens: 3}}
"""
    )
    return path


@pytest.fixture(scope="module")
def folder(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_manifest(folder, qwen2, "{maxSteps: 6, learningRate: 5e-3}")
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    """The first run of the manifest, from another folder and into a pipe."""
    return subprocess.run(
        [KUBEPEFT, "run", folder / "finetune.yaml"], env=ENV, capture_output=True, text=True, check=False
    )


def test_a_run_on_a_pipe_is_plain_and_ends_with_the_places(
    first: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert (first.returncode, first.stderr) == (0, ""), first.stdout + first.stderr
    assert "\x1b" not in first.stdout
    assert "\r" not in first.stdout
    lines = first.stdout.splitlines()
    assert lines[0] == f"FineTune a-bot → file://{folder}/out"
    assert [line.split()[1] for line in lines if line.startswith("✓")] == ["prepare", "train", "infer"]
    for word, place in (
        ("adapter", "out/adapter"),
        ("report", "out/report.html"),
        ("predictions", "out/predictions/a-bot"),
    ):
        assert any(line.startswith(word) and f"file://{folder}/{place}" in line for line in lines), word
    assert len((folder / "out/predictions/a-bot/part-00000-of-00001.jsonl").read_text().splitlines()) == 3


def test_the_same_run_again_finds_everything(first: subprocess.CompletedProcess[str], folder: Path) -> None:
    again = subprocess.run(
        [KUBEPEFT, "run", folder / "finetune.yaml"], env=ENV, capture_output=True, text=True, check=True
    )
    assert again.stdout.count("found as an earlier run left it") == 3


def test_report_sums_up_what_the_run_published(
    first: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    told = subprocess.run(
        [KUBEPEFT, "report", folder / "out", "-o", tmp_path / "r.html"], capture_output=True, text=True, check=True
    ).stdout
    assert "3 of 3 rows answered" in told
    assert "6 of 6" in told
    assert "<html" in (tmp_path / "r.html").read_text()


def test_another_manifest_may_not_write_there(first: subprocess.CompletedProcess[str], folder: Path) -> None:
    other = folder / "other.yaml"
    other.write_text((folder / "finetune.yaml").read_text().replace("5e-3", "1e-3"))
    done = subprocess.run([KUBEPEFT, "run", other], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert "OutputBelongsToAnotherSpec" in done.stdout
    assert "output.overwrite: true" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_stage_that_fails_says_what_where_and_what_to_do(qwen2: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, qwen2, "{maxSteps: 6}")
    with (tmp_path / "train.jsonl").open("a") as data:
        data.write("{broken\n")
    done = subprocess.run([KUBEPEFT, "run", manifest], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert re.search(r"✗ prepare .* BadRow", done.stdout)
    assert "train.jsonl:49" in done.stdout
    assert "→ " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def on_a_terminal(command: list[str | Path]) -> tuple[subprocess.Popen[bytes], int]:
    """The command on a terminal of its own, 100 columns wide, and our end of it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=ENV | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def read_until(ours: int, process: subprocess.Popen[bytes], words: str | None, seconds: float = 240) -> str:
    """What the terminal shows until `words` come, or to the end."""
    shown, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            shown += piece
            if words is not None and words in shown.decode(errors="replace"):
                return shown.decode(errors="replace")
        elif process.poll() is not None:
            break
    assert words is None, f"no {words!r} in:\n{shown.decode(errors='replace')}"
    return shown.decode(errors="replace")


def test_ctrl_c_on_a_terminal_saves_says_how_to_go_on_and_the_next_run_does(qwen2: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, qwen2, "{maxSteps: 4000, saveSteps: 5, evalSteps: 100000, loggingSteps: 5}")
    process, ours = on_a_terminal([KUBEPEFT, "run", manifest])
    shown = read_until(ours, process, "loss ")
    assert "\x1b[" in shown, "no live bar on a terminal"
    process.send_signal(signal.SIGINT)
    shown = read_until(ours, process, None)
    os.close(ours)
    assert process.wait(60) == 130
    assert "Saving; once more to stop at once." in shown
    assert "saved at step" in shown
    assert f"Go on with: kubepeft run {manifest}" in re.sub(r"\s+", " ", shown)
    assert not (tmp_path / "out/adapter/manifest.json").exists()

    running = subprocess.Popen([KUBEPEFT, "run", manifest], env=ENV, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out/logs/train.log"
    deadline = time.monotonic() + 240
    while "going on from the checkpoint of step" not in log.read_text():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.terminate()
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 143
    assert "saved at step" in told


def test_two_documents_of_one_file_run_in_order(first: subprocess.CompletedProcess[str], folder: Path) -> None:
    both = folder / "both.yaml"
    both.write_text(
        (folder / "finetune.yaml").read_text()
        + "---\napiVersion: kubepeft.io/v1alpha1\nkind: BatchInference\nmetadata: {name: more}\n"
        + "spec: {adapter: {fineTune: a-bot}, input: questions.jsonl, output: more, maxNewTokens: 2}\n"
    )
    done = subprocess.run([KUBEPEFT, "run", "-q", both], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓" not in done.stdout
    assert json.loads((folder / "more/summary.json").read_text())["completed"] == 3
