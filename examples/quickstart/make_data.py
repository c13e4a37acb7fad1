"""Makes the quickstart's data: customers' messages and the ticket line that a shop's help desk wants of each.

    python examples/quickstart/make_data.py     # writes data/ beside this file; the same bytes every time

The shop has one catalogue, and customers have their ways of writing, so the files share products and sentences. They share no
customer, no order number, no kind of a product ("blue kettle") and so no message: an adapter that only remembers scores
nothing on the questions. Keep them apart.
answers.jsonl is for whoever counts the right ones; nothing else reads it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 0
ROWS = {"train": 1500, "eval": 100, "questions": 120}

PRODUCTS = """kettle; toaster; blender; hair dryer; alarm clock; desk lamp; office chair; bookshelf; yoga mat; backpack;
suitcase; umbrella; wallet; sunglasses; wrist watch; raincoat; sneakers; sandals; winter jacket; wool sweater; jeans; belt;
keyboard; mouse pad; monitor; webcam; microphone; headphones; speaker; phone case; charger; power bank; tablet; e-reader;
printer; router; memory card; tripod; camera strap; binoculars; telescope; guitar; ukulele; drumsticks; music stand; puzzle;
board game; chess set; teddy bear; doll house; toy train; skateboard; scooter; bicycle pump; helmet; tennis racket; football;
swimsuit; goggles; sleeping bag; tent; camping stove; water filter; flashlight; pocket knife; screwdriver; hammer; drill;
ladder; paint roller; garden hose; lawn mower; flower pot; bird feeder; dog leash; cat tree; fish tank; rice cooker; frying pan;
baking tray; knife block; cutting board; coffee grinder; teapot; lunch box; thermos; ice maker; vacuum cleaner; steam iron;
laundry rack; shower curtain; bath towel; pillow; duvet; mattress; carpet; wall mirror; picture frame; candle holder; vase"""
KINDS = """red blue green black white grey yellow brown small large light heavy wooden steel plastic cotton leather folding
travel wireless electric kids garden office kitchen outdoor cheap new spare second digital manual portable compact classic"""
CUSTOMERS = {
    "train": """Anna Ben Carla David Elena Farid Greta Hugo Ines Jonas Karin Leo Maria Nils Olga Pedro Rosa Samir Tara Victor
Wanda Yusuf Zoe Aiko Bruno Chloe Dario Emma Felix Gina""",
    "eval": "Liam Mona Oscar Petra Ruben Stella",
    "questions": "Amara Boris Celine Dmitri Esther Fabian Gloria Henrik Ivana Joaquin Kemal Lucia Marek Nadia Otto Priya",
}
ORDER_LETTERS = {"train": "ABCDEFGHKLMNPR", "eval": "ST", "questions": "UVWXZ"}

WISHES = {
    "refund": [
        "I want my money back for the {0}.",
        "Please refund the {0}.",
        "I would like a refund for my {0}.",
        "Can I send the {0} back and get my money?",
        "The {0} is not for me, please pay me back.",
        "I returned the {0} and wait for the money.",
    ],
    "exchange": [
        "Can I swap the {0} for another size?",
        "I would like to exchange the {0}.",
        "Please send me the {0} in a different colour.",
        "You sent the wrong {0}, I need the right one.",
        "I want to change the {0} for a bigger one.",
        "Could you replace the {0} with the blue one?",
    ],
    "cancel": [
        "Please cancel the {0}.",
        "I do not need the {0} any more, stop the order.",
        "I ordered the {0} by mistake, do not send it.",
        "Can you still cancel my {0}?",
        "I changed my mind and do not want the {0} sent.",
        "Call off the delivery of the {0}.",
    ],
    "track": [
        "Where is my {0}?",
        "When will the {0} arrive?",
        "The {0} has not come yet.",
        "I am still waiting for the {0}.",
        "Has the {0} been sent?",
        "Can you tell me where the parcel with the {0} is?",
    ],
    "repair": [
        "The {0} is broken.",
        "My {0} stopped working after a week.",
        "The {0} makes a strange noise, can you fix it?",
        "Can somebody repair my {0}?",
        "There is a crack in the {0}, I have a warranty.",
        "The {0} does not work any more.",
    ],
    "invoice": [
        "Please send me the invoice for the {0}.",
        "I need a bill for the {0}.",
        "There was no receipt with the {0}.",
        "Can I get an invoice for my {0}?",
        "My office needs the receipt for the {0}.",
        "The bill for the {0} has the wrong name on it.",
    ],
}
ORDERS = [
    "My order number is {0}.",
    "The order is {0}.",
    "Order {0}.",
    "It is order {0}.",
    "You find it under {0}.",
    "I ordered it as {0}.",
    "Number {0}.",
]
TALK = [
    "I paid {number} euros.",
    "I bought it on {day} May.",
    "I have been a customer for {day} years.",
    "It was a present.",
    "I live at {number} Station Road.",
    "My son asked me to write.",
    "I could not reach you by phone.",
    "I hope you can help.",
]
OPENINGS = ["Hello,", "Hi,", "Good morning,", "Dear team,", "Hello there,"]
CLOSINGS = ["Thanks, {0}", "Thank you, {0}", "Regards, {0}", "Best wishes, {0}", "{0}"]


def message(rng: random.Random, split: str, intent: str, product: str, order: str) -> str:
    """The wish and the order number in either order, often with talk around them."""
    sentences = [rng.choice(WISHES[intent]).format(product), rng.choice(ORDERS).format(order)]
    if rng.random() < 0.6:
        sentences.append(rng.choice(TALK).format(number=rng.randint(5, 400), day=rng.randint(2, 30)))
    rng.shuffle(sentences)
    if rng.random() < 0.6:
        sentences.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.6:
        sentences.append(rng.choice(CLOSINGS).format(rng.choice(CUSTOMERS[split].split())))
    return " ".join(sentences)


def kinds_of(number: int) -> dict[str, list[str]]:
    """Which kinds of the catalogue's product of this number each file may speak of: every one belongs to one file."""
    all_kinds = KINDS.split()
    turned = all_kinds[number % len(all_kinds) :] + all_kinds[: number % len(all_kinds)]
    return {"questions": turned[:6], "eval": turned[6:10], "train": turned[10:]}


def rows(split: str) -> list[tuple[str, str]]:
    """(message, ticket) pairs; every product comes equally often, with every intent, half of the time as a kind of it."""
    rng = random.Random(f"{SEED}/{split}")
    products = [" ".join(p.split()) for p in PRODUCTS.split(";")]
    kinds = {product: kinds_of(number)[split] for number, product in enumerate(products)}
    intents = list(WISHES)
    made = []
    for i in range(ROWS[split]):
        turn, position = divmod(i, len(products))
        product, intent = products[position], intents[(turn + i) % len(intents)]
        if rng.random() < 0.5:
            product = f"{rng.choice(kinds[product])} {product}"
        order = f"{rng.choice(ORDER_LETTERS[split])}-{rng.randrange(10_000, 100_000)}"
        ticket = json.dumps({"intent": intent, "order": order, "product": product}, separators=(",", ":"))
        made.append((message(rng, split, intent, product, order), ticket))
    rng.shuffle(made)
    return made


def write_lines(path: Path, documents: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")


def main() -> None:
    out = Path(__file__).parent / "data"
    out.mkdir(exist_ok=True)
    for split in ("train", "eval"):
        write_lines(
            out / f"{split}.jsonl",
            [
                {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ticket}]}
                for text, ticket in rows(split)
            ],
        )
    questions = [(f"q{i:03}", text, ticket) for i, (text, ticket) in enumerate(rows("questions"), start=1)]
    write_lines(
        out / "questions.jsonl",
        [{"id": id, "messages": [{"role": "user", "content": text}]} for id, text, _ in questions],
    )
    write_lines(out / "answers.jsonl", [{"id": id, "answer": ticket} for id, _, ticket in questions])


if __name__ == "__main__":
    main()
