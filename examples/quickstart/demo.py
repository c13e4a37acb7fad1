"""make demo: fine-tune the small model of this folder with kubepeft, and see what the adapter changed.

The first half is what a user does: `kubepeft run finetune.yaml`. The second half uses nothing of kubepeft: it loads the
published adapter with plain PEFT and answers the held-out prompts without and with it.
"""

from __future__ import annotations

import json
import logging as stdlib_logging
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "out"
SHOWN = 5
BATCH = 20


def main() -> int:
    began = time.monotonic()
    print("── kubepeft run examples/quickstart/finetune.yaml", flush=True)
    kubepeft = Path(sys.executable).parent / "kubepeft"
    interrupt = signal.signal(
        signal.SIGINT, lambda *_: None
    )  # Ctrl-C is for kubepeft, which saves and says how to go on
    code = subprocess.run([kubepeft, "run", HERE / "finetune.yaml"], check=False).returncode
    signal.signal(signal.SIGINT, interrupt)
    if code != 0:
        return code
    print("\n── the held-out prompts, without and with the adapter (plain transformers and PEFT)", flush=True)
    questions = [json.loads(line) for line in (HERE / "data/questions.jsonl").read_text().splitlines()]
    expected = {
        row["id"]: row["answer"] for row in map(json.loads, (HERE / "data/answers.jsonl").read_text().splitlines())
    }
    base = answers(questions)
    predicted = {}
    for part in sorted((OUT / "predictions").glob("*/part-*.jsonl")):
        predicted |= {row["id"]: row["text"] for row in map(json.loads, part.read_text().splitlines())}
    for question in questions[:SHOWN]:
        wanted = question["id"]
        print(f"\n  prompt    {question['messages'][-1]['content']}")
        print(f"  base      {shorten(base[wanted])}")
        print(f"  adapter   {shorten(predicted[wanted])}")
        print(f"  expected  {expected[wanted]}")
    before = sum(base[wanted].strip() == answer for wanted, answer in expected.items()) / len(expected)
    after = sum(predicted[wanted].strip() == answer for wanted, answer in expected.items()) / len(expected)
    print(f"\n  exact match on {len(expected)} held-out prompts:  base {before:.2f}  →  adapter {after:.2f}")
    print("\n── the adapter")
    files = sorted((OUT / "adapter").iterdir())
    for file in files:
        print(f"  {file.stat().st_size:>10,}  {file.relative_to(HERE)}")
    weights = sum(file.stat().st_size for file in (HERE / "base").glob("*.safetensors"))
    adapter = (OUT / "adapter/adapter_model.safetensors").stat().st_size
    print(f"  base weights {weights / 1e6:.1f} MB, adapter weights {adapter / 1e6:.2f} MB ({adapter / weights:.1%})")
    print(f"\n  report: {OUT / 'report.html'}")
    print(f"  took {time.monotonic() - began:.0f} s; to see it train again: rm -r {OUT}")
    return 0 if after > 0.9 > 0.1 > before else 1


def answers(questions: list[dict]) -> dict[str, str]:
    """What the bare base answers: the published adapter loaded by plain PEFT, and switched off."""
    stdlib_logging.getLogger("bitsandbytes").setLevel(stdlib_logging.ERROR)  # of kernels it would have liked to fetch
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of PEFT and transformers about each other
    model = AutoPeftModelForCausalLM.from_pretrained(OUT / "adapter", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(OUT / "adapter", padding_side="left")
    found = {}
    with model.disable_adapter(), torch.no_grad():
        for start in range(0, len(questions), BATCH):
            part = questions[start : start + BATCH]
            inputs = tokenizer.apply_chat_template(
                [question["messages"] for question in part],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found |= {question["id"]: text for question, text in zip(part, texts, strict=True)}
    return found


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "…"


if __name__ == "__main__":
    sys.exit(main())
