"""Training speed against the plain recipe and TRL, with equal work and equal evaluation loss.

    python bench/train.py                     # all contenders, three rounds, about 12 minutes on 2 cores
    python bench/train.py --rounds 1 --only recipe,kubepeft-bf16 --results .build/bench-train.jsonl
    python bench/train.py --device cuda       # on a GPU, with the shape of Qwen2.5-0.5B and 16 examples a step
    python bench/train.py --llamafactory .build/llamafactory/bin/python   # with LLaMA-Factory, which needs a venv of its own:
        # uv venv .build/llamafactory && uv pip install --python .build/llamafactory/bin/python llamafactory==0.9.5 torch==2.15.0

Every contender trains LoRA r=8 on q,k,v,o of one 27-million-parameter Qwen2 (made here, fixed seed) on the same examples
(lengths log-normal: median 90, mean about 124, at most 1,024 tokens; loss on the second half of each), for the same
epochs, with the same optimizer and learning rate, at 4 examples a step. TRL's and LLaMA-Factory's packing cannot say
examples a step: they have rows of 1,024 tokens, so they take about half the steps, and their loss is shown as it is. Each run is a process of its own,
contenders alternate within a round, and each round begins with the next contender.

"useful tok/s" is the tokens that are not padding over the seconds from the first step to the last (Trainer's set-up of
about a second is left out for all); with `--clock cpu`, over its CPU seconds on one thread, which is the figure to take
on a machine that is busy with other work. The evaluation loss is measured afterwards by one function for all: the
adapter on the fp32 base, one example at a time, mean over the tokens with loss.
A contender in bf16 runs only where the CPU multiplies it in hardware; elsewhere it is emulated, ten times slower than
fp32, and says nothing. Nothing here is imported by the product.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENDERS = {
    "recipe": "Trainer, fp32, batch 4, random order, padded to the longest",
    "recipe-grouped-bf16": "Trainer, bf16 autocast, grouped by length",
    "trl-packing-fp32": "TRL SFTTrainer, packing (bfd), fp32",
    "trl-packing-bf16": "TRL SFTTrainer, packing (bfd), bf16 autocast",
    "trl-padding-free-fp32": "TRL SFTTrainer, padding_free, fp32",
    "trl-padding-free-bf16": "TRL SFTTrainer, padding_free, bf16 autocast",
    "trl-padding-free-bf16-base": "TRL SFTTrainer, padding_free, base in bf16",
    "llamafactory-bf16": "LLaMA-Factory, neat_packing, bf16 autocast",
    "kubepeft-fp32": "kubepeft, packed, fp32",
    "kubepeft-bf16": "kubepeft, packed, frozen base in bf16, adapter in fp32",
}
MAX_LENGTH, EPOCHS, LEARNING_RATE, EVAL_EXAMPLES = 1_024, 1, 2e-3, 24


@dataclass(frozen=True)
class Scale:
    """What the device is given to do: a step on a GPU must be large enough to be more than the launch of its kernels."""

    vocabulary: int
    hidden_size: int
    layers: int
    intermediate_size: int
    heads: int
    kv_heads: int
    batch: int
    examples: int


SCALES = {
    "cpu": Scale(18_432, 512, 6, 1_408, 8, 4, batch=4, examples=96),
    "cuda": Scale(151_936, 896, 24, 4_864, 14, 2, batch=16, examples=768),
}
DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
SCALE = SCALES[DEVICE]
VOCABULARY, BATCH, TRAIN_EXAMPLES = SCALE.vocabulary, SCALE.batch, SCALE.examples


def measurable(device: str, llamafactory: Path | None) -> list[str]:
    """The contenders that are here and that this CPU computes in hardware; on a GPU the recipe and all in bf16."""
    from kubepeft_jobs.base import cpu_computes_bf16

    names = [name for name in CONTENDERS if llamafactory or not name.startswith("llamafactory")]
    if device == "cuda":
        return [name for name in names if name == "recipe" or "bf16" in name]
    return [name for name in names if "bf16" not in name or cpu_computes_bf16()]


def make_examples(count: int, seed: int) -> list[dict[str, Any]]:
    """Token sequences in which each token is one of two fixed successors of the last, out of 32 tokens in use."""
    import numpy as np

    table = np.random.default_rng(0).integers(0, 32, (32, 2))
    names = np.random.default_rng(1).choice(np.arange(10, VOCABULARY), 32, replace=False)
    generator = np.random.default_rng(seed)
    sigma = math.sqrt(2 * math.log(124 / 90))
    examples = []
    for _ in range(count):
        length = int(np.clip(generator.lognormal(math.log(90), sigma), 4, MAX_LENGTH))
        states = [int(generator.integers(32))]
        for _ in range(length - 1):
            states.append(int(table[states[-1], generator.integers(2)]))
        examples.append({"input_ids": names[states].tolist(), "loss_spans": [length // 2, length], "length": length})
    return examples


def make_base(dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=SCALE.hidden_size, num_hidden_layers=SCALE.layers,
        intermediate_size=SCALE.intermediate_size, num_attention_heads=SCALE.heads, num_key_value_heads=SCALE.kv_heads,
        tie_word_embeddings=True, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(
            3
        )  # lets a frozen random head be sure of a token, so that loss can fall
    return model.to(dtype)


def lora_config() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def settings(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine", "warmup_steps": 5, "logging_steps": 10,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": DEVICE == "cpu", "seed": 0,
        "dataloader_pin_memory": DEVICE == "cuda",
    } | more  # fmt: skip


def make_trainer(contender: str, folder: str) -> Any:
    """The contender's trainer, ready for `.train()`; only the adapter's weights and the data order come from the seed."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    examples = make_examples(TRAIN_EXAMPLES, seed=2)
    base_in_bf16 = contender in ("kubepeft-bf16", "trl-padding-free-bf16-base")
    base = make_base(torch.bfloat16 if base_in_bf16 else torch.float32)
    torch.manual_seed(1)

    if contender.startswith("trl"):
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        packing = "packing" in contender
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_word_level(), pad_token=_word(0), eos_token=_word(2))
        config = SFTConfig(
            **settings(folder, per_device_train_batch_size=1 if packing else BATCH),
            bf16=contender.endswith("bf16"), activation_checkpointing=False, completion_only_loss=True,
            packing=packing, padding_free=not packing, max_length=MAX_LENGTH if packing else None,
        )  # fmt: skip
        rows = [
            {
                "input_ids": e["input_ids"],
                "completion_mask": [int(i >= e["loss_spans"][0]) for i in range(e["length"])],
            }
            for e in examples
        ]
        return SFTTrainer(
            model=base, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=lora_config(),
        )  # fmt: skip

    from kubepeft_jobs.train.attention import packing_is_exact, use_packed_attention
    from kubepeft_jobs.train.batching import PackedCollator, PaddedCollator
    from kubepeft_jobs.train.linear import onednn_is_faster, use_onednn
    from kubepeft_jobs.train.trainer import PeftTrainer

    model = get_peft_model(base, lora_config())
    data = Dataset.from_list(examples)
    if contender.startswith("kubepeft"):
        # As the train stage has it: on a GPU autocast, which the adapter's fp32 weights then compute under too.
        half = {"bf16": DEVICE == "cuda" and contender.endswith("bf16")}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half["bf16"]):
            exact, why = packing_is_exact(model, VOCABULARY)
        assert exact, why
        use_packed_attention(model)
        if onednn_is_faster():
            use_onednn(model)
        arguments = TrainingArguments(**settings(folder, **half))
        return PeftTrainer(model, arguments, data_collator=PackedCollator(), train_dataset=data)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = PaddedCollator(0)(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    grouped = {"bf16": True, "train_sampling_strategy": "group_by_length"} if "grouped" in contender else {}
    arguments = TrainingArguments(**settings(folder, remove_unused_columns=False, **grouped))
    return Trainer(model, arguments, data_collator=collate, train_dataset=data)


def _word(token: int) -> str:
    """Of one width, for special tokens are found within words too."""
    return f"t{token:06}"


def _word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({_word(i): i for i in range(VOCABULARY)}, unk_token=_word(3)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def eval_loss(adapter: dict[str, Any]) -> float:
    """Mean cross entropy in nats over the evaluation tokens with loss: the adapter on the fp32 base, example by example."""
    import torch
    from peft import get_peft_model, set_peft_model_state_dict

    model = get_peft_model(make_base(torch.float32), lora_config())
    missing = set_peft_model_state_dict(model, {name: value.float() for name, value in adapter.items()})
    assert not missing.unexpected_keys
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in make_examples(EVAL_EXAMPLES, seed=3):
            ids = torch.tensor([example["input_ids"]], device=DEVICE)
            start, end = example["loss_spans"]
            logits = model(input_ids=ids).logits[0, start - 1 : end - 1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:end], reduction="sum"))
            count += end - start
    return total / count


def run_contender(contender: str, clock: str) -> dict[str, Any]:
    import torch
    from peft import get_peft_model_state_dict
    from transformers import TrainerCallback

    if clock == "cpu":
        torch.set_num_threads(1)
    now = time.process_time if clock == "cpu" else time.perf_counter
    times: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times["begin"] = now()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
                times["memory"] = torch.cuda.max_memory_allocated() / 2**20
            times["end"] = now()

    untrained = None
    with tempfile.TemporaryDirectory() as folder:
        if contender.startswith("llamafactory"):
            model, steps = run_llamafactory(Path(folder), Clock)
        else:
            trainer = make_trainer(contender, folder)
            trainer.add_callback(Clock)
            same_start(trainer.model)
            untrained = eval_loss(get_peft_model_state_dict(trainer.model)) if contender == "recipe" else None
            trainer.train()
            model, steps = trainer.model, trainer.state.global_step
    seconds = times["end"] - times["begin"]
    tokens = EPOCHS * sum(example["length"] for example in make_examples(TRAIN_EXAMPLES, seed=2))
    return {
        "contender": contender,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "steps": steps,
        "eval_loss": eval_loss(get_peft_model_state_dict(model)),
        "eval_loss_before": untrained,
        "memory": times.get("memory"),
    }


def run_llamafactory(folder: Path, clock: type) -> tuple[Any, int]:
    """Trains by LLaMA-Factory's own entry point, from files, as it wants them; the model and how many steps it took."""
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    make_base(torch.float32).save_pretrained(folder / "base")
    special = {"pad_token": _word(0), "bos_token": _word(1), "eos_token": _word(2)}
    PreTrainedTokenizerFast(tokenizer_object=_word_level(), **special).save_pretrained(folder / "base")
    rows = []
    for one in make_examples(TRAIN_EXAMPLES, seed=2):
        parts = one["input_ids"][: one["loss_spans"][0]], one["input_ids"][one["loss_spans"][0] :]
        prompt, completion = (" ".join(map(_word, part)) for part in parts)
        rows.append({"instruction": prompt, "input": "", "output": completion})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    found: dict[str, Any] = {}

    class Start(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            same_start(model)

        def on_train_end(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
            found.update(model=model, steps=state.global_step)

    arguments = settings(
        str(folder / "out"), model_name_or_path=str(folder / "base"), stage="sft", do_train=True, template="empty",
        dataset="rows", dataset_dir=str(folder), cutoff_len=MAX_LENGTH, neat_packing=True, bf16=True,
        finetuning_type="lora", lora_rank=8, lora_alpha=16, lora_dropout=0.0,
        lora_target="q_proj,k_proj,v_proj,o_proj", disable_gradient_checkpointing=True, preprocessing_num_workers=1,
        per_device_train_batch_size=1, report_to="none",
    )  # fmt: skip
    run_exp(arguments, callbacks=[Start(), clock()])
    return found["model"], found["steps"]


def same_start(model: Any) -> None:
    """The same first adapter for every contender, whatever random numbers its set-up has drawn."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator).to(weight) / math.sqrt(weight.shape[1]))


def table(results: list[dict[str, Any]]) -> str:
    """One line a contender: median speed, the median and range of its ratio to the recipe of the same round, and loss."""
    rounds: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        rounds[result["round"]][result["contender"]] = result
    on_gpu = any(result.get("memory") for result in results)
    lines = ["| contender | useful tok/s | x recipe (range) | steps | eval loss |", "|---|---|---|---|---|"]
    if on_gpu:
        lines = [line + more for line, more in zip(lines, (" peak GPU MiB |", "---|"), strict=True)]
    for name in sorted({r["contender"] for r in results}, key=list(CONTENDERS).index):
        runs = [r for r in results if r["contender"] == name]
        ratios = [
            one[name]["tokens_per_second"] / one["recipe"]["tokens_per_second"]
            for one in rounds.values()
            if name in one and "recipe" in one
        ]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"
        speed = statistics.median(r["tokens_per_second"] for r in runs)
        loss = statistics.median(r["eval_loss"] for r in runs)
        memory = f" {max(r['memory'] for r in runs):,.0f} |" if on_gpu else ""
        lines.append(f"| {CONTENDERS[name]} | {speed:,.0f} | {ratio} | {runs[0]['steps']} | {loss:.3f} |{memory}")
    before = [result["eval_loss_before"] for result in results if result["eval_loss_before"] is not None]
    lines += [
        "",
        f"{len(rounds)} round(s)" + (f"; eval loss before training {before[0]:.3f}" if before else ""),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="contenders, separated by commas; all that the CPU computes where not given")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, CPU seconds")
    parser.add_argument("--llamafactory", type=Path, help="the Python of a venv that has LLaMA-Factory")
    parser.add_argument("--device", choices=SCALES, default=DEVICE)
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to; the table is of all that is in it")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run_contender(options.worker, options.clock)))
        return

    results: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        results = [json.loads(line) for line in options.results.read_text().splitlines()]
    names = options.only.split(",") if options.only else measurable(options.device, options.llamafactory)
    if left_out := [name for name in CONTENDERS if name not in names]:
        print(f"left out: {', '.join(left_out)}", flush=True)
    first = 1 + max((result["round"] for result in results), default=-1)
    for number in range(first, first + options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            python = options.llamafactory if name.startswith("llamafactory") else sys.executable
            command = [python, __file__, "--worker", name, "--clock", options.clock]
            env = {**os.environ, "BENCH_DEVICE": options.device}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
            result = json.loads(done.stdout.splitlines()[-1]) | {"round": number}
            print(f"round {number}  {name:28} {result['tokens_per_second']:7,.0f} tok/s  eval {result['eval_loss']:.3f}", flush=True)  # fmt: skip
            results.append(result)
            if options.results:
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
