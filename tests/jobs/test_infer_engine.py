"""Batch inference on tiny random models: input lines, equality with one prompt at a time, sampling, limits, memory."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kubepeft.errors import UserError
from kubepeft_jobs import memory
from kubepeft_jobs.infer.decode import SlotSearch
from kubepeft_jobs.infer.engine import Engine, agrees, load
from kubepeft_jobs.infer.requests import (
    BadLine,
    Completion,
    Failure,
    GenerationSettings,
    Message,
    OpenAIEnvelope,
    Overrides,
    Request,
    bad_line_row,
    completion_row,
    failure_row,
    read_requests,
)
from tests.tiny import EOS, tiny_causal, tiny_seq2seq, tiny_tokenizer

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

PROMPTS = [
    "the",
    "What is the capital of France?",
    "the quick brown fox jumps over the lazy dog " * 3,
    "hello world",
    "please answer the question",
    "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    "a",
    "Paris is the capital of France, the capital is Paris.",
    "user system assistant",
    "lazy dog, quick fox; lazy fox, quick dog",
    "x y z " * 30,
    "thank you",
]
REQUESTS = [Request(str(i), prompt=prompt) for i, prompt in enumerate(PROMPTS)]
GREEDY = GenerationSettings(max_new_tokens=20)

METHODS = {
    "lora": lambda task: LoraConfig(r=4, target_modules="all-linear", task_type=task),
    "ia3": lambda task: IA3Config(task_type=task),
    "prompt-tuning": lambda task: PromptTuningConfig(num_virtual_tokens=5, task_type=task),
    "prefix-tuning": lambda task: PrefixTuningConfig(num_virtual_tokens=5, task_type=task),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, and many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_adapter(folder: Path, kind: str, method: str, hidden_size: int = 32) -> tuple[Path, Path, str]:
    """(adapter, base, task): an adapter whose random weights change the answers, its tokenizer beside it."""
    seq2seq = kind in ("t5", "bart")
    base = (tiny_seq2seq if seq2seq else tiny_causal)(folder / "base", kind, hidden_size=hidden_size)
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = METHODS[method](task)
        if kind == "gpt2" and method == "lora":
            config.fan_in_fan_out = True
        adapted = get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "prompt_encoder" in name:
                torch.nn.init.normal_(weight, std=0.3)
            if "ia3" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    adapted.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "adapter")
    return folder / "adapter", base, task


def one_at_a_time(adapter: Path, task: str, prompts: list[str], **how: object) -> list[list[int]]:
    """New token ids of each prompt by AutoPeftModel and `generate` alone, up to and with the end token."""
    auto = AutoPeftModelForCausalLM if task == "CAUSAL_LM" else AutoPeftModelForSeq2SeqLM
    return generated(auto.from_pretrained(adapter).eval(), adapter, task, prompts, **how)


def bare_base(base: Path, task: str, prompts: list[str]) -> list[list[int]]:
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSeq2SeqLM
    return generated(auto.from_pretrained(base).eval(), base, task, prompts)


def generated(model: Any, folder: Path, task: str, prompts: list[str], **how: object) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, **how
            )
        found.append(output[0, ids.shape[1] if task == "CAUSAL_LM" else 1 :].tolist())
    return found


def answers(engine: Engine, requests: list[Request], settings: GenerationSettings = GREEDY) -> dict[str, Completion]:
    results = list(engine.run(requests, settings))
    assert sorted(result.id for result in results) == sorted(request.id for request in requests)
    assert all(isinstance(result, Completion) for result in results), results
    return {result.id: result for result in results if isinstance(result, Completion)}


def ids_of(found: dict[str, Completion]) -> list[list[int]]:
    return [list(found[request.id].token_ids) for request in REQUESTS]


@pytest.fixture(scope="session")
def qwen_lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    return make_adapter(tmp_path_factory.mktemp("qwen-lora"), "qwen2", "lora")


@pytest.fixture(scope="session")
def qwen_engine(qwen_lora: tuple[Path, Path, str]) -> Engine:
    """Shared by tests that only ask it for answers."""
    adapter, base, _ = qwen_lora
    return load(adapter, base, "CAUSAL_LM", "float32", "cpu")


@pytest.mark.parametrize(
    ("kind", "method", "merge", "merged", "continuous"),
    [
        ("qwen2", "lora", "always", True, True),
        ("qwen2", "lora", "never", False, True),
        ("llama", "lora", "always", True, True),
        ("mistral", "lora", "never", False, True),
        ("gpt2", "lora", "always", True, True),
        ("gpt2", "lora", "never", False, True),
        ("llama", "ia3", "always", True, True),
        ("qwen2", "prompt-tuning", "auto", False, True),
        ("gpt2", "prompt-tuning", "auto", False, True),
        ("llama", "prefix-tuning", "auto", False, False),
        ("t5", "lora", "always", True, False),
        ("t5", "lora", "never", False, False),
        ("t5", "prompt-tuning", "auto", False, False),
        ("bart", "lora", "always", True, False),
    ],
)
def test_greedy_answers_in_batches_are_those_of_one_prompt_at_a_time(
    tmp_path: Path, kind: str, method: str, merge: str, merged: bool, continuous: bool
) -> None:
    adapter, base, task = make_adapter(tmp_path, kind, method)
    engine = load(adapter, base, task, "float32", "cpu", merge)
    found = ids_of(answers(engine, REQUESTS))
    assert found == one_at_a_time(adapter, task, PROMPTS)
    assert engine.plan is not None
    assert (engine.plan.merged, engine.plan.continuous) == (merged, continuous), engine.plan.reason
    assert found != bare_base(base, task, PROMPTS), "the adapter made no difference, so this test shows nothing"


def test_an_answer_does_not_depend_on_the_requests_beside_it(qwen_engine: Engine) -> None:
    together = answers(qwen_engine, REQUESTS)
    for request in REQUESTS:
        assert answers(qwen_engine, [request])[request.id] == together[request.id]


def test_bfloat16_answers_every_request_with_the_merged_adapter(qwen_lora: tuple[Path, Path, str]) -> None:
    adapter, base, _ = qwen_lora
    engine = load(adapter, base, "CAUSAL_LM", "bfloat16", "cpu", "always")
    assert len(answers(engine, REQUESTS)) == len(REQUESTS)


def test_repetition_rules_see_each_rows_own_tokens_and_no_padding(
    qwen_lora: tuple[Path, Path, str], qwen_engine: Engine
) -> None:
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    found = answers(qwen_engine, REQUESTS, replace(GREEDY, **rules))
    assert ids_of(found) == one_at_a_time(qwen_lora[0], "CAUSAL_LM", PROMPTS, **rules)
    assert ids_of(found) != ids_of(answers(qwen_engine, REQUESTS))


def test_beam_search_answers_as_one_at_a_time(qwen_lora: tuple[Path, Path, str], qwen_engine: Engine) -> None:
    found = answers(qwen_engine, REQUESTS[:5], replace(GREEDY, num_beams=3, length_penalty=0.5))
    expected = one_at_a_time(qwen_lora[0], "CAUSAL_LM", PROMPTS[:5], num_beams=3, length_penalty=0.5)
    assert [list(found[str(i)].token_ids) for i in range(5)] == expected


def test_an_end_token_ends_the_answer_and_is_counted_but_not_shown(
    qwen_lora: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """Whatever token the model says third is made its end token."""
    adapter, base, _ = qwen_lora
    third = one_at_a_time(adapter, "CAUSAL_LM", PROMPTS[1:2])[0][2]
    ended, tokenizer = tmp_path / "adapter", AutoTokenizer.from_pretrained(adapter)
    ended.mkdir()
    for file in adapter.iterdir():
        (ended / file.name).write_bytes(file.read_bytes())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    tokenizer.save_pretrained(ended)
    engine = load(ended, base, "CAUSAL_LM", "float32", "cpu", "never")
    found = answers(engine, REQUESTS)["1"]
    first = found.token_ids.index(third) + 1
    assert (found.finish_reason, found.completion_tokens) == ("stop", first)
    assert first <= 3
    whole = answers(engine, REQUESTS)
    assert {c.finish_reason for c in whole.values()} <= {"stop", "length"}
    assert all(
        (c.finish_reason == "length") == (c.completion_tokens == 20 and c.token_ids[-1] not in (third, EOS))
        for c in whole.values()
    )


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_a_stop_string_ends_the_answer_and_is_cut_from_it(tmp_path: Path, kind: str) -> None:
    adapter, base, task = make_adapter(tmp_path, kind, "lora")
    engine = load(adapter, base, task, "float32", "cpu", "never")
    free = answers(engine, REQUESTS)
    long = max(free.values(), key=lambda c: len(c.text))
    stop = long.text[5:8]
    at = long.text.index(stop)
    stopped = answers(engine, REQUESTS, replace(GREEDY, stop=(stop, "never said")))
    assert stopped[long.id].text == long.text[:at]
    assert stopped[long.id].finish_reason == "stop"
    assert stopped[long.id].completion_tokens < long.completion_tokens
    assert stopped[long.id].token_ids == long.token_ids[: stopped[long.id].completion_tokens]
    for id_, completion in free.items():
        if stop not in completion.text:
            assert stopped[id_] == completion


def test_a_stop_string_that_is_a_special_token_is_met(qwen_engine: Engine) -> None:
    found = answers(qwen_engine, REQUESTS, replace(GREEDY, max_new_tokens=200))
    special = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    said = [c for c in found.values() if special in c.token_ids]
    assert said, "no answer holds the token; the tiny model changed"
    stopped = answers(qwen_engine, REQUESTS, replace(GREEDY, max_new_tokens=200, stop=("<|im_end|>",)))
    for completion in said:
        assert stopped[completion.id].token_ids == completion.token_ids[: completion.token_ids.index(special) + 1]
        assert stopped[completion.id].finish_reason == "stop"


def test_messages_go_through_the_chat_template(qwen_engine: Engine) -> None:
    message = Request("chat", messages=(Message("user", "hello"),))
    written = Request("text", prompt="<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    found = answers(qwen_engine, [message, written])
    assert found["chat"].token_ids == found["text"].token_ids
    assert found["chat"].prompt_tokens == found["text"].prompt_tokens


def test_messages_without_a_chat_template_fail_and_prompts_go_on(tmp_path: Path) -> None:
    adapter, base, _ = make_adapter(tmp_path, "gpt2", "lora")
    tiny_tokenizer(chat_template=False).save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()
    engine = load(adapter, base, "CAUSAL_LM", "float32", "cpu", "never")
    found = {r.id: r for r in engine.run([Request("a", messages=(Message("user", "hi"),)), REQUESTS[0]], GREEDY)}
    assert isinstance(found["a"], Failure)
    assert "chat template" in found["a"].reason
    assert isinstance(found["0"], Completion)


@pytest.mark.parametrize("method", ["lora", "prompt-tuning"])
def test_a_prompt_longer_than_the_context_fails_alone(tmp_path: Path, method: str) -> None:
    adapter, base, _ = make_adapter(tmp_path, "gpt2", method)
    engine = load(adapter, base, "CAUSAL_LM", "float32", "cpu")
    virtual = 5 if method == "prompt-tuning" else 0
    word = "x"
    assert len(engine.tokenizer(word * 100).input_ids) == 100
    requests = [
        Request("too long", prompt=word * (512 - virtual)),
        Request("just fits", prompt=word * (511 - virtual)),
        Request("empty", prompt=""),
        REQUESTS[1],
    ]
    found = {result.id: result for result in engine.run(requests, GREEDY)}
    assert isinstance(found["too long"], Failure)
    assert "context" in found["too long"].reason
    assert found["empty"] == Failure("empty", "the prompt has no tokens")
    fits = found["just fits"]
    assert isinstance(fits, Completion)
    assert (fits.completion_tokens, fits.finish_reason) == (1, "length")
    assert isinstance(found["1"], Completion)


SAMPLED = GenerationSettings(
    max_new_tokens=20, do_sample=True, temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, seed=7
)


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_a_sampled_answer_follows_from_seed_and_id_alone(tmp_path: Path, kind: str) -> None:
    adapter, base, task = make_adapter(tmp_path, kind, "lora")
    engine = load(adapter, base, task, "float32", "cpu", "never")
    whole = answers(engine, REQUESTS, SAMPLED)
    again = load(adapter, base, task, "float32", "cpu", "never")
    left = answers(again, REQUESTS[7:3:-1], SAMPLED)
    assert left == {id_: whole[id_] for id_ in left}
    other = answers(engine, REQUESTS, replace(SAMPLED, seed=8))
    assert sum(other[id_] != whole[id_] for id_ in whole) >= 10
    twins = answers(engine, [Request("a", prompt="hello"), Request("b", prompt="hello")], SAMPLED)
    assert twins["a"].token_ids != twins["b"].token_ids


def test_sampled_tokens_come_as_often_as_the_model_thinks_them_likely(
    qwen_engine: Engine, qwen_lora: tuple[Path, Path, str]
) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(qwen_lora[0]).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([qwen_engine.tokenizer("hello").input_ids])).logits[0, -1]
    likely = torch.softmax(logits, -1)
    requests = [Request(str(i), prompt="hello") for i in range(1500)]
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    said = torch.tensor([c.token_ids[0] for c in answers(qwen_engine, requests, settings).values()])
    often = torch.bincount(said, minlength=len(likely)) / len(requests)
    assert (often - likely).abs().max() < 0.04
    assert likely.max() < 0.9, "nothing is left to chance"


def test_beam_sampling_follows_from_seed_and_id_and_leaves_torchs_generator_alone(qwen_engine: Engine) -> None:
    settings = replace(SAMPLED, num_beams=2, max_new_tokens=6)
    before = torch.get_rng_state()
    whole = answers(qwen_engine, REQUESTS[:4], settings)
    assert torch.equal(before, torch.get_rng_state())
    assert answers(qwen_engine, REQUESTS[2:3], settings)["2"] == whole["2"]


def test_overrides_apply_to_their_own_request_only(qwen_engine: Engine) -> None:
    plain = answers(qwen_engine, REQUESTS)
    short = replace(REQUESTS[0], overrides=Overrides(max_new_tokens=3))
    drawn = replace(REQUESTS[1], overrides=Overrides(do_sample=True, temperature=2.0, seed=3))
    found = answers(qwen_engine, [short, drawn, *REQUESTS[2:]])
    assert found["0"].token_ids == plain["0"].token_ids[:3]
    assert found["0"].finish_reason == "length"
    assert found["1"].token_ids != plain["1"].token_ids
    assert all(found[r.id] == plain[r.id] for r in REQUESTS[2:])


def test_a_tokenizer_larger_than_the_embedding_is_refused(qwen_lora: tuple[Path, Path, str], tmp_path: Path) -> None:
    adapter, base, _ = qwen_lora
    grown = tmp_path / "adapter"
    grown.mkdir()
    for file in adapter.iterdir():
        (grown / file.name).write_bytes(file.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(grown)
    with pytest.raises(UserError, match="321 tokens and the base model's embedding 320 rows"):
        load(grown, base, "CAUSAL_LM", "float32", "cpu")


def test_an_adapter_of_another_base_is_refused(qwen_lora: tuple[Path, Path, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names the base"):
        load(qwen_lora[0], tiny_causal(tmp_path / "other"), "CAUSAL_LM", "float32", "cpu")


MEMORY_SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from kubepeft_jobs.infer.decode import SlotSearch
from kubepeft_jobs.infer.engine import load
from kubepeft_jobs.infer.requests import Completion, GenerationSettings, Request

torch.set_num_threads(1)
adapter, base, task, extra = sys.argv[1:]
engine = load(adapter, base, task, "float32", "cpu", "never")
requests = [Request(str(i), prompt="x" * 400 + chr(97 + i % 26)) for i in range(64)]
settings = GenerationSettings(max_new_tokens=4)
free = {r.id: r for r in engine.run(requests, settings)}
first = 64
engine._continuous_search = SlotSearch(first=first)
engine._generate_search = SlotSearch(first=first)
held = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (held + int(extra), resource.RLIM_INFINITY))
tight = {r.id: r for r in engine.run(requests, settings)}
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps({"same": tight == free, "slots": engine.micro_batch, "first": first,
    "failed": [str(r) for r in tight.values() if not isinstance(r, Completion)][:2]}))
"""


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path: Path, kind: str) -> None:
    """The address space is limited to a little more than the process has, so that a real allocation fails."""
    adapter, base, task = make_adapter(tmp_path, kind, "lora", hidden_size=256)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(adapter), str(base), task, str(60 * 2**20)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # What glibc keeps of freed memory counts against the limit, and oneDNN can't use it; so it keeps none of the large pieces.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["failed"] == []
    assert report["same"]
    assert report["slots"] < report["first"]


def test_the_slot_search_stays_where_more_rows_bring_no_more() -> None:
    def settled(seconds: dict[int, float]) -> int:
        search = SlotSearch(first=2, most=16)
        for _ in range(100):
            search.observe(search.slots, seconds[search.slots])
        assert search.settled
        return search.slots

    assert settled({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}) == 16
    assert settled({2: 1.0, 4: 1.1, 8: 2.3, 16: 4.0}) == 4
    assert settled({2: 1.0, 4: 2.0, 8: 4.0, 16: 8.0}) == 2


def test_agreement_forgives_ties_and_nothing_else() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [4.0, 3.999999, 0.0]])
    assert agrees([1, 0], logits, [1, 0], eps=1e-7)
    assert agrees([1, 0], logits, [1, 1], eps=1e-6)
    assert not agrees([1, 0], logits, [1, 2], eps=1e-6)
    assert not agrees([1, 0], logits, [2, 0], eps=1e-6)
    assert not agrees([1, 0], logits, [1], eps=1e-6)


OPENAI = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "7", "prompt": "x"}, Request("7", prompt="x")),
        ({"id": 7, "prompt": "x"}, Request("7", prompt="x")),
        ({"prompt": "x", "answer": "passed over"}, Request("line-1", prompt="x")),
        (HELLO, Request("line-1", messages=(Message("user", "hello"),))),
        (
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
                ]
            },
            Request("line-1", messages=(Message("system", "ab"),)),
        ),
        (
            {**OPENAI, "body": {**HELLO, "model": "m", "max_tokens": 5, "temperature": 0, "stop": "."}},
            Request(
                "c",
                messages=(Message("user", "hello"),),
                overrides=Overrides(max_new_tokens=5, do_sample=False, stop=(".",)),
                openai=OpenAIEnvelope("/v1/chat/completions", "m"),
            ),
        ),
        (
            {
                "custom_id": "c",
                "url": "/v1/completions",
                "body": {
                    "prompt": "x",
                    "max_tokens": 5,
                    "max_completion_tokens": 6,
                    "temperature": 0.5,
                    "top_p": 0.9,
                    "seed": 3,
                    "n": 1,
                },
            },
            Request(
                "c",
                prompt="x",
                overrides=Overrides(max_new_tokens=6, do_sample=True, temperature=0.5, top_p=0.9, seed=3),
                openai=OpenAIEnvelope("/v1/completions", None),
            ),
        ),
    ],
)
def test_each_form_of_input_line_is_read(row: object, expected: Request) -> None:
    assert list(read_requests([json.dumps(row).encode()], file="f")) == [expected]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a JSON object was expected"),
        (b'{"id": "a", "prompt": NaN}', "not JSON"),
        (b'{"id": "a", "prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"id": "a", "prompt": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"id": "a", "prompt": "\xff"}', "not UTF-8: byte 0xff at offset 23"),
        (b'{"id": "a", "prompt": "\x00"}', "NUL"),
        (rb'{"id": "a", "prompt": "\u0000"}', "NUL"),
        (rb'{"id": "a", "prompt": "\ud800"}', "surrogate"),
        (b'{"id": "a"}', 'one of "prompt" and "messages"'),
        (b'{"id": "a", "prompt": "x", "messages": []}', "not both"),
        (b'{"id": "a", "prompt": 5}', "prompt: a string was expected, found a number"),
        (b'{"id": "a", "messages": []}', "at least one message"),
        (b'{"id": "a", "messages": "x"}', "messages: a list"),
        (b'{"id": "a", "messages": [{"role": "wizard", "content": "x"}]}', "messages[0].role: one of"),
        (b'{"id": "a", "messages": [{"role": "user"}]}', "messages[0].content: a string"),
        (b'{"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "only parts of type text"),
        (b'{"id": "", "prompt": "x"}', "an empty string names nothing"),
        (b'{"id": [1], "prompt": "x"}', "id: a string was expected"),
        (b'{"custom_id": "a", "prompt": "x"}', "body: an object was expected"),
        (b'{"custom_id": "a", "method": "GET", "body": {"prompt": "x"}}', 'method: "POST"'),
        (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "x"}}', "url:"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "n": 2}}', "body.n: 2 is not supported"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "tools": [{}]}}', "body.tools"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "max_token": 2}}', "body.max_token: unknown field"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "max_tokens": 0}}', "body.max_tokens: a whole number from 1"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "max_tokens": true}}', "body.max_tokens"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "temperature": -1}}', "body.temperature: a number"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "top_p": 0}}', "body.top_p: a number above 0"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "stop": [""]}}', "body.stop"),
    ],
)
def test_a_bad_line_says_why_and_the_next_is_read(raw: bytes, reason: str) -> None:
    bad, good = read_requests([raw, b'{"prompt": "x"}'], file="in.jsonl")
    assert isinstance(bad, BadLine)
    assert (bad.file, bad.line) == ("in.jsonl", 1)
    assert reason in bad.reason
    assert good == Request("line-2", prompt="x")
    assert bad_line_row(bad)["error"] == bad.reason


def test_the_first_of_two_lines_with_one_id_wins_over_all_files() -> None:
    seen: set[str] = set()
    first = list(read_requests([b'{"id":"a","prompt":"1"}', b"  ", b'{"id":"a","prompt":"2"}'], file="1", seen=seen))
    assert first[0] == Request("a", prompt="1")
    assert first[1] == BadLine("1", 3, "a", "the id 'a' was used by an earlier line")
    assert isinstance(next(read_requests([b'{"id":"a","prompt":"3"}'], file="2", seen=seen)), BadLine)


def test_a_byte_order_mark_before_the_first_line_is_no_error() -> None:
    assert list(read_requests([b'\xef\xbb\xbf{"id":"a","prompt":"1"}'], file="f")) == [Request("a", prompt="1")]


def test_output_rows_have_the_form_of_their_input_line() -> None:
    completion = Completion("c", "hi", 3, (4, 5), "stop")
    plain = completion_row(Request("c", prompt="x"), completion, created=9)
    assert plain == {"id": "c", "text": "hi", "prompt_tokens": 3, "completion_tokens": 2, "finish_reason": "stop"}
    asked = Request("c", prompt="x", openai=OpenAIEnvelope("/v1/chat/completions", "m"))
    row = completion_row(asked, completion, created=9)
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("c", None, 200)
    body = row["response"]["body"]
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "hi"}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "m", 9)
    text = replace(asked, openai=OpenAIEnvelope("/v1/completions", None))
    assert completion_row(text, completion, created=9)["response"]["body"]["choices"][0]["text"] == "hi"
    assert failure_row(asked, Failure("c", "too long"))["error"]["message"] == "too long"
    assert failure_row(Request("c", prompt="x"), Failure("c", "too long")) == {"id": "c", "error": "too long"}
    assert row["id"] == completion_row(asked, completion, created=10)["id"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 7 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_memory_that_ran_out_is_known_by_any_allocators_words(error: BaseException, expected: bool) -> None:
    assert memory.ran_out(error) is expected
