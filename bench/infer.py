"""Batch inference, tokens a second: one prompt at a time, static batches, and kubepeft's engine in fp32 and bf16.

    .venv/bin/python bench/infer.py                     # everything; about 4 minutes a round on two cores
    .venv/bin/python bench/infer.py --rounds 1 --prompts 32
    .venv/bin/python bench/infer.py --device cuda --prompts 512 --loop-prompts 32   # a GPU, the layers of Qwen2.5-0.5B

A Qwen2 of 27M parameters is made here from a fixed seed and trained for a moment on made-up text (word pairs with
chances of 2 to 90 %), because a random model is undecided between its tokens nearly everywhere and would tell nothing
about bf16. Its LoRA adapter (r=8 on q, k, v, o) has random weights large enough to change most answers.

All contenders answer the same prompts, greedy, with the same number of new tokens. Each runs in a process of its own,
rounds interleave them, and every figure is a ratio to the first contender in the same round. Loading is not timed;
what the engine spends on choosing its way is. `--clock cpu` counts processor time on one thread instead of wall time on
all: the one to use while other work runs on the machine. bf16 is left out where the CPU only emulates it. With
`--loop-prompts N` the loop answers the first N prompts only (their order is random), and only those are compared.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORDS = 512
VOCABULARY = 8192
CONTENDERS = {
    "loop": "one prompt at a time, AutoPeftModel, fp32",
    "static": "batches of 16, random order, unmerged, fp32",
    "engine-fp32": "kubepeft, fp32",
    "engine-bf16": "kubepeft, bf16",
}


def successors(seed: int) -> list[tuple[list[int], list[float]]]:
    """For each word the words that may follow it and their chances."""
    draw = random.Random(seed)
    table = []
    for _ in range(WORDS):
        weights = sorted((draw.gammavariate(0.7, 1.0) for _ in range(4)), reverse=True)
        table.append(([draw.randrange(WORDS) for _ in weights], [w / sum(weights) for w in weights]))
    return table


def text(draw: random.Random, table: list[tuple[list[int], list[float]]], words: int) -> list[int]:
    found = [draw.randrange(WORDS)]
    while len(found) < words:
        following, chances = table[found[-1]]
        found.append(draw.choices(following, chances)[0])
    return found


def make_prompts(count: int) -> list[str]:
    """Log-normal lengths: median 55 tokens, mean 70, at most 512."""
    draw, table = random.Random(1), successors(0)
    lengths = [min(512, max(4, round(math.exp(draw.gauss(4.0, 0.7))))) for _ in range(count)]
    return [" ".join(f"w{word}" for word in text(draw, table, n)) for n in lengths]


SHAPES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "cuda": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
}


def make_model(folder: Path, steps: int, device: str) -> None:
    """Base model and adapter in folder/base and folder/adapter, the tokenizer beside both."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from kubepeft_jobs.base import cpu_computes_bf16

    names = [f"w{i}" for i in range(VOCABULARY - 2)] + ["<pad>", "<unk>"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        **SHAPES[device],
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=VOCABULARY - 2,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    print(f"training a Qwen2 of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {steps} steps")
    draw, table = random.Random(2), successors(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if device == "cpu" else 3e-4)
    for _ in range(steps):
        ids = torch.tensor([text(draw, table, 64) for _ in range(8 if device == "cpu" else 64)], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or cpu_computes_bf16()):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.2f}")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def answer(
    contender: str, folder: Path, prompts: list[str], new_tokens: int, clock: Callable[[], float], device: str
) -> dict[str, object]:
    """Token ids of each prompt's answer, and the seconds they took."""
    if contender.startswith("engine"):
        return answer_by_engine(contender.removeprefix("engine-"), folder, prompts, new_tokens, clock, device)
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter", padding_side="left")
    size = 1 if contender == "loop" else 16
    order = list(range(len(prompts)))
    if contender == "static":
        random.Random(3).shuffle(order)
    ids: dict[int, list[int]] = {}

    def run(part: list[int]) -> None:
        inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True).to(device)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        ids.update(zip(part, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True))

    with torch.inference_mode():
        run(order[:size])
        started = clock()
        for at in range(0, len(order), size):
            run(order[at : at + size])
        seconds = clock() - started
    return {"seconds": seconds, "ids": [ids[i] for i in range(len(prompts))]}


def answer_by_engine(
    short: str, folder: Path, prompts: list[str], new_tokens: int, clock: Callable[[], float], device: str
) -> dict[str, object]:
    from kubepeft_jobs.infer.engine import load
    from kubepeft_jobs.infer.requests import Completion, GenerationSettings, Request

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[short]
    engine = load(folder / "adapter", folder / "base", "CAUSAL_LM", dtype, device)
    requests = [Request(str(i), prompt=prompt) for i, prompt in enumerate(prompts)]
    started = clock()
    results = list(engine.run(requests, GenerationSettings(max_new_tokens=new_tokens)))
    seconds = clock() - started
    ids = {int(result.id): list(result.token_ids) for result in results if isinstance(result, Completion)}
    return {
        "seconds": seconds,
        "ids": [ids[i] for i in range(len(prompts))],
        "plan": str(engine.plan),
        "micro_batch": engine.micro_batch,
    }


def margins(folder: Path, prompts: list[str], expected: list[list[int]], found: list[list[int]]) -> list[float]:
    """For each answer that differs, how far the fp32 model's logits of the two tokens lie apart where it first does."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    apart = []
    for prompt, one, other in zip(prompts, expected, found, strict=False):
        step = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if step is not None:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids + one[:step]])).logits[0, -1]
            apart.append(float(logits[one[step]] - logits[other[step]]))
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("bench/.infer"), help="where the model is kept between runs")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training-steps", type=int, default=150)
    parser.add_argument("--wrap", default="", help="command put before each contender's, e.g. 'taskset -c 0,1'")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--loop-prompts", type=int, help="how many of the prompts the loop answers; all")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prompts = make_prompts(args.prompts)
    if args.only:
        if args.clock == "cpu":
            import torch

            torch.set_num_threads(1)
        prompts = prompts[: args.loop_prompts] if args.only == "loop" else prompts
        found = answer(args.only, args.dir, prompts, args.new_tokens, CLOCKS[args.clock], args.device)
        args.answers.write_text(json.dumps(found))
        return
    if not (args.dir / "adapter" / "adapter_model.safetensors").exists():
        make_model(args.dir, args.training_steps, args.device)

    from kubepeft_jobs.base import cpu_computes_bf16

    bf16 = args.device == "cuda" or cpu_computes_bf16()
    contenders = [name for name in CONTENDERS if name != "engine-bf16" or bf16]
    if len(contenders) < len(CONTENDERS):
        print("left out: engine-bf16 (this CPU has no bf16 arithmetic)", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, dict] = {}
    for turn in range(args.rounds):
        for name in contenders:
            answers = args.dir / f"{name}.json"
            again = [sys.executable, __file__, "--dir", str(args.dir), "--prompts", str(args.prompts)]
            again += ["--new-tokens", str(args.new_tokens), "--clock", args.clock, "--only", name]
            again += ["--answers", str(answers), "--device", args.device]
            again += ["--loop-prompts", str(args.loop_prompts)] if args.loop_prompts else []
            subprocess.run([*shlex.split(args.wrap), *again], check=True, stderr=subprocess.DEVNULL)
            last[name] = json.loads(answers.read_text())
            rates[name].append(len(last[name]["ids"]) * args.new_tokens / last[name]["seconds"])
            print(f"round {turn + 1}  {name:12} {rates[name][-1]:7.0f} tok/s", flush=True)

    print(
        f"\n{args.prompts} prompts, {args.new_tokens} new tokens each, greedy; medians, and the least and most of each"
    )
    print(f"{'':46}{'tok/s':>8}{'ratio':>8}{'spread':>14}{'answers that differ':>22}{'ids':>7}")
    for name in contenders:
        title = CONTENDERS[name]
        ratios = [mine / first for mine, first in zip(rates[name], rates["loop"], strict=True)]
        pairs = list(zip(last["loop"]["ids"], last[name]["ids"], strict=False))  # the loop may have answered fewer
        answers = sum(a != b for a, b in pairs)
        ids = sum(x != y for a, b in pairs for x, y in zip(a, b, strict=True))
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        middle = statistics.median(rates[name])
        print(f"{title:46}{middle:8.0f}{statistics.median(ratios):8.2f}{spread:>14}{answers:>22}{ids:>7}")
    for name in contenders:
        if "plan" in last[name]:
            print(f"\n{name}: micro-batch {last[name]['micro_batch']}, {last[name]['plan']}")
        apart = sorted(margins(args.dir, prompts, last["loop"]["ids"], last[name]["ids"]))
        if apart:
            print(
                f"{name}: fp32 logit margin at the first difference: median {statistics.median(apart):.4f},"
                f" largest {apart[-1]:.4f}"
            )


if __name__ == "__main__":
    main()
