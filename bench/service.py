"""The price of the service: a FineTune against a bare Job with a plain PEFT script, from the same image on the same node.

`python bench/service.py --rounds 3` starts a real one-node Kubernetes with the chart installed and lets the two take turns. Both get base
model and data from the same S3, train the same steps with the same LoRA and put the adapter there; the script does nothing else.
Printed, from `kubectl apply` on: when the first training step was done and when the adapter was in S3. A FineTune has a prepare pod
of its own, which the script does not, so that pod's time is printed too and taken off in the last column.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster.node import Cluster
from tests.e2e.installation import CA_BUNDLE, S3_SECRET, Team, fine_tune, found_team, install

STEPS, BATCH, LENGTH, RATE = 40, 16, 256, 3e-3
SCRIPT = """
import json, os, time
from pathlib import Path
import boto3, torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

s3 = boto3.client("s3")
here = Path("/tmp/run")
here.mkdir()
def get(bucket, prefix, to):
    to.mkdir(exist_ok=True)
    for one in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        s3.download_file(bucket, one["Key"], str(to / one["Key"].rsplit("/", 1)[1]))
get("models", "quickstart/", here / "base")
get("data", "support/train.jsonl", here / "data")
tokenizer = AutoTokenizer.from_pretrained(here / "base")
rows = []
for line in (here / "data" / "train.jsonl").open():
    row = json.loads(line)
    text = lambda messages, more: tokenizer.apply_chat_template(messages, add_generation_prompt=more, tokenize=False)
    prompt = tokenizer(text(row["messages"][:-1], True), add_special_tokens=False)["input_ids"]
    ids = tokenizer(text(row["messages"], False), add_special_tokens=False)["input_ids"][:LENGTH]
    rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]})
def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    pad = lambda name, by: torch.tensor([row[name] + [by] * (longest - len(row[name])) for row in batch])
    ids = pad("input_ids", tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": mask}
class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 1:
            print(json.dumps({"first_step": time.time()}), flush=True)
base = AutoModelForCausalLM.from_pretrained(here / "base", dtype=torch.float32)
model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=32, lora_alpha=32, lora_dropout=0.0))
model.print_trainable_parameters()
arguments = TrainingArguments(output_dir=here / "out", max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE,
    lr_scheduler_type="cosine", warmup_steps=20, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Say()]).train()
model.save_pretrained(here / "adapter")
for file in (here / "adapter").iterdir():
    s3.upload_file(str(file), "adapters", os.environ["TO"] + "/" + file.name)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--rounds", type=int, default=3, help="each side this often, in turn")
    arguments = parser.parse_args()
    with Cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        installing = install(cluster, Path(folder))
        print("── images and chart: building, loading, installing", flush=True)
        team = found_team(next(installing), "bench")
        program = {"metadata": {"name": "script"}, "data": {"train.py": _filled(SCRIPT)}}
        team.apply({"apiVersion": "v1", "kind": "ConfigMap", **program})
        sides: dict[str, Callable[[Team, str], dict[str, float]]] = {"bare": bare, "kubepeft": served}
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(-1, arguments.rounds):  # the first one warms up
            for side, run in sides.items():
                one = run(team, f"{side}-{number + 1}")
                print(side, " ".join(f"{name} {value:.1f}" for name, value in one.items()), flush=True)
                if number >= 0:
                    found[side].append(one)
        _print(found)
        installing.close()


def bare(team: Team, name: str) -> dict[str, float]:
    """Seconds from `kubectl apply` of the Job to its first step, and to its adapter in S3."""
    jobs = team.installation.values["jobs"]
    settings = {
        "AWS_ENDPOINT_URL": jobs["s3"]["endpoint"], "AWS_REGION": "us-east-1", "AWS_CA_BUNDLE": "/ca/ca.crt",
        "TO": f"{team.namespace}/{name}", "OMP_NUM_THREADS": "1", "HF_HOME": "/tmp/hf",
    }  # fmt: skip
    container = {
        "name": "main",
        "image": f"{jobs['image']['repository']}:{jobs['image']['tag']}",
        "command": ["python", "/script/train.py"],
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        "envFrom": [{"secretRef": {"name": S3_SECRET}}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "volumeMounts": [{"name": "script", "mountPath": "/script"}, {"name": "ca", "mountPath": "/ca"}, {"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True},
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [
            {"name": "script", "configMap": {"name": "script"}},
            {"name": "ca", "configMap": {"name": CA_BUNDLE}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"template": {"spec": pod}, "backoffLimit": 0},
    }
    began = time.time()
    team.apply(job)
    team.kubectl("wait", "--for=condition=Complete", f"job/{name}", "--timeout=300s")
    log = team.kubectl("logs", f"job/{name}")
    first = next(json.loads(line)["first_step"] for line in log.splitlines() if line.startswith('{"first_step"'))
    adapter = team.installation.stored(f"s3://adapters/{team.namespace}/{name}")
    team.kubectl("delete", "job", name, "--wait=false")
    return {"first step": first - began, "published": _written(adapter) - began}


def served(team: Team, name: str) -> dict[str, float]:
    """The same of a FineTune, and the seconds from its prepare pod's creation to its end."""
    training = {
        "maxSteps": STEPS, "perDeviceTrainBatchSize": BATCH, "learningRate": RATE, "loggingSteps": 1, "saveSteps": None,
        "saveStrategy": "no", "evalSteps": None, "evalStrategy": "no",
    }  # fmt: skip
    made = fine_tune(name, inference=None, training=training)
    made["spec"]["data"].pop("eval")
    began = time.time()
    team.apply(made)
    status = team.wait_for(name, "Succeeded", poll=0.1)
    [preparing] = team.pods("prepare", name)
    [training_pod] = team.pods("train", name)
    log = team.kubectl("logs", training_pod["metadata"]["name"], "--timestamps")
    first = next(line for line in log.splitlines() if "step 1/" in line).partition(" ")[0]
    [ended] = preparing["status"]["containerStatuses"]
    prepared = _moment(ended["state"]["terminated"]["finishedAt"]) - _moment(preparing["metadata"]["creationTimestamp"])
    adapter = team.installation.stored(status["adapter"]["uri"])
    team.kubectl("delete", "ft", name)
    return {"first step": _moment(first) - began, "published": _written(adapter) - began, "prepare pod": prepared}


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"\nseconds after kubectl apply, {STEPS} steps of {BATCH} examples; median of {len(found['bare'])} (least to most)"
    )
    print(f"{'':12} {'bare Job':>22} {'FineTune':>22} {'prepare pod':>22} {'difference beyond it':>24}")
    for what in ("first step", "published"):
        pairs = list(zip(found["bare"], found["kubepeft"], strict=True))
        beyond = [ours[what] - ours["prepare pod"] - theirs[what] for theirs, ours in pairs]
        columns = [[one[what] for one in found["bare"]], [one[what] for one in found["kubepeft"]]]
        columns += [[one["prepare pod"] for one in found["kubepeft"]], beyond]
        print(f"{what:12}", " ".join(f"{_spread(column):>22}" for column in columns))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _written(folder: Path) -> float:
    """When the last file below a folder of the S3 server was written, in seconds since 1970."""
    return max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())


def _moment(text: str) -> float:
    """Seconds since 1970 of a time as Kubernetes writes it, with nine digits after the point or none."""
    whole, _, rest = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{rest or 0}")


def _filled(script: str) -> str:
    for name, value in {"STEPS": STEPS, "BATCH": BATCH, "LENGTH": LENGTH, "RATE": RATE}.items():
        script = script.replace(name, str(value))
    return script.lstrip()


if __name__ == "__main__":
    main()
