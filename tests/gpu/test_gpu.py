"""What only a GPU can show: half precision, the packed attention kernel, 4-bit and 8-bit bases, and memory that runs out.

CI has no GPU, so `make test` leaves this folder out; `make test-gpu` runs it, and fails where there is none.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, TrainingArguments

from kubepeft.errors import UserError
from kubepeft.stage import PreparedRef
from kubepeft_jobs import base, method, method_table
from kubepeft_jobs.infer import engine
from kubepeft_jobs.infer.requests import Completion, GenerationSettings, Request
from kubepeft_jobs.train import gate
from kubepeft_jobs.train.attention import _varlen, _window_mask, packing_is_exact, use_packed_attention
from kubepeft_jobs.train.batching import PackedCollator, PaddedCollator, Seq2SeqCollator
from kubepeft_jobs.train.trainer import PeftTrainer
from tests.jobs.test_every_peft_method import METHODS, base_for, manifest, unsupported
from tests.jobs.test_train_engine import GPT2, LLAMA, MISTRAL, QWEN2, causal, lora
from tests.stages import (
    Ended,
    Running,
    fine_tune,
    infer_document,
    prepared,
    run,
    train_document,
    write_chats,
    write_lines,
)
from tests.tiny import tiny_causal, tiny_seq2seq

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's and bitsandbytes' own; the tests of the jobs are strict about them
    pytest.mark.timeout(300),
]

GPU = {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2"}
"""For stages, from which tests.stages hides the GPUs."""
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With heads of 64 and matrices that 4-bit blocks divide."""
    folder = tmp_path_factory.mktemp("models")
    made = {kind: tiny_causal(folder / kind, kind, hidden_size=256) for kind in ("qwen2", "llama")}
    return made | {"t5": tiny_seq2seq(folder / "t5", hidden_size=256)}


# the packed attention kernel


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 16)])
def test_varlen_attention_is_sdpa_example_by_example(
    dtype: torch.dtype, heads: int, kv_heads: int, causal: bool, window: int | None
) -> None:
    torch.manual_seed(0)
    lengths = [5, 130, 1, 64]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    total = sum(lengths)
    states = [
        torch.randn(1, n, total, 64, device="cuda", dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]
    exact = [one.detach().float().requires_grad_() for one in states]
    found = _varlen(*states, None, causal, window, boundaries, max(lengths))
    parts = []
    for length, (q, k, v) in zip(lengths, zip(*(one.split(lengths, dim=2) for one in exact), strict=True), strict=True):
        mask = _window_mask(length, window, causal, q.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=heads != kv_heads
            ).transpose(1, 2)
        )
    expected = torch.cat(parts, dim=1)
    weight = torch.randn_like(expected)
    (found.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in [(found, expected), *((a.grad, b.grad) for a, b in zip(states, exact, strict=True))]:
        assert ours is not None
        assert theirs is not None
        apart = (ours.float() - theirs).norm() / theirs.norm()
        assert apart < 1e-2, apart


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("config", [QWEN2, LLAMA, MISTRAL, GPT2], ids=lambda config: config.model_type)
def test_packing_is_exact_on_a_gpu(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = lora(causal(config).to("cuda", dtype))
    exact, why = packing_is_exact(model, config.vocab_size)
    assert exact, why


# whole stages


@pytest.fixture(scope="module")
def chats(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    asked = [{"id": str(n), "messages": [{"role": "user", "content": f"question {n % 7}"}]} for n in range(9)]
    return write_chats(folder / "train.jsonl"), write_lines(folder / "asked.jsonl", asked)


def trained_on_gpu(found: Any, work: Path, env: dict[str, str] | None = None) -> tuple[PreparedRef, Ended]:
    ready = prepared(found, work, GPU)
    ended = run(train_document(found, ready), work, GPU | (env or {}))
    assert ended.code == 0, ended.log
    assert "on cuda" in ended.log
    return ready, ended


CASES: dict[str, dict[str, Any]] = {
    "auto": {"model": {"dtype": "auto"}},
    "float16": {"model": {"dtype": "float16"}},
    "float32": {"model": {"dtype": "float32"}},
    "int8": {"model": {"dtype": "auto", "quantization": "int8"}},
    "nf4": {"model": {"dtype": "auto", "quantization": "nf4"}},
    "nf4, recomputing": {
        "model": {"dtype": "auto", "quantization": "nf4"},
        "training": {"gradientCheckpointing": True},
    },
    "prompt tuning": {
        "model": {"dtype": "auto"},
        "method": {"promptTuning": {"numVirtualTokens": 8}},
        "training": {"learningRate": 0.3},
    },
    "merged": {"model": {"dtype": "auto"}, "output": {"merged": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_causal_model_learns_is_published_and_answers(
    case: str, models: dict[str, Path], chats: tuple[Path, Path], tmp_path: Path
) -> None:
    train, asked = chats
    found = fine_tune(
        models["qwen2"], train, tmp_path / "out", data={"evalFraction": 0.2},
        inference={"input": str(asked), "maxNewTokens": 6}, **CASES[case],
    )  # fmt: skip
    _, ended = trained_on_gpu(found, tmp_path)
    training = ended.result.training
    assert training is not None
    assert training.eval_loss is not None
    assert training.base_eval_loss is not None
    assert training.eval_loss < training.base_eval_loss - 0.1
    if case not in (
        "prompt tuning",
        "int8",
    ):  # int8 takes some columns of a matrix in fp16, and which depends on the whole row
        assert "packed end to end" in ended.log, ended.log
    answered = run(infer_document(found), tmp_path, GPU)
    assert answered.code == 0, answered.log
    summary = json.loads((tmp_path / "out/predictions/test/summary.json").read_text())
    assert (summary["completed"], summary["failed"]) == (9, 0)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


@pytest.mark.parametrize(
    "how", [{"promptTuning": {"numVirtualTokens": 8}}, {"lora": {"r": 8}}], ids=lambda how: next(iter(how))
)
def test_a_seq2seq_model_goes_all_the_way(how: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"translate {n % 5}", "completion": f"{n % 5} übersetzt"} for n in range(24)]
    found = fine_tune(
        models["t5"], write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out",
        model={"dtype": "auto", "task": "SEQ_2_SEQ_LM"}, method=how, training={"learningRate": 0.05},
        inference={"input": str(write_lines(tmp_path / "q.jsonl", [{"prompt": "translate 3"}])), "maxNewTokens": 6},
    )  # fmt: skip
    trained_on_gpu(found, tmp_path)
    answered = run(infer_document(found), tmp_path, GPU)
    assert answered.code == 0, answered.log
    AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "adapter")


def test_a_run_ended_by_sigterm_goes_on_where_it_was(
    models: dict[str, Path], chats: tuple[Path, Path], tmp_path: Path
) -> None:
    steps = {"maxSteps": 200, "saveSteps": 20, "learningRate": 1e-4}
    quiet, broken = (
        fine_tune(models["qwen2"], chats[0], tmp_path / name, model={"dtype": "auto"}, training=steps)
        for name in ("quiet", "broken")
    )
    _, expected = trained_on_gpu(quiet, tmp_path)
    ready = prepared(broken, tmp_path, GPU)
    first = Running(train_document(broken, ready), tmp_path, GPU)
    first.wait_for(lambda: bool(list((tmp_path / "broken").glob("checkpoints/*/*/manifest.json"))))
    first.process.send_signal(signal.SIGTERM)
    assert (stopped := first.end()).code == 143, stopped.log
    ended = run(train_document(broken, ready), tmp_path, GPU)
    assert ended.code == 0, ended.log
    assert (ended.result.resumed_from_step or 0) >= 20
    assert ended.result.training is not None
    assert expected.result.training is not None
    assert ended.result.training.loss == pytest.approx(expected.result.training.loss, rel=2e-2)


# every method, as the train stage runs it: bf16 base, autocast, Trainer, then the parity gate


def few_rows(task: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(256, 320, (length,), generator=generator).tolist() for length in (9, 17, 5, 12)]
    if task == "SEQ_2_SEQ_LM":
        return Dataset.from_list([{"input_ids": row, "labels": row[:4], "length": len(row)} for row in rows])
    return Dataset.from_list(
        [{"input_ids": row, "loss_spans": [len(row) // 2, len(row)], "length": len(row)} for row in rows]
    )


@pytest.mark.parametrize("task", method_table.TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_in_bfloat16_and_passes_the_gate(
    name: str, task: str, models: dict[str, Path], tmp_path: Path
) -> None:
    if (reason := unsupported(name, task)) is not None:
        pytest.skip(reason)
    folder = models[base_for(name, task)]
    outline = method.skeleton(AutoConfig.from_pretrained(folder), task)
    config = method.peft_config(manifest(name), task, outline, tokenizer_dir=folder, total_steps=4)
    torch.manual_seed(0)
    model = method.wrap(base.load(folder, task, torch.bfloat16, device=torch.device("cuda")), config)
    arguments = TrainingArguments(
        str(tmp_path / "run"), bf16=True, max_steps=4, learning_rate=5e-2, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    with torch.autocast("cuda", torch.bfloat16):
        packs = task == "CAUSAL_LM" and packing_is_exact(model, outline.config.vocab_size)[0]
    if packs:
        use_packed_attention(model)
    collator = Seq2SeqCollator(0) if task == "SEQ_2_SEQ_LM" else PackedCollator() if packs else PaddedCollator(0)
    data = few_rows(task)
    trainer = PeftTrainer(
        model, arguments, data_collator=collator, train_dataset=data, callbacks=[*method.callbacks(config)]
    )
    trainer.train()
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    trainer.leave_autocast()
    if packs:
        model.set_attn_implementation("sdpa")
    known = gate.reference(model, gate.examples_of(data, task, getattr(model.config, "decoder_start_token_id", None)))
    model.save_pretrained(str(tmp_path / "adapter"))
    del trainer, model
    try:
        gate.check(
            tmp_path / "adapter", folder, known, task=task, dtype=torch.bfloat16, quantization="none",
            trust_remote_code=False, device=torch.device("cuda"), work=tmp_path, where="the test",
        )  # fmt: skip
    except UserError as error:
        pytest.fail(str(error))


# inference


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = method.wrap(
        base.load(models["qwen2"], "CAUSAL_LM", torch.float32),
        method.peft_config({"lora": {"r": 8}}, "CAUSAL_LM", method.skeleton(AutoConfig.from_pretrained(models["qwen2"]), "CAUSAL_LM")),
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(models["qwen2"]).save_pretrained(folder)
    return folder


def requests(count: int, words: int = 12) -> list[Request]:
    return [Request(str(n), prompt="the quick brown fox " * (1 + n * 7 % words)) for n in range(count)]


def answers(loaded: engine.Engine, asked: list[Request], new: int) -> dict[str, tuple[int, ...]]:
    found = list(loaded.run(asked, GenerationSettings(max_new_tokens=new)))
    assert all(isinstance(one, Completion) for one in found), [one for one in found if not isinstance(one, Completion)]
    return {one.id: one.token_ids for one in found if isinstance(one, Completion)}


def one_at_a_time(folder: Path, asked: list[Request], new: int) -> dict[str, tuple[int, ...]]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for one in asked:
        ids = torch.tensor([tokenizer(one.prompt).input_ids], device="cuda")
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        found[one.id] = tuple(out[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("merge", ["always", "never"])
def test_fp32_answers_are_those_of_one_prompt_at_a_time(adapter: Path, models: dict[str, Path], merge: Any) -> None:
    loaded = engine.load(adapter, models["qwen2"], "CAUSAL_LM", "float32", "cuda", merge)
    asked = requests(24)
    assert answers(loaded, asked, 20) == one_at_a_time(adapter, asked, 20)
    assert loaded.plan is not None
    assert (loaded.plan.continuous, loaded.plan.merged) == (True, merge == "always"), loaded.plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_every_request_by_continuous_batching(
    adapter: Path, models: dict[str, Path], dtype: str
) -> None:
    loaded = engine.load(adapter, models["qwen2"], "CAUSAL_LM", dtype, "cuda")
    assert len(answers(loaded, requests(64), 20)) == 64
    assert loaded.plan is not None
    assert loaded.plan.continuous, loaded.plan.reason


# memory that runs out


def test_memory_that_runs_out_in_inference_halves_the_batch_and_loses_nothing(
    adapter: Path, models: dict[str, Path]
) -> None:
    asked = requests(512, words=40)
    free = engine.load(adapter, models["qwen2"], "CAUSAL_LM", "float32", "cuda", "never")
    expected = answers(free, asked, 48)
    ample = free.micro_batch
    del free
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 256 * 2**20) / total)
    try:
        tight = engine.load(adapter, models["qwen2"], "CAUSAL_LM", "float32", "cuda", "never")
        found = answers(tight, asked, 48)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [one for one in expected if found[one] != expected[one]] == []
    assert tight.micro_batch < ample


def test_memory_that_runs_out_in_training_starts_again_with_a_smaller_micro_batch(
    models: dict[str, Path], tmp_path: Path
) -> None:
    data = write_lines(
        tmp_path / "t.jsonl", ({"prompt": "x y " * 60, "completion": f"z {n} " * 20} for n in range(1024))
    )
    free, tight = (
        fine_tune(
            models["qwen2"], data, tmp_path / name, model={"dtype": "auto"},
            training={"maxSteps": 2, "perDeviceTrainBatchSize": 512}, data={"maxLength": 512},
        )
        for name in ("free", "tight")
    )  # fmt: skip
    ready = prepared(free, tmp_path, GPU)
    shutil.copytree(tmp_path / "free" / "prepared", tmp_path / "tight" / "prepared")
    share = 3 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    allocator = {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{share:.4f}"}
    results = [
        run(train_document(free, ready), tmp_path, GPU),
        run(train_document(tight, ready), tmp_path, GPU | allocator),
    ]
    for ended in results:
        assert ended.code == 0, ended.log
    ample, scarce = (ended.result.training for ended in results)
    assert ample is not None
    assert scarce is not None
    assert ample.out_of_memory_restarts == 0
    assert scarce.out_of_memory_restarts >= 1, results[1].log
    assert scarce.loss == pytest.approx(ample.loss, rel=1e-2)
