"""Speed and memory of prepare against `datasets`: the same rows, tokenizer, template, loss spans and truncation on both sides.

    python bench/prepare.py --rows 1000000        # about ten minutes on two cores
    python bench/prepare.py --rows 50000 --rounds 3

Makes a chat data set and a byte-level BPE of 8,000 tokens, then runs both sides as processes of their own, in turn:
kubepeft's `prepare`, and `load_dataset("json").map(batched=True, num_proc=2)` with the batched `apply_chat_template` and the fast
tokenizer. Prints rows/s (whole process, start to end), the peak of the process tree's memory, their ratio, and whether the outputs
are equal row by row. CPU seconds are those of the whole process tree: on a busy machine they say more than the clock. Memory is the sum of PSS (each shared page counted once), sampled every 0.2 s; RSS is printed beside it. The side of `datasets` has torch
loaded (transformers does that, and datasets cannot do without once it is there), which is about 400 MiB of its memory.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
WORKERS = 2
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "ter",
    "ran",
    "ing",
    "so",
    "pel",
    "du",
    "ver",
    "tion",
    "al",
    "qui",
    "bo",
    "ned",
    "ix",
    "gra",
    "fe",
    "shu",
    "wor",
    "ld",
    "er",
    "un",
    "pro",
]


def make_rows(path: Path, count: int) -> None:
    """Conversations of log-normal length (median about 95 tokens) over 9,000 words of Zipf frequency."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices(SYLLABLES, k=draw.choice([1, 2, 2, 3]))) for _ in range(9000)})
    draw.shuffle(words)
    total, cumulative = 0.0, []
    for rank in range(len(words)):
        total += 1 / (rank + 3)
        cumulative.append(total)

    def text(length: int) -> str:
        return " ".join(draw.choices(words, cum_weights=cumulative, k=length)).capitalize() + "."

    with path.open("w") as file:
        for _ in range(count):
            length = max(3, int(draw.lognormvariate(3.2, 0.7)))
            messages = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": text(length)},
                {"role": "assistant", "content": text(int(length * 1.5) + 2)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_tokenizer(folder: Path, rows: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    with rows.open() as file:
        texts = [
            message["content"]
            for _, line in zip(range(20_000), file, strict=False)
            for message in json.loads(line)["messages"]
        ]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8000,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


class LocalFile:
    def __init__(self, path: Path) -> None:
        self.path, self.name, self.size = path, path.name, path.stat().st_size

    def open(self) -> Any:
        return self.path.open("rb")


def kubepeft_side(rows: Path, tokenizer: Path, out: Path) -> None:
    from kubepeft_jobs.prepare.pipeline import Options, prepare, workers

    files = [LocalFile(rows)]
    with workers(files, WORKERS) as pool:
        prepare(files, None, Options(max_length=MAX_LENGTH), tokenizer, 8000, out, pool)


def datasets_side(rows: Path, tokenizer_dir: Path, out: Path) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(out / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chats = batch["messages"]
        whole = tokenizer.apply_chat_template(chats, tokenize=False)
        prompts = tokenizer.apply_chat_template(
            [chat[:-1] for chat in chats], tokenize=False, add_generation_prompt=True
        )
        encoded = tokenizer(
            whole, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH, return_attention_mask=False
        )
        ids, spans = [], []
        for index, (row, prompt) in enumerate(zip(encoded["input_ids"], prompts, strict=True)):
            assert whole[index].startswith(prompt)
            start = encoded.char_to_token(index, len(prompt))
            if start is not None:  # otherwise nothing is left to learn from within MAX_LENGTH
                ids.append(row)
                spans.append([start, len(row)])
        return {"input_ids": ids, "loss_spans": spans, "length": [len(row) for row in ids]}

    data = load_dataset("json", data_files=str(rows), split="train")
    data = data.map(encode, batched=True, num_proc=WORKERS, remove_columns=["messages"])
    (out / "files.json").write_text(json.dumps([file["filename"] for file in data.cache_files]))


def tree_memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) in MiB of a process and all below it."""
    import psutil

    pss = rss = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            info = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while being looked at
        pss += info.pss
        rss += info.rss
    return pss >> 20, rss >> 20


def measure(side: str, rows: Path, tokenizer: Path, out: Path) -> tuple[float, float, int, int]:
    """Seconds by the clock, CPU seconds, peak PSS and peak RSS of one side."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--paths", str(rows), str(tokenizer), str(out)],
        stderr=subprocess.DEVNULL if side == "datasets" else None,
    )
    peak_pss = peak_rss = 0
    while process.poll() is None:
        pss, rss = tree_memory(process.pid)
        peak_pss, peak_rss = max(peak_pss, pss), max(peak_rss, rss)
        time.sleep(0.2)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{side} failed with exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak_pss, peak_rss


def compare(ours: Path, theirs: Path) -> str:
    from datasets import Dataset, concatenate_datasets

    left = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(ours.glob("train-*.arrow"))])
    files = json.loads((theirs / "files.json").read_text())
    right = concatenate_datasets([Dataset.from_file(path) for path in files])
    if len(left) != len(right):
        return f"DIFFERENT: {len(left)} and {len(right)} rows"
    step = max(1, len(left) // 5000)
    for index in range(0, len(left), step):
        if left[index] != right[index]:
            return f"DIFFERENT in row {index}"
    return f"equal ({len(left)} rows, every {step}th looked at)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=["kubepeft", "datasets"], help="measure one side (no comparison)")
    parser.add_argument("--folder", type=Path, help="keep the data set and outputs here")
    parser.add_argument("--side", choices=["kubepeft", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--paths", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        (kubepeft_side if arguments.side == "kubepeft" else datasets_side)(*arguments.paths)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    rows, tokenizer = folder / f"{arguments.rows}.jsonl", folder / "tokenizer"
    if not rows.exists():
        make_rows(rows, arguments.rows)
    if not tokenizer.exists():
        make_tokenizer(tokenizer, rows)
    sides = [arguments.only] if arguments.only else ["kubepeft", "datasets"]
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    costs: dict[str, list[float]] = {side: [] for side in sides}
    print(
        f"{arguments.rows} rows, {rows.stat().st_size >> 20} MiB, {WORKERS} workers, {os.cpu_count()} cores", flush=True
    )
    for number in range(arguments.rounds):
        for side in sides:
            seconds, cpu, pss, rss = measure(side, rows, tokenizer, folder / side)
            speeds[side].append(arguments.rows / seconds)
            costs[side].append(cpu)
            print(
                f"round {number + 1}  {side:9} {seconds:7.1f} s  CPU {cpu:7.1f} s  {arguments.rows / seconds:8.0f} rows/s  "
                f"peak PSS {pss:5} MiB  RSS {rss:5} MiB",
                flush=True,
            )
        if not arguments.only:
            print(compare(folder / "kubepeft", folder / "datasets"), flush=True)
    if not arguments.only:
        ratios = sorted(ours / theirs for ours, theirs in zip(speeds["kubepeft"], speeds["datasets"], strict=True))
        print(
            f"kubepeft / datasets, rows/s: median {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        print(f"datasets / kubepeft, CPU: {sum(costs['datasets']) / sum(costs['kubepeft']):.2f}x")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
