"""Every method that PEFT registers, on both tasks: configure, check, wrap, train, save, load, compare, generate, merge.

`UNSUPPORTED` of method_table.py says which can't be used and in whose words; this test holds it to that, both ways: what is listed must be
refused with those words, and everything else must work to the end. docs/peft-methods.md is made from the same record.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerState,
)

from kubepeft.errors import UserError
from kubepeft_jobs import method, method_table
from kubepeft_jobs.base import load as load_base
from tests.tiny import tiny_causal, tiny_seq2seq

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "Position ids are not supported for parameter efficient tuning",
        "Failed to load the CUDA extension",  # BOFT goes on without it
        "Setting boft_n_butterfly_factor to 1",
        "Sparse invariant checks are implicitly disabled",
        "Unsupported layer type",  # LN_TUNING on RMSNorm, which works
        "Detected that the base layer has no bias term",
        "The following rank_pattern keys did not match",  # AdaLoRA writes its ranks under other names than PEFT looks for
    )
]

METHODS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)

TEXTS = ["the quick brown fox", "hello world please"]
SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_r": 2, "init_r": 4, "total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [10, 11, 12, 13], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 50},
    "FROD": {"progressbar": False},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 8},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {
        "token_indices": list(range(256, 320))
    },  # every merged token of tiny_tokenizer, so some of TEXTS
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 50},
}
"""What a method needs on a hidden size of 32, beside its defaults. Methods that are not here have none but their defaults."""

AUTO = {
    "CAUSAL_LM": (AutoModelForCausalLM, AutoPeftModelForCausalLM),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, AutoPeftModelForSeq2SeqLM),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices of 32 by 32 wait for a second thread longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {kind: tiny_causal(folder / kind, kind) for kind in ("qwen2", "llama")}
    return made | {"t5": tiny_seq2seq(folder / "t5")}


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With matrices of 64 by 64: nf4 packs blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("quantizable")
    return {kind: tiny_causal(folder / kind, kind, hidden_size=64) for kind in ("qwen2", "llama")}


def base_for(name: str, task: str) -> str:
    """PEFT knows ADAPTION_PROMPT for Llama, Mistral and GPT-2 only."""
    if task == "SEQ_2_SEQ_LM":
        return "t5"
    return "llama" if name == "ADAPTION_PROMPT" else "qwen2"


def manifest(name: str) -> dict[str, Any]:
    if name == "PROMPT_TUNING":
        return {"promptTuning": {"numVirtualTokens": 4}}
    return {"lora": {}} if name == "LORA" else {"peft": {"type": name, "config": SMALL.get(name, {})}}


def unsupported(name: str, task: str) -> str | None:
    if name == "ADAMSS" and importlib.util.find_spec("sklearn"):
        return None
    return method_table.UNSUPPORTED.get((name, task))


def batch(folder: Path, task: str) -> dict[str, torch.Tensor]:
    rows = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    found = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    if task == "SEQ_2_SEQ_LM":
        found["decoder_input_ids"] = torch.tensor([[0, 40, 41, 42], [0, 50, 51, 52]])
    return found


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the rows' own positions, whatever virtual tokens stand before them. Shape: (2, positions, 320)."""
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found[:, -inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] :]


def train_two_steps(model: torch.nn.Module, inputs: dict[str, torch.Tensor], callbacks: list[Any]) -> list[float]:
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    labels[labels == 0] = -100
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    model.train()
    for step in range(1, 3):
        shown = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        loss = model(**shown, labels=labels).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in trained if parameter.grad is not None)
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        optimizer.step()
        for callback in callbacks:
            callback.on_optimizer_step(None, TrainerState(global_step=step), None, model=model)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("task", method_table.TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_to_the_end_or_is_refused_with_the_recorded_reason(
    name: str, task: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = bases[base_for(name, task)]
    outline = method.skeleton(AutoConfig.from_pretrained(folder), task)
    refusal = unsupported(name, task)
    if refusal is not None:
        with pytest.raises(UserError) as raised:
            method.check_targets(method.peft_config(manifest(name), task, outline), outline)
        assert refusal in raised.value.what
        return
    config = method.peft_config(manifest(name), task, outline, tokenizer_dir=folder)
    method.check_targets(config, outline)

    auto, auto_peft = AUTO[task]
    inputs = batch(folder, task)
    torch.manual_seed(0)
    base = auto.from_pretrained(folder)
    of_the_base = logits(base, inputs)
    model = method.wrap(base, config)
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    losses = train_two_steps(model, inputs, method.callbacks(config))
    assert all(torch.tensor(losses).isfinite())
    assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)

    trained = logits(model, inputs)
    assert trained.isfinite().all()
    assert (trained - of_the_base).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = auto_peft.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), trained, rtol=0, atol=1e-5)

    prompts = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    generated = loaded.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] >= 3

    if method.why_not_mergeable(config) is None:
        torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), trained, rtol=0, atol=1e-3)
    elif name != "BEFT":  # which can be merged on some models
        with pytest.raises((AttributeError, NotImplementedError)):
            loaded.merge_and_unload()


def test_the_record_names_only_methods_that_peft_has() -> None:
    named = {name for name, _ in method_table.UNSUPPORTED} | set(method_table.NOTES) | set(method.NOT_MERGEABLE)
    named |= set(method.FIELDS_NEEDED) | set(SMALL)
    assert named <= set(METHODS)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", sorted(method.ON_QUANTIZED_BASES))
def test_a_method_learns_on_a_quantized_base_from_where_the_base_is(
    name: str, quantization: str, quantizable: dict[str, Path], tmp_path: Path
) -> None:
    folder = quantizable[base_for(name, "CAUSAL_LM")]
    inputs = batch(folder, "CAUSAL_LM")

    def fresh() -> PreTrainedModel:
        # Once it has computed without gradients on a CPU, bitsandbytes keeps nf4 in a form that it can't train on.
        return load_base(folder, "CAUSAL_LM", torch.float32, quantization=quantization)

    plain = logits(fresh(), inputs)
    outline = method.skeleton(AutoConfig.from_pretrained(folder), "CAUSAL_LM")
    config = method.peft_config(manifest(name), "CAUSAL_LM", outline, tokenizer_dir=folder)
    method.check_targets(config, outline, quantization=quantization)
    if (
        not config.is_prompt_learning
    ):  # the others begin where the base is; with packed codes for weights they would not
        torch.testing.assert_close(logits(method.wrap(fresh(), config), inputs), plain, rtol=0, atol=0.1)
    torch.manual_seed(0)
    wrapped = method.wrap(fresh(), config)
    train_two_steps(wrapped, inputs, method.callbacks(config))
    trained = logits(wrapped, inputs)
    assert (trained - plain).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh(), tmp_path), inputs), trained, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - method.ON_QUANTIZED_BASES - set(method.METHODS_REFUSED) - {"ADAMSS"})
)
def test_other_methods_are_refused_on_a_quantized_base(name: str, bases: dict[str, Path]) -> None:
    outline = method.skeleton(AutoConfig.from_pretrained(bases["qwen2"]), "CAUSAL_LM")
    config = method.peft_config(manifest(name), "CAUSAL_LM", outline)
    with pytest.raises(UserError, match="can't adapt a quantized base"):
        method.check_targets(config, outline, quantization="nf4")
