"""One worker process of prepare: parses, converts and encodes chunks. Run by `workers.WorkerPool`, not by people.

Reads pickles from stdin (a Setup, then chunks) and answers each with one pickle on stdout; ends when stdin does, so no worker
outlives the process that started it. Does not import torch unless the base's own tokenizer code needs it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kubepeft.errors import UserError

from .formats import Example, Format, Loss, Task, to_example
from .read import Chunk, RowError

if TYPE_CHECKING:
    from .encode import Encoded, Encoder

LISTED_PER_CHUNK = 10
SAMPLES_PER_CHUNK = 5

TooLong = Literal["truncate", "drop", "fail"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What every worker needs before the first chunk."""

    tokenizer_dir: str
    trust_remote_code: bool
    form: Format
    task: Task
    loss: Loss
    max_length: int
    too_long: TooLong
    eval_fraction: float
    seed: int


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the starting process must know of the tokenizer, which it does not load itself."""

    size: int
    largest_id: int
    has_chat_template: bool
    has_eos: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as the model sees it: pieces of text, each with whether it carries loss."""

    where: str
    segments: list[tuple[str, bool]]


@dataclass(slots=True)
class ChunkResult:
    """Row i has `ids[sum(id_counts[:i]):][:id_counts[i]]`, and likewise its target: loss spans or labels."""

    ids: NDArray[np.int32]
    id_counts: NDArray[np.int32]
    target: NDArray[np.int32]
    target_counts: NDArray[np.int32]
    is_eval: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    """Tokens of every readable row before anything was cut or dropped; of the longer side for SEQ_2_SEQ_LM."""
    loss_tokens: NDArray[np.int32]
    read: int = 0
    bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)
    """(place, reason) of the first LISTED_PER_CHUNK."""
    first_too_long: tuple[str, int] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    """"truncated", "tooLong", "noLossLeft" and the notes of an Encoded."""
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A UserError on its way to the starting process."""

    reason: str
    what: str
    where: str
    mend: str


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """A defect met in a worker, with its traceback."""

    text: str


def is_eval_row(source: int, numbers: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Whether rows go to the eval split: a hash of seed, file and row number (SplitMix64's finalizer), so no row needs another."""
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + source * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF)
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction


class ChunkEncoder:
    """Everything between a chunk and its arrays."""

    def __init__(self, setup: Setup, encoder: Encoder) -> None:
        self._setup, self._encoder = setup, encoder

    def __call__(self, chunk: Chunk, want_samples: bool) -> ChunkResult:
        from .encode import fit

        setup, task = self._setup, self._setup.task
        read, bad = 0, list[tuple[int, str]]()
        numbers, examples = list[int](), list[Example]()
        for number, row in chunk.rows():
            read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                examples.append(to_example(row, setup.form, self._encoder.has_chat_template))
                numbers.append(number)
            except RowError as reason:
                bad.append((number, str(reason)))
        lengths, kept_numbers = list[int](), list[int]()
        kept: list[Encoded] = []
        first_too_long = None
        counts: Counter[str] = Counter()
        eos = self._encoder.tokenizer.eos_token_id
        for number, encoded in zip(numbers, self._encoder.encode(examples), strict=True):
            if isinstance(encoded, RowError):
                bad.append((number, str(encoded)))
                continue
            length = max(len(encoded.ids), len(encoded.target) if task == "SEQ_2_SEQ_LM" else 0)
            lengths.append(length)
            if encoded.note:
                counts[encoded.note] += 1
            if length > setup.max_length:
                first_too_long = first_too_long or (chunk.where(number), length)
                if setup.too_long != "truncate":
                    counts["tooLong"] += 1
                    continue
                fitted = fit(encoded, setup.max_length, task, eos)
                if fitted is None:
                    counts["noLossLeft"] += 1
                    continue
                counts["truncated"] += 1
                encoded = fitted
            kept.append(encoded)
            kept_numbers.append(number)
        bad.sort()
        return ChunkResult(
            ids=_joined([row.ids for row in kept]),
            id_counts=np.array([len(row.ids) for row in kept], np.int32),
            target=_joined([row.target for row in kept]),
            target_counts=np.array([len(row.target) for row in kept], np.int32),
            is_eval=is_eval_row(chunk.source, np.array(kept_numbers, np.int64), setup.eval_fraction, setup.seed),
            lengths=np.array(lengths, np.int32),
            loss_tokens=np.array([row.loss_tokens(task) for row in kept], np.int32),
            read=read,
            bad=len(bad),
            first_bad=[(chunk.where(number), reason) for number, reason in bad[:LISTED_PER_CHUNK]],
            first_too_long=first_too_long,
            counts=counts,
            samples=[
                Sample(chunk.where(number), self._segments(row))
                for number, row in zip(kept_numbers[:SAMPLES_PER_CHUNK], kept, strict=False)
            ]
            if want_samples
            else [],
        )

    def _segments(self, row: Encoded) -> list[tuple[str, bool]]:
        decode = self._encoder.tokenizer.decode
        if self._setup.task == "SEQ_2_SEQ_LM":
            return [(decode(row.ids), False), (decode(row.target), True)]
        segments, at = list[tuple[str, bool]](), 0
        for start, end in zip(row.target[::2], row.target[1::2], strict=True):
            segments += [(decode(row.ids[at:start]), False), (decode(row.ids[start:end]), True)]
            at = end
        segments.append((decode(row.ids[at:]), False))
        return [(text, has_loss) for text, has_loss in segments if text]


def _joined(lists: list[list[int]]) -> NDArray[np.int32]:
    return np.concatenate([np.array(ids, np.int32) for ids in lists]) if lists else np.empty(0, np.int32)


def _load(setup: Setup) -> tuple[ChunkEncoder, TokenizerFacts]:
    from transformers import AutoTokenizer

    from .encode import Encoder

    tokenizer: Any = AutoTokenizer.from_pretrained(
        setup.tokenizer_dir, trust_remote_code=setup.trust_remote_code, local_files_only=True
    )
    encoder = Encoder(tokenizer, setup.task, setup.loss)
    facts = TokenizerFacts(
        size=len(tokenizer),
        largest_id=max(tokenizer.get_vocab().values(), default=-1),
        has_chat_template=encoder.has_chat_template,
        has_eos=tokenizer.eos_token_id is not None,
    )
    return ChunkEncoder(setup, encoder), facts


def main(*, trust_remote_code: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the starting process decides
    if not trust_remote_code:
        sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it: 2 s and 400 MB for nothing
    from transformers import AutoTokenizer  # noqa: F401  # while the starting process does something else

    from .encode import Encoder  # noqa: F401

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer's own code prints must not mix with the answers
    work: ChunkEncoder | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        answer: object
        try:
            if isinstance(request, Setup):
                work, answer = _load(request)
            else:
                assert work is not None, "a Setup comes first"
                answer = work(*request)
        except UserError as error:
            answer = Refusal(error.reason, error.what, error.where, error.mend)
        except Exception:
            answer = WorkerFailure(traceback.format_exc())
        try:
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
        except BrokenPipeError:
            return
