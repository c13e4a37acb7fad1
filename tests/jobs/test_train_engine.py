"""The training engine on tiny random models: packed batches, losses, accumulation, workers, resuming, oneDNN."""

import copy
import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kubepeft_jobs.train import attention
from kubepeft_jobs.train import trainer as trainer_module
from kubepeft_jobs.train.attention import packed_forward_kwargs, packing_is_exact, use_packed_attention
from kubepeft_jobs.train.batching import (
    IGNORE_INDEX,
    PackedCollator,
    PaddedCollator,
    Seq2SeqCollator,
    target_labels,
)
from kubepeft_jobs.train.linear import stop_using_onednn, use_onednn
from kubepeft_jobs.train.trainer import PeftTrainer, keeps_own_loss, sum_of_cross_entropy

VOCAB = 97
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QWEN2 = Qwen2Config(**SIZES, **HEADS, **TOKENS)
LLAMA = LlamaConfig(**SIZES, **HEADS, **TOKENS)
MISTRAL = MistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=4)
GPT2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, **TOKENS)
T5 = T5Config(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip


def causal(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A model whose logits depend strongly on attention and position: weights ten times the usual size."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "norm" not in name:
            nn.init.normal_(weight, std=0.2)
    return model


def lora(model: PreTrainedModel, *, dropout: float = 0.0, targets: object = "all-linear") -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return peft_model


def rows(count: int, *, seed: int = 0) -> Dataset:
    """Examples of 3 to 40 tokens with loss on a span in the middle or at the end."""
    generator = np.random.default_rng(seed)
    data: dict[str, list] = {"input_ids": [], "loss_spans": [], "length": []}
    for _ in range(count):
        length = int(generator.integers(3, 40))
        start = int(generator.integers(0, length))
        end = int(generator.integers(start + 1, length + 1))
        data["input_ids"].append(generator.integers(3, VOCAB, length).astype(np.int32).tolist())
        data["loss_spans"].append([start, end])
        data["length"].append(length)
    return Dataset.from_dict(data)


def pairs(count: int) -> Dataset:
    generator = np.random.default_rng(0)
    data: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for _ in range(count):
        data["input_ids"].append(generator.integers(3, VOCAB, int(generator.integers(2, 20))).tolist())
        data["labels"].append(generator.integers(3, VOCAB, int(generator.integers(1, 9))).tolist())
        data["length"].append(len(data["input_ids"][-1]))
    return Dataset.from_dict(data)


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "dataloader_pin_memory": False, "logging_nan_inf_filter": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(folder: Path, model: nn.Module, collator: object, data: Dataset, **changes: object) -> PeftTrainer:
    trainer = PeftTrainer(model, arguments(folder, **changes), data_collator=collator, train_dataset=data)
    trainer.train()
    return trainer


class PlainCollator:
    """What a plain Trainer gets: padded inputs and labels, nothing of ours."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = PaddedCollator(0)(examples)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


# collators


def test_labels_are_the_tokens_of_the_loss_spans_and_never_the_first_token() -> None:
    labels = target_labels({"input_ids": [5, 6, 7, 8, 9], "loss_spans": [0, 2, 4, 5]})
    assert labels.tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX, 9]


def test_a_packed_row_has_no_padding_and_restarts_positions_and_crosses_no_boundary() -> None:
    batch = PackedCollator()(
        [{"input_ids": [5, 6, 7], "loss_spans": [0, 3]}, {"input_ids": [8, 9], "loss_spans": [0, 2]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["shift_labels"].tolist() == [[6, 7, IGNORE_INDEX, 9, IGNORE_INDEX]]
    assert batch["logits_to_keep"].tolist() == [0, 1, 3]
    assert (batch["max_length_q"], batch["num_tokens"]) == (3, 5)


def test_padding_counts_no_padding_as_tokens() -> None:
    batch = PaddedCollator(0)([{"input_ids": [5, 6, 7], "loss_spans": [2, 3]}, {"input_ids": [0], "loss_spans": []}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["num_tokens"] == 4


# packing


@pytest.mark.parametrize("config", [QWEN2, LLAMA, MISTRAL, GPT2], ids=lambda config: config.model_type)
def test_packed_logits_and_gradients_are_those_of_the_examples_alone(config: PreTrainedConfig) -> None:
    model = lora(causal(config)).eval()
    examples = list(rows(5))
    expected = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in examples]
    torch.stack([logits.square().sum() for logits in expected]).sum().backward()
    expected_grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()

    assert use_packed_attention(model)
    batch = PackedCollator()(examples)
    for name in ("labels", "shift_labels", "logits_to_keep", "num_tokens"):
        del batch[name]
    packed = model(**batch, **packed_forward_kwargs(batch), use_cache=False).logits[0]
    packed.square().sum().backward()

    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-3, atol=1e-4)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, expected_grads[name], rtol=2e-3, atol=1e-2, msg=name)


@pytest.mark.parametrize("config", [QWEN2, LLAMA, MISTRAL, GPT2], ids=lambda config: config.model_type)
def test_the_probe_finds_packing_exact_and_leaves_the_model_as_it_was(config: PreTrainedConfig) -> None:
    model = lora(causal(config), dropout=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    random_state = torch.get_rng_state()

    exact, why = packing_is_exact(model, VOCAB)

    assert exact, why
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_probe_finds_packing_exact_in_bfloat16_and_for_ia3() -> None:
    exact, why = packing_is_exact(lora(causal(QWEN2).bfloat16()), VOCAB)
    assert exact, why
    exact, why = packing_is_exact(get_peft_model(causal(QWEN2), IA3Config(task_type="CAUSAL_LM")), VOCAB)
    assert exact, why


def test_the_probe_sees_attention_that_crosses_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def crossing(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):  # type: ignore[no-untyped-def]
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal)

    registered = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(registered, attention.PACKED_ATTENTION, crossing)
    exact, why = packing_is_exact(lora(causal(QWEN2)), VOCAB)
    assert not exact
    assert "neighbours" in why


def test_the_probe_sees_positions_that_do_not_restart() -> None:
    model = lora(causal(QWEN2))
    forward = model.base_model.model.model.forward

    def without_positions(*args, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        return forward(*args, **kwargs)

    model.base_model.model.model.forward = without_positions
    # rotary positions only matter by their distance, so the neighbours' tokens stay and the logits too
    assert packing_is_exact(model, VOCAB)[0]
    gpt2 = lora(causal(GPT2))
    forward = gpt2.base_model.model.transformer.forward
    gpt2.base_model.model.transformer.forward = without_positions
    exact, why = packing_is_exact(gpt2, VOCAB)
    assert not exact
    assert "off by" in why


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, **TOKENS),
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **TOKENS),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_cannot_keep_examples_apart_are_refused_with_the_reason(config: PreTrainedConfig) -> None:
    exact, why = packing_is_exact(causal(config), VOCAB)
    assert not exact
    assert why


def test_prompt_tuning_and_encoder_decoders_are_not_packed() -> None:
    prompt_tuned = get_peft_model(causal(QWEN2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    exact, why = packing_is_exact(prompt_tuned, VOCAB)
    assert (exact, "virtual tokens" in why) == (False, True)
    assert not packing_is_exact(AutoModelForSeq2SeqLM.from_config(T5), VOCAB)[0]


def test_a_model_switched_to_packed_attention_still_takes_padded_batches_and_generates() -> None:
    model = causal(MISTRAL).eval()
    batch = PlainCollator()(list(rows(4)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10]])
    logits, generated = model(**inputs).logits, model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert use_packed_attention(model)
    torch.testing.assert_close(model(**inputs).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), generated)


# the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_chunked_cross_entropy_is_torchs(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer_module._LOGITS_PER_CHUNK, "cpu", 3 * VOCAB)
    torch.manual_seed(0)
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    targets = torch.randint(VOCAB, (2, 5))
    targets[0, 1] = IGNORE_INDEX
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    (expected_grad,) = torch.autograd.grad(expected * 0.5, logits)
    total = sum_of_cross_entropy(logits, targets, smoothing)
    (grad,) = torch.autograd.grad(total * 0.5, logits)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("config", [QWEN2, MISTRAL], ids=lambda config: config.model_type)
def test_packed_padded_and_plain_trainer_give_one_loss_curve(config: PreTrainedConfig, tmp_path: Path) -> None:
    data = rows(18)
    packed_model = lora(causal(config))
    assert use_packed_attention(packed_model)
    packed = train(tmp_path, packed_model, PackedCollator(), data)
    padded = train(tmp_path, lora(causal(config)), PaddedCollator(0), data)
    plain = Trainer(
        lora(causal(config)), arguments(tmp_path, remove_unused_columns=False),
        data_collator=PlainCollator(), train_dataset=data,
    )  # fmt: skip
    plain.train()
    assert len(losses(plain)) == 10
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-3)
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-3)
    assert losses(plain)[-1] < losses(plain)[0]
    assert packed.tokens_seen == padded.tokens_seen == 2 * sum(data["length"])


def test_label_smoothing_is_trainers(tmp_path: Path) -> None:
    data = rows(8)
    ours = train(tmp_path, lora(causal(QWEN2)), PaddedCollator(0), data, label_smoothing_factor=0.1)
    plain = Trainer(
        lora(causal(QWEN2)), arguments(tmp_path, remove_unused_columns=False, label_smoothing_factor=0.1),
        data_collator=PlainCollator(), train_dataset=data,
    )  # fmt: skip
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.parametrize("task", ["packed", "seq2seq"])
def test_accumulated_micro_batches_give_the_loss_of_one_batch(task: str, tmp_path: Path) -> None:
    def run(batch_size: int, accumulation: int) -> PeftTrainer:
        if task == "packed":
            model, collator, data = lora(causal(QWEN2)), PackedCollator(), rows(16)
            assert use_packed_attention(model)
        else:
            torch.manual_seed(0)
            model = get_peft_model(
                AutoModelForSeq2SeqLM.from_config(T5),
                LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q"]),
            )
            collator, data = Seq2SeqCollator(0), pairs(16)
        return train(
            tmp_path, model, collator, data,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip

    whole, parts = run(8, 1), run(2, 4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for name, weight in trainable(parts.model).items():
        torch.testing.assert_close(weight, trainable(whole.model)[name], rtol=1e-3, atol=1e-5)


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        model = lora(causal(QWEN2))
        assert use_packed_attention(model)
        runs.append(train(tmp_path, model, PackedCollator(), rows(8), activation_checkpointing=checkpointing))
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_a_model_trained_under_autocast_answers_afterwards_as_one_that_is_loaded(tmp_path: Path) -> None:
    """Trainer leaves the forward under autocast, and the parity gate would compare rounding."""
    trainer = train(tmp_path, lora(causal(QWEN2)), PaddedCollator(0), rows(8), bf16=True, max_steps=2)
    loaded = lora(causal(QWEN2))
    loaded.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = loaded.eval()(ids).logits
        assert not torch.equal(trainer.model.eval()(ids).logits, expected)
        trainer.leave_autocast()
        assert torch.equal(trainer.model.eval()(ids).logits, expected)


def test_a_batch_without_any_loss_trains_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "loss_spans": [[]] * 4, "length": [3] * 4})
    model = lora(causal(QWEN2))
    assert use_packed_attention(model)
    before = trainable(model)
    trainer = train(tmp_path, model, PackedCollator(), data, num_train_epochs=1, weight_decay=0.0)
    assert losses(trainer) == [0.0]
    for name, weight in trainable(model).items():
        assert torch.equal(weight, before[name])


def test_a_mixture_of_experts_keeps_its_balancing_loss(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, **HEADS, **TOKENS, num_local_experts=4, output_router_logits=True)
    assert keeps_own_loss(causal(config))
    data = rows(8)
    ours = train(tmp_path, lora(causal(config), targets=["q_proj"]), PaddedCollator(0), data)
    plain = Trainer(
        lora(causal(config), targets=["q_proj"]), arguments(tmp_path, remove_unused_columns=False),
        data_collator=PlainCollator(), train_dataset=data,
    )  # fmt: skip
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch(batch_size: int, tmp_path: Path) -> None:
    data = rows(8)
    model = lora(causal(QWEN2)).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            labels = torch.from_numpy(target_labels(row))
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            count += int((labels != IGNORE_INDEX).sum())
    assert use_packed_attention(model)
    for collator in (PackedCollator(), PaddedCollator(0)):
        trainer = PeftTrainer(
            model, arguments(tmp_path, per_device_eval_batch_size=batch_size), data_collator=collator,
            eval_dataset=data,
        )  # fmt: skip
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_prompt_tuning_trains_and_evaluates_with_the_same_loss_as_plain_trainer(tmp_path: Path) -> None:
    data = rows(8)

    def model() -> nn.Module:
        torch.manual_seed(1)
        return get_peft_model(causal(QWEN2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    ours = train(tmp_path, model(), PaddedCollator(0), data)
    plain = Trainer(
        model(),
        arguments(tmp_path, remove_unused_columns=False),
        data_collator=PlainCollator(),
        train_dataset=data,
    )
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-3)


# resuming and workers


def test_an_interrupted_run_resumes_to_the_last_digit(tmp_path: Path) -> None:
    def trainer() -> PeftTrainer:
        model = lora(causal(QWEN2), dropout=0.2)
        assert use_packed_attention(model)
        settings = arguments(tmp_path, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
        return PeftTrainer(model, settings, data_collator=PackedCollator(), train_dataset=rows(40))

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(resumed) == losses(whole)
    for name, weight in trainable(resumed.model).items():
        assert torch.equal(weight, trainable(whole.model)[name]), name


def _train_as(world: int, folder: Path) -> tuple[list[float], list[float]]:
    """Training and evaluation losses of one of `world` workers that share batches of four examples."""
    model = lora(causal(QWEN2))
    assert use_packed_attention(model)
    settings = arguments(
        folder,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        eval_strategy="epoch",
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = PeftTrainer(
        model, settings, data_collator=PackedCollator(), train_dataset=rows(16), eval_dataset=rows(7, seed=1)
    )
    trainer.train()
    return losses(trainer), [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def _worker(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    outcome = _train_as(world, folder)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()


def test_two_workers_over_gloo_give_the_losses_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    one, one_eval = _train_as(1, tmp_path / "alone")
    for worker in workers:
        worker.join(timeout=600)
        assert worker.exitcode == 0
    two, two_eval = json.loads((tmp_path / "losses.json").read_text())
    assert len(one) == 8
    assert two == pytest.approx(one, rel=1e-3)
    assert two_eval == pytest.approx(one_eval, rel=1e-3)


# oneDNN


def test_onednn_linears_give_the_same_outputs_and_input_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40)
    x = torch.randn(2, 7, 24, requires_grad=True)
    layer.requires_grad_(False)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert use_onednn(layer) == 1
    output = layer(x)
    (grad,) = torch.autograd.grad(output.square().sum(), x)
    assert "FrozenLinear" in type(output.grad_fn).__name__
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_onednn_leaves_state_merging_and_trained_layers_alone() -> None:
    model = lora(causal(QWEN2)).eval()
    inputs = torch.tensor([[5, 6, 7, 8]])
    expected, names = model(inputs).logits, set(model.state_dict())
    assert use_onednn(model) == 15  # 7 in each of 2 layers, and the LM head
    assert use_onednn(model) == 0
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(inputs).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    stop_using_onednn(model)
    assert not any("forward" in vars(module) for module in model.modules() if type(module) is nn.Linear)
    assert use_onednn(nn.Linear(4, 4)) == 0  # trained
    assert use_onednn(nn.Linear(4, 4).bfloat16().requires_grad_(False)) == 0


def test_onednn_steps_aside_when_a_layer_is_cast_trained_or_autocast() -> None:
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    assert use_onednn(layer) == 1
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_training_through_onednn_gives_the_same_losses(tmp_path: Path) -> None:
    data = rows(8)
    plain = train(tmp_path, lora(causal(QWEN2)), PaddedCollator(0), data)
    model = lora(causal(QWEN2))
    use_onednn(model)
    assert losses(train(tmp_path, model, PaddedCollator(0), data)) == pytest.approx(losses(plain), rel=1e-3)
