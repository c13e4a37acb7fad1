"""Attempts at one stage that are killed, or run at the same time: one result, the same as that of a quiet run."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from kubepeft.storage import publish
from kubepeft.storage.local import LocalStore
from kubepeft_jobs.train import published
from tests.stages import Running, fine_tune, prepare_document, prepared, run, train_document, write_chats, write_lines


def published_bytes(output: Path) -> dict[str, bytes]:
    """The files of prepared/, by name; the report, which names the place, left out."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("prepared/**/*.arrow"))}


def test_a_killed_prepare_leaves_nothing_that_counts_and_the_next_gives_the_same_bytes(
    qwen2: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    rows = [{"prompt": f"question {n}", "completion": "word " * draw.randint(1, 40)} for n in range(20_000)]
    data = write_lines(tmp_path / "train.jsonl", rows)
    quiet, killed = (fine_tune(qwen2, data, tmp_path / name) for name in ("quiet", "killed"))
    prepared(quiet, tmp_path / "w")
    running = Running(prepare_document(killed), tmp_path / "killed-w")
    running.wait_for(lambda: any((tmp_path / "killed-w/tmp").rglob("*.arrow")))
    running.kill()
    assert not list((tmp_path / "killed").rglob("manifest.json"))
    prepared(killed, tmp_path / "w")
    assert published_bytes(tmp_path / "killed") == published_bytes(tmp_path / "quiet")


def test_of_two_attempts_at_once_one_publishes_and_both_report_the_same_adapter(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(qwen2, write_chats(tmp_path / "train.jsonl"), tmp_path / "out", training={"maxSteps": 4})
    document = train_document(found, prepared(found, tmp_path / "w"))
    attempts = [Running(document, tmp_path / f"w{number}") for number in (1, 2)]
    one, other = (attempt.end() for attempt in attempts)
    assert (one.code, other.code) == (0, 0), one.log + other.log
    assert one.result.adapter == other.result.adapter
    assert sorted((one.result.found_published, other.result.found_published)) == [False, True]
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


def test_a_report_that_the_winner_puts_in_place_meanwhile_is_no_error(qwen2: Path, tmp_path: Path) -> None:
    class Overtaken(LocalStore):
        """Between a look at the report and its copy another attempt has done both steps."""

        def copy(self, keys: Mapping[str, str]) -> None:
            super().copy(keys)
            super().delete(keys)
            super().copy(keys)

    found = fine_tune(qwen2, write_chats(tmp_path / "train.jsonl"), tmp_path / "out", training={"maxSteps": 2})
    document = train_document(found, prepared(found, tmp_path / "w"))
    assert run(document, tmp_path / "w").code == 0
    place = published.Place.of(document)
    manifest = publish.read_manifest(place.store, place.key("adapter"))
    assert manifest is not None
    assert isinstance(place.store, LocalStore)
    slow = published.Place(Overtaken(place.store._root, place.store._base), place.root)
    page = (tmp_path / "out" / "report.html").rename(tmp_path / "page.html")
    slow.store.upload({published.report_of(slow, manifest.attempt): page})
    assert published.result(document, slow, manifest, found_published=True).outcome == "Succeeded"
    assert (tmp_path / "out" / "report.html").read_bytes() == page.read_bytes()


def test_the_merged_model_answers_as_the_adapter_does(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(
        qwen2, write_chats(tmp_path / "t.jsonl"), tmp_path / "out", training={"maxSteps": 4}, output={"merged": True}
    )
    ended = run(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w")
    assert ended.code == 0, ended.log
    manifests = list((tmp_path / "out" / "merged").rglob("manifest.json"))
    assert len(manifests) == 1
    (weights,) = (tmp_path / "out" / "merged").rglob("model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(weights.parent)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    ids = AutoTokenizer.from_pretrained(weights.parent)("question 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackers_are_told_the_losses(qwen2: Path, tmp_path: Path) -> None:
    found = fine_tune(
        qwen2, write_chats(tmp_path / "t.jsonl"), tmp_path / "out",
        training={"maxSteps": 3, "reportTo": ["tensorboard", "mlflow", "wandb"], "runName": "a-run"},
    )  # fmt: skip
    env = {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
    }
    ended = run(train_document(found, prepared(found, tmp_path / "w")), tmp_path / "w", env)
    assert ended.code == 0, ended.log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "tensorboard").rglob("events.out.tfevents.*")
    told = EventAccumulator(str(events))
    told.Reload()
    state = json.loads(next((tmp_path / "out").rglob("trainer_state.json")).read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert [point.value for point in told.Scalars("train/loss")] == pytest.approx(losses)
    (told_mlflow,) = (tmp_path / "mlflow").glob("*/*/metrics/loss")
    assert [float(line.split()[1]) for line in told_mlflow.read_text().splitlines()] == pytest.approx(losses)
    assert list((tmp_path / "wandb").rglob("*.wandb"))
