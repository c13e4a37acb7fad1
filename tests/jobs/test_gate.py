"""The parity gate: what must not pass does not, and what must passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

from kubepeft.errors import UserError
from kubepeft_jobs.base import load
from kubepeft_jobs.train import gate
from kubepeft_jobs.train.batching import PaddedCollator
from kubepeft_jobs.train.trainer import PeftTrainer
from tests.tiny import tiny_causal

INPUTS = [{"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20, dtype=torch.int64)}]


def adapted(base: Path, scale: float = 0.5) -> PeftModel:
    """A base with a LoRA whose matrices are not zero."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory, qwen2: Path) -> Path:
    """The same architecture with other weights."""
    folder = shutil.copytree(qwen2, tmp_path_factory.mktemp("models") / "other")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def check(adapter: Path, base_dir: Path, known: gate.Reference, work: Path) -> None:
    gate.check(
        adapter, base_dir, known, task="CAUSAL_LM", dtype=torch.float32, quantization="none", trust_remote_code=False,
        device="cpu", work=work, where="s3://bucket/adapter",
    )  # fmt: skip


@pytest.fixture
def published(qwen2: Path, tmp_path: Path) -> tuple[Path, gate.Reference]:
    """An adapter folder as uploaded, and what its model answers."""
    model = adapted(qwen2)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder, gate.reference(model, INPUTS)


def test_an_adapter_that_answers_as_trained_passes(
    published: tuple[Path, gate.Reference], qwen2: Path, tmp_path: Path
) -> None:
    check(published[0], qwen2, published[1], tmp_path)


def flip_a_byte(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    body = bytearray(file.read_bytes())
    body[-3] ^= 0x40  # in the exponent of the last weight
    file.write_bytes(body)


def forget_the_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)


def scale_it_otherwise(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": settings["lora_alpha"] + 1}))


def lose_the_file(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def cut_the_file(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "fault",
    [flip_a_byte, forget_the_weights, scale_it_otherwise, lose_the_file, cut_the_file],
    ids=lambda one: one.__name__,
)
def test_a_changed_adapter_does_not_pass(
    fault: Callable[[Path], None],
    published: tuple[Path, gate.Reference],
    qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fault(published[0])
    with pytest.raises(UserError) as caught:
        check(published[0], qwen2, published[1], tmp_path)
    assert caught.value.reason == "ParityFailed"
    assert "s3://bucket/adapter" in str(caught.value)


def test_an_adapter_on_another_base_does_not_pass(
    published: tuple[Path, gate.Reference], other_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="differ from the trained model's"):
        check(published[0], other_base, published[1], tmp_path)


def test_an_adapter_that_is_not_applied_does_not_pass(published: tuple[Path, gate.Reference]) -> None:
    known = published[1]
    with pytest.raises(UserError) as caught:
        gate.compare(known.bare, known, 1e9, "there")
    assert caught.value.reason == "ParityFailed"


def test_a_small_change_is_still_told_from_none(qwen2: Path, tmp_path: Path) -> None:
    """Even an adapter that moved the logits less than the tolerance must not be mistaken for the bare base."""
    model = adapted(qwen2, scale=1e-6)
    known = gate.reference(model, INPUTS)
    assert 0 < gate.difference(known.trained, known.bare) < gate.TOLERANCE[torch.float32]
    model.save_pretrained(tmp_path / "adapter")
    check(tmp_path / "adapter", qwen2, known, tmp_path)
    with pytest.raises(UserError):
        gate.compare(known.bare, known, gate.TOLERANCE[torch.float32], "there")


def test_an_adapter_that_learned_nothing_is_refused_with_what_to_do(qwen2: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(qwen2), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    known = gate.reference(model, INPUTS)
    with pytest.raises(UserError, match="learningRate") as caught:
        gate.compare(known.trained, known, 1e-4, "there")
    assert caught.value.reason == "AdapterChangesNothing"


def test_logits_that_are_no_numbers_do_not_pass(published: tuple[Path, gate.Reference]) -> None:
    known = published[1]
    with pytest.raises(UserError):
        gate.compare([value * float("nan") for value in known.trained], known, 1e9, "there")


def test_a_tiny_model_of_another_kind_passes_too(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "llama", kind="llama")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    check(tmp_path / "adapter", base, gate.reference(model, INPUTS), tmp_path)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' about its casts
def test_what_a_gpu_trains_in_bfloat16_passes_to_the_last_bit(quantization: str, tmp_path: Path) -> None:
    """Trainer's autocast and the fp32 norms of quantized bases are of the training; what is loaded must be compared like for like."""
    folder = tiny_causal(tmp_path / "base", hidden_size=64)
    model = load(folder, "CAUSAL_LM", torch.bfloat16, quantization=quantization)
    if quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path / "run"), bf16=True, use_cpu=True, max_steps=4, learning_rate=5e-3, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": list(range(n, n + 9)), "loss_spans": [4, 9], "length": 9} for n in range(5, 15)]
    trainer = PeftTrainer(peft_model, arguments, data_collator=PaddedCollator(0), train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.leave_autocast()
    known = gate.reference(peft_model, INPUTS)
    peft_model.save_pretrained(tmp_path / "adapter")
    apart: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "compare", lambda loaded, known, *_: apart.append(gate.difference(loaded, known.trained)))
        gate.check(
            tmp_path / "adapter", folder, known, task="CAUSAL_LM", dtype=torch.bfloat16, quantization=quantization,
            trust_remote_code=False, device="cpu", work=tmp_path, where="there",
        )  # fmt: skip
    assert gate.difference(known.trained, known.bare) > 0.01
    assert apart == [0.0]
