"""What a user does, on a real node: apply a manifest, watch it, take the adapter and the predictions from S3."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.chart.helm import NAMESPACE, RELEASE, helm
from tests.e2e.installation import BATCH_INFERENCES, QUICKSTART, Installation, Team, batch_inference, fine_tune
from tests.stages import write_lines
from tests.tiny import tiny_seq2seq


def lines(folder: Path) -> list[dict[str, Any]]:
    """The answers in a predictions folder."""
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def test_the_installation_passes_its_own_test(installation: Installation) -> None:
    words = helm("test", RELEASE, "--namespace", NAMESPACE, kubeconfig=installation.cluster.kubeconfig)
    assert "Succeeded" in words


def test_the_quickstart_goes_through_every_phase_to_predictions(team: Team, tmp_path: Path) -> None:
    team.apply(fine_tune("support-bot"))
    with team.watching("support-bot") as watch:
        team.running("train", "support-bot")
        followed = team.kubepeft("logs", "support-bot", "--stage", "train", "--follow")
        told = team.kubepeft("status", "support-bot", "--watch")
        status = team.wait_for("support-bot", "Succeeded")
    assert "step 40/40  loss" in followed
    assert "train succeeded" in followed
    assert f"adapter: {status['adapter']['uri']}" in told
    shown = watch.lines
    assert shown[0].split() == ["NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "ETA", "AGE"]
    phases = list(dict.fromkeys(line.split()[1] for line in shown[1:] if len(line.split()) > 4))
    wanted = ["Preparing", "Training", "Inferring", "Succeeded"]
    assert [phase for phase in phases if phase in wanted] == wanted, shown

    assert {one["type"]: one["status"] for one in status["conditions"]} == {
        "Accepted": "True", "Trained": "True", "Complete": "True",
    }  # fmt: skip
    assert [(one["stage"], one["outcome"]) for one in status["attempts"]] == [
        ("prepare", "Succeeded"), ("train", "Succeeded"),
    ]  # fmt: skip
    assert status["training"]["step"] == status["training"]["totalSteps"] == 40
    assert status["training"]["trainableParameters"] < status["training"]["totalParameters"] / 4
    assert status["inference"]["completed"] == status["inference"]["total"] == 120

    adapter = team.installation.stored(status["adapter"]["uri"])
    assert adapter == team.installation.s3.root / "adapters" / team.namespace / "support-bot" / "adapter"
    names = {file.name for file in adapter.iterdir() if file.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "manifest.json"} <= names
    assert (adapter.parent / "report.html").stat().st_size > 10_000
    answers = lines(adapter.parent / "predictions" / "support-bot")
    assert {answer["id"] for answer in answers} == {json.loads(line)["id"] for line in questions()}

    plain = answered_by_plain_peft(adapter, questions()[:8], tmp_path)
    ours = {answer["id"]: answer["text"] for answer in answers}
    assert plain == {name: ours[name] for name in plain}


def questions() -> list[str]:
    return (QUICKSTART / "data" / "questions.jsonl").read_text().splitlines()


def answered_by_plain_peft(adapter: Path, asked: list[str], folder: Path) -> dict[str, str]:
    """Greedy answers of the adapter on its base in a Python that has never heard of kubepeft."""
    script = """
        import json, sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        adapter, base = sys.argv[1:3]
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
        found = {}
        for line in sys.stdin:
            asked = json.loads(line)
            inputs = tokenizer.apply_chat_template(
                asked["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            found[asked["id"]] = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0]
        assert not [name for name in sys.modules if name.startswith("kubepeft")]
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), adapter, QUICKSTART / "base"],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_prompt_tuning_of_an_encoder_decoder(team: Team, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {number % 5}", "completion": f"it is {number % 5}"} for number in range(40)]
    asked = [{"id": f"a{number}", "prompt": f"say {number}"} for number in range(6)]
    team.installation.bucket("models", {"t5": tiny_seq2seq(tmp_path / "t5")})
    team.installation.bucket(
        "data",
        {
            "pairs.jsonl": write_lines(tmp_path / "pairs.jsonl", rows),
            "asked.jsonl": write_lines(tmp_path / "asked.jsonl", asked),
        },
    )
    team.apply(
        fine_tune(
            "prompts",
            model={"uri": "s3://models/t5", "task": "SEQ_2_SEQ_LM"},
            method={"lora": None, "promptTuning": {"numVirtualTokens": 4, "promptTuningInit": "RANDOM"}},
            data={"train": "s3://data/pairs.jsonl", "eval": None, "evalFraction": 0.2},
            training={"maxSteps": 10},
            inference={"input": "s3://data/asked.jsonl", "maxNewTokens": 8},
        )
    )
    status = team.wait_for("prompts", "Succeeded")
    adapter = team.installation.stored(status["adapter"]["uri"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("PROMPT_TUNING", "SEQ_2_SEQ_LM")
    assert status["training"]["trainableParameters"] == 4 * 32 * 2  # of encoder and decoder
    assert {answer["id"] for answer in lines(adapter.parent / "predictions" / "prompts")} == {
        one["id"] for one in asked
    }


def test_four_shards_answer_every_question_once_though_one_of_their_pods_is_killed(team: Team) -> None:
    team.apply(fine_tune("bot", inference=None))
    # Applied together: it waits for the adapter by itself.
    team.apply(batch_inference("questions", adapter={"fineTune": "bot"}, shards=4))
    # The operator may see it before it sees the FineTune.
    team.wait_until(
        "questions",
        lambda _: team.condition("questions", path=BATCH_INFERENCES).get("reason") == "WaitingForAdapter",
        BATCH_INFERENCES,
    )
    team.wait_for("bot", "Succeeded")
    victim = team.running("infer", "questions")
    team.kubectl("delete", "pod", victim["metadata"]["name"], "--grace-period=0", "--force")
    status = team.wait_for("questions", "Succeeded", path=BATCH_INFERENCES)
    assert (status["inference"]["total"], status["inference"]["completed"], status["inference"]["failed"]) == (
        120,
        120,
        0,
    )
    folder = team.installation.stored(status["inference"]["output"])
    assert sorted(one["id"] for one in lines(folder)) == sorted(json.loads(line)["id"] for line in questions())
    assert len(list(folder.glob("part-*.jsonl"))) == 4
    assert json.loads((folder / "summary.json").read_text())["completed"] == 120


def test_a_base_model_on_a_claim_and_a_cache_between_pods(team: Team) -> None:
    team.cluster.volume("models", team.namespace, files=QUICKSTART / "base")
    cache = team.cluster.volume("cache", team.namespace)
    team.apply(
        fine_tune(
            "claimed", model={"uri": "pvc://models/"}, inference=None, training={"maxSteps": 5, "saveStrategy": "no"}
        ),
        fine_tune("cached", cache={"claim": "cache"}, inference=None, training={"maxSteps": 5, "saveStrategy": "no"}),
    )
    claimed = team.wait_for("claimed", "Succeeded")
    assert claimed["prepared"]["modelCommit"]
    team.wait_for("cached", "Succeeded")
    kept = list((cache / "models").rglob("model.safetensors"))
    assert [file.stat().st_size for file in kept] == [(QUICKSTART / "base" / "model.safetensors").stat().st_size]


def test_what_has_been_published_is_found_again_in_seconds(team: Team) -> None:
    team.apply(fine_tune("twice", inference=None, training={"maxSteps": 5, "saveStrategy": "no"}))
    first = team.wait_for("twice", "Succeeded")
    team.kubectl("delete", "ft", "twice")
    team.apply(fine_tune("twice", inference=None, training={"maxSteps": 5, "saveStrategy": "no"}))
    again = team.wait_for("twice", "Succeeded")
    assert again["adapter"] == first["adapter"]


@pytest.mark.parametrize("phase", ["Preparing", "Training"])
def test_suspended_it_saves_and_resumed_it_goes_on(team: Team, phase: str) -> None:
    team.apply(
        fine_tune(
            "paused", inference=None, training={"maxSteps": 300, "perDeviceTrainBatchSize": 4, "evalStrategy": "no"}
        )
    )
    if phase == "Training":
        team.wait_until("paused", lambda status: (status.get("training") or {}).get("step", 0) > 5)
    else:
        team.wait_for("paused", phase)
    team.kubectl("patch", "ft", "paused", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    team.wait_for("paused", "Suspended", seconds=60)
    team.kubectl("patch", "ft", "paused", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    status = team.wait_for("paused", "Succeeded")
    if phase == "Training":
        assert status["attempts"][-1]["resumedFromStep"] > 5, status["attempts"]
