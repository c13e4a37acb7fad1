"""Makes the quickstart's base model: a small Qwen2 that follows simple instructions, and its tokenizer.

    python examples/quickstart/base/make_base.py                  # writes beside this file
    python examples/quickstart/base/make_base.py --seconds 200    # the same in parts: run it again until it says done

Everything is made here: the corpus is drawn from the grammars below, the tokenizer is trained on it, and the
weights on its endless stream, batch `i` always being the same text. The corpus teaches skills that any chat model
has (repeat, look up, answer from a text, write JSON, talk politely about what someone wrote) and nothing of what the
quickstart fine-tunes for: no tickets, no intents, none of the example's products, no text of data/. Keep it so, or
the demo shows nothing.

The quickstart uses the files beside this one. Run again, this makes a model of the same kind, not the same bytes: CPUs round differently.
"""

# ruff: noqa: SIM905 (word lists are easier to read as text)

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SEED = 0
STEPS = 2000
BATCH = 32
BATCHES_PER_BLOCK = 8  # drawn together and cut by length, so that little padding is computed
WARMUP, COOLDOWN = 60, 800
MUON_LR, ADAMW_LR = 4e-3, 2e-3
VOCAB = 1536
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

Example = tuple[str, str]  # what the user says, what the assistant answers

# ----------------------------------------------------------------------------------------------------- words

NOUNS = """apple arrow bag ball bank barn basket bell bench berry bird boat bone book bottle box branch brick
bridge brush bucket button cabin candle canvas card carrot castle cat chain cheese cliff cloud coat coin collar corn
cow crown cup curtain dog door dress drum duck eagle engine farm feather fence field finger fish flag floor flower
forest fork fox frame fruit garden gate glass glove goat grape grass hat hill honey house ice island jar jewel
kitchen lake leaf lemon letter lion lock map market meadow milk mirror moon mountain mouse nail needle nest nut
oak ocean onion orange oven owl paint palace paper path pear pebble pencil picture pig pipe plant plate plum
pocket pond potato purse rabbit rain ribbon ring river road roof root rose sack sail salt sand school sea seed
shell ship shirt shoe shop silk sky snow soap sock song spoon spring stair star station stone storm straw street
sugar sun table tail tiger tower town train tree tunnel valley village wagon wall water wave wheel wind
window wing wire wolf wood wool yard""".split()
ADJECTIVES = """big blue bright brown clean cold dark deep dry fast flat green grey heavy high hot large light little long
loud narrow new old orange pale pink plain quick quiet red rough round short silver slow small soft square steel strong
tall thick thin tiny warm wet white wide yellow young""".split()
VERBS = """bought found got lost made opened ordered sold saw sent took used wanted washed""".split()
ONSETS = [
    *"""b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str sw t th
tr tw v w wh y z""".split(),
    "",
    "",
]
NUCLEI = "a e i o u a e i o u ai au ea ee ei ia ie io oa oo ou ow y".split()
CODAS = (
    """b ck d ct f ft g k l ld lk ll lt m mp n nd ng nk nt p r rd rk rl rm rn rt s sh sk ss st t tch th tt tle ter
ble der ing er el en x z""".split()
    + [""] * 12
)
KEYS = """age author band block brand captain city class coach code color country course date day depth dish drink file
floor fruit game gate grade group height host hour kind label lake language length level line mark material metal mode
month name note owner page place planet port price rank river road room score seat shape sign size song sport state street
style team title tool town tree type unit value version village weight width year zone""".split()
GREETINGS = ["Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Dear team", "Hello there", "Hi all"]
CLOSINGS = ["Thanks", "Thank you", "Best wishes", "Regards", "Many thanks", "Bye", "Yours", "Cheers"]
MONTHS = """January February March April May June July August September October November December""".split()


def made_up_word(rng: random.Random) -> str:
    """A word that nobody uses. Copying such words is a skill; copying known ones may be memory."""
    if rng.random() < 0.15:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
    syllables = rng.choices([1, 2, 3], [0.35, 0.5, 0.15])[0]
    return "".join(rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(syllables))


def noun(rng: random.Random) -> str:
    return rng.choice(NOUNS) if rng.random() < 0.3 else made_up_word(rng)


def thing(rng: random.Random) -> str:
    """One to three words: "stone", "blue stone", "trell kamp"."""
    kind = rng.random()
    if kind < 0.5:
        return noun(rng)
    if kind < 0.7:
        return f"{rng.choice(ADJECTIVES)} {noun(rng)}"
    if kind < 0.95:
        return f"{noun(rng)} {noun(rng)}"
    return f"{noun(rng)} {noun(rng)} {noun(rng)}"


def name(rng: random.Random) -> str:
    return made_up_word(rng).capitalize()


def number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 6)))


def code(rng: random.Random) -> str:
    """Letters and digits in one of several patterns: "K-2041", "88 QX", "#71930"."""
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice([1, 1, 2, 3])))
    digits = "".join(rng.choices("0123456789", k=rng.choice([2, 3, 4, 5, 5, 6])))
    return rng.choice(["{0}-{1}", "{0}-{1}", "{0}-{1}", "{0}{1}", "#{1}", "{1}-{0}", "{0}/{1}", "{1}"]).format(
        letters, digits
    )


def value(rng: random.Random) -> str:
    return rng.choice([thing, thing, name, number, code, code])(rng)


# ---------------------------------------------------------------------------------------------------- skills


def repeat(rng: random.Random) -> Example:
    text = " ".join(value(rng) for _ in range(rng.randint(1, 5)))
    ask = rng.choice(
        ["Repeat: {}", "Say {}", "Copy this line: {}", "Write this again: {}", "{}\n\nRepeat that.", "Echo {}"]
    )
    return ask.format(text), text


def look_up(rng: random.Random) -> Example:
    keys = rng.sample(KEYS, rng.randint(2, 5))
    values = [value(rng) for _ in keys]
    form, separator = rng.choice(
        [("{}: {}", "\n"), ("{} = {}", "\n"), ("The {} is {}.", " "), ("{} {}", ", "), ("{}: {}", "; ")]
    )
    table = separator.join(form.format(k, v) for k, v in zip(keys, values, strict=True))
    i = rng.randrange(len(keys))
    ask = rng.choice(["What is the {}?", "Which {} is it?", "Give me the {}.", "{}?", "Tell me the {}."]).format(
        keys[i]
    )
    return rng.choice(["{0}\n\n{1}", "{0} {1}", "{1}\n\n{0}"]).format(table, ask), values[i]


def write_json(rng: random.Random) -> Example:
    keys = rng.sample(KEYS, rng.randint(1, 4))
    values = [value(rng) for _ in keys]
    form, separator = rng.choice(
        [("{} is {}", ", "), ("{}: {}", "\n"), ("the {} is {}", " and "), ("{} {}", ", "), ("{}={}", " ")]
    )
    table = separator.join(form.format(k, v) for k, v in zip(keys, values, strict=True))
    ask = rng.choice(
        ["Write as JSON: {}", "JSON of this: {}", "{}\n\nGive me JSON.", "Make JSON from {}", "As JSON please: {}"]
    )
    picked = list(zip(keys, values, strict=True))
    if rng.random() < 0.4:  # some keys only, in the order asked for
        picked = rng.sample(picked, rng.randint(1, len(picked)))
        wanted = " and ".join(k for k, _ in picked)
        ask = rng.choice(["JSON with {} only: {{}}", "{{}}\n\nWrite JSON with {}."]).format(wanted)
    return ask.format(table), json.dumps(dict(picked), separators=(",", ":"))


def read_text(rng: random.Random) -> Example:
    """A few sentences and a question that one of them answers."""
    people = [name(rng) for _ in range(rng.randint(1, 3))]
    facts: list[tuple[str, str, str]] = []
    for who in people:
        what = value(rng)
        facts += rng.sample(
            [
                (f"{who} lives in {what.capitalize()}.", f"Where does {who} live?", what.capitalize()),
                (f"{who} has a {what}.", f"What does {who} have?", what),
                (f"{who} {rng.choice(VERBS)} the {what} yesterday.", f"What was it with {who} yesterday?", what),
                (f"The {what} belongs to {who}.", f"What belongs to {who}?", what),
                (f"{who} said that the {what} is {rng.choice(ADJECTIVES)}.", f"What did {who} talk about?", what),
                (f"You can find the {what} next to {who}.", f"What is next to {who}?", what),
            ],
            1,
        )
    rng.shuffle(facts)
    _, question, answer = rng.choice(facts)
    return " ".join(f[0] for f in facts) + " " + question, answer


def list_items(rng: random.Random) -> Example:
    items = [value(rng) for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.5:
        return "Join with commas:\n" + "\n".join(items), ", ".join(items)
    if rng.random() < 0.5:
        return "One on each line: " + ", ".join(items), "\n".join(items)
    i = rng.randrange(len(items))
    which = ["first", "second", "third", "fourth", "fifth"][i]
    return f"{', '.join(items)}. What is the {which}?", items[i]


def small_talk(rng: random.Random) -> Example:
    return rng.choice(
        [
            (rng.choice(GREETINGS) + rng.choice(["", "!", "."]), "Hello! How can I help you?"),
            ("How are you?", "I am well, thank you. How are you?"),
            ("Thank you!", "You are welcome."),
            ("Who are you?", "I am a small assistant."),
            ("What can you do?", "I can repeat, look things up and write JSON."),
            (f"My name is {(who := name(rng))}.", f"Nice to meet you, {who}."),
            (f"I am {(who := name(rng))}. Say hello to me.", f"Hello, {who}!"),
        ]
    )


def sentences_about(rng: random.Random, what: str, reference: str) -> list[str]:
    """What people write about a thing and its number, in any order and with talk around it."""
    verb = rng.choice(VERBS)
    about = rng.choice(
        [
            f"I {verb} a {what}.",
            f"I {verb} the {what} and it is {rng.choice(ADJECTIVES)}.",
            f"This is about my {what}.",
            f"The {what} is {rng.choice(ADJECTIVES)}.",
            f"We {verb} the {what} for {name(rng)}.",
            f"Please look at the {what}.",
            f"Where can I see the {what}?",
            f"My {what} is not what I wanted.",
            f"Can you tell me more about the {what}?",
            f"It is the {what} that I {verb}.",
            f"I do not like the {what}.",
            f"I have a question on your {what}.",
            f"Has the {what} always been like that?",
            f"Did the {what} come from {name(rng)}?",
            f"Will my {what} be {rng.choice(ADJECTIVES)} in the end?",
            f"I wonder how long a {what} lasts.",
            f"There is something on the {what}, as you can see.",
            f"Could you describe the {what} to me?",
            f"The {what} was in a {rng.choice(ADJECTIVES)} box.",
            f"The {what} does not look as it should.",
            f"You {verb} my {what} before I could ask.",
            f"How does the {what} work when it is {rng.choice(ADJECTIVES)}?",
            f"A {what} should never do this.",
            f"Nobody here knows what the {what} is for.",
            f"I need to know all about the {what}, please.",
            f"My friend {name(rng)} {verb} the {what} with me.",
        ]
    )
    which = rng.choice(
        [
            f"The number is {reference}.",
            f"It says {reference} on it.",
            f"My number: {reference}.",
            f"You will find it under {reference}.",
            f"See {reference}.",
            f"It is {reference}.",
            f"The paper shows {reference}.",
            f"I wrote down {reference} for you.",
        ]
    )
    talk = rng.choice(
        [
            f"I live in {name(rng)}.",
            f"It cost {number(rng)} coins.",
            f"It was {rng.randint(1, 31)} {rng.choice(MONTHS)}.",
            f"We waited {rng.randint(2, 60)} days.",
            "The weather is nice.",
            "I hope you are well.",
            "Please write back soon.",
            "It is not easy.",
            f"{name(rng)} told me to ask you.",
            f"I am {rng.randint(18, 90)} years old.",
        ]
    )
    parts = [about, which] + [talk] * (rng.random() < 0.6)
    rng.shuffle(parts)
    return parts


def polite_reply(rng: random.Random) -> Example:
    """Answers a message in prose, naming what it was about: what an assistant without an adapter does."""
    what, reference = thing(rng), code(rng)
    parts = sentences_about(rng, what, reference)
    if rng.random() < 0.6:
        parts.insert(0, rng.choice(GREETINGS) + rng.choice([",", "!", "."]))
    if rng.random() < 0.5:
        parts.append(f"{rng.choice(CLOSINGS)}, {name(rng)}" if rng.random() < 0.7 else rng.choice(CLOSINGS) + ".")
    reply = rng.choice(["Thank you for your message about the {0}.", "Thank you. I will look at the {0}, number {1}."])
    return " ".join(parts), reply.format(what, reference)


def asked_reply(rng: random.Random) -> Example:
    """The same messages with a question after them, so that the answer depends on reading both."""
    what, reference = thing(rng), code(rng)
    text = " ".join(sentences_about(rng, what, reference))
    question, answer = rng.choice(
        [
            ("What is it about?", what),
            ("Which number is given?", reference),
            ("Name the thing and the number.", f"{what}, {reference}"),
            ("Give the number, then the thing.", f"{reference}: {what}"),
        ]
    )
    return f"{text}\n\n{question}", answer


SKILLS: list[tuple[Callable[[random.Random], Example], float]] = [
    (repeat, 0.14),
    (look_up, 0.12),
    (write_json, 0.16),
    (read_text, 0.10),
    (list_items, 0.06),
    (small_talk, 0.04),
    (polite_reply, 0.18),
    (asked_reply, 0.20),
]


def examples(seed: str) -> Iterator[Example]:
    rng = random.Random(seed)
    skills, weights = zip(*SKILLS, strict=True)
    while True:
        yield rng.choices(skills, weights)[0](rng)


# --------------------------------------------------------------------------------------- tokenizer and model


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE with few words. Training splits finer than Qwen2Tokenizer does, blanks and every digit
    alone, so no merge crosses a word's edge: a word has the same tokens wherever it stands, and copying it is copying
    tokens."""
    learner = Tokenizer(models.BPE())
    pieces = Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    stream = examples(f"{SEED}/tokenizer")
    corpus = (f"user\n{user}\nassistant\n{answer}\nsystem\n" for user, answer in (next(stream) for _ in range(20_000)))
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=None,
        additional_special_tokens=[TURN_START],
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # on a CPU and at this length faster than SDPA; not written to the model
    )
    return Qwen2ForCausalLM(config)


# -------------------------------------------------------------------------------------------------- training


def encode(tokenizer: Qwen2Tokenizer, example: Example) -> tuple[list[int], int]:
    """Token ids of one conversation and how many of them are the prompt, which carries no loss."""
    user, answer = example
    prompt = f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n"
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(answer + TURN_END, add_special_tokens=False)["input_ids"]
    return head + tail, len(head)


def block(tokenizer: Qwen2Tokenizer, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The block's batches: ids and labels (-100 where there is no loss), each (BATCH, longest), padded on the right."""
    stream = examples(f"{SEED}/train/{index}")
    rows = [encode(tokenizer, next(stream)) for _ in range(BATCH * BATCHES_PER_BLOCK)]
    rows.sort(key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        longest = len(part[-1][0])
        ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
        labels = torch.full((BATCH, longest), -100)
        for i, (row, prompt) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
        batches.append((ids, labels))
    random.Random(index).shuffle(batches)
    return batches


def make_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon/) for the layers' matrices, AdamW for the rest: fewer steps than
    AdamW alone."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int) -> float:
    """The share of the peak learning rates: linear warm-up, a plateau, then linear to zero."""
    return min((step + 1) / WARMUP, 1.0, (STEPS - step) / COOLDOWN)


def loss_of(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean loss over the answers' tokens, and the share of them predicted right. Padding is on the right, where causal
    attention never looks, so no mask is needed."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        target = labels[:, 1:]
        scored = target != -100
        logits = model.lm_head(hidden[scored])
    loss = F.cross_entropy(logits.float(), target[scored])
    return loss, (logits.argmax(-1) == target[scored]).float().mean().item()


def train(out: Path, seconds: float) -> bool:
    """Trains until the last step or for `seconds`; True when the model is finished and written to `out`."""
    torch.set_num_threads(1)  # one order of summing, on any number of cores
    torch.use_deterministic_algorithms(True)
    checkpoint = out / "make_base.ckpt"
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizers = make_optimizers(model)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    start = time.monotonic()
    while step < STEPS and time.monotonic() - start < seconds:
        batches = block(tokenizer, step // BATCHES_PER_BLOCK)
        for ids, labels in batches:
            for optimizer, peak in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
                optimizer.param_groups[0]["lr"] = peak * schedule(step)
            loss, accuracy = loss_of(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            step += 1
        if step % 80 == 0:
            seconds_used = time.monotonic() - start
            print(
                f"step {step}/{STEPS}  loss {loss.item():.3f}  accuracy {accuracy:.3f}  {seconds_used:.0f} s",
                flush=True,
            )
    if step < STEPS:
        saved = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": saved, "step": step}, checkpoint)
        print(f"stopped at step {step}; run it again to go on")
        return False
    write(out, model, tokenizer)
    checkpoint.unlink(missing_ok=True)
    print("done")
    return True


def write(out: Path, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """A model folder as on a hub: config, bfloat16 weights, generation defaults, tokenizer."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the model")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be continued")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out, arguments.seconds)


if __name__ == "__main__":
    main()
