"""From logits to the next token, and from tokens to the end of an answer.

The rules are transformers' own logits processors. What is ours is that randomness comes from the row, not from one
generator of the batch, and that processors which look at earlier tokens see one row's own tokens, never padding.
Nothing here runs a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .decode import Row
from .requests import FinishReason, GenerationSettings

LEFT_TO_GENERATE = (
    "sequence_bias",
    "bad_words_ids",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "watermarking_config",
)
"""Fields of a model's generation_config.json that change its logits and that only `generate` applies."""


@dataclass(frozen=True)
class Sampling:
    """Generation settings with nothing left open: the run's, else the model's, else those that change nothing."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    length_penalty: float
    min_new_tokens: int
    num_beams: int

    @classmethod
    def of(cls, settings: GenerationSettings, model: GenerationConfig) -> "Sampling":
        def first(name: str, neutral: Any) -> Any:
            values = (getattr(settings, name), getattr(model, name, None), neutral)
            return next((value for value in values if value is not None), None)

        return cls(
            do_sample=settings.do_sample,
            temperature=first("temperature", 1.0),
            top_k=first("top_k", 0),
            top_p=first("top_p", 1.0),
            min_p=first("min_p", None),
            repetition_penalty=first("repetition_penalty", 1.0),
            no_repeat_ngram_size=first("no_repeat_ngram_size", 0),
            length_penalty=first("length_penalty", 1.0),
            min_new_tokens=settings.min_new_tokens,
            num_beams=settings.num_beams,
        )

    @property
    def looks_back(self) -> bool:
        """Whether a token's score depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0 or self.min_new_tokens > 0

    def warpers(self) -> LogitsProcessorList:
        """What shapes the distribution that a token is drawn from, in the order in which `generate` applies it."""
        found = LogitsProcessorList()
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class Chooser:
    """The token of each row under one `Sampling`; a `decode.Choose`."""

    def __init__(self, sampling: Sampling, eos: list[int], device: torch.device) -> None:
        self.sampling = sampling
        self._eos = eos
        self._device = device
        self._warpers = sampling.warpers()

    def __call__(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        if self.sampling.looks_back:
            logits = torch.cat([self._processed(row, logits[i : i + 1]) for i, row in enumerate(rows)])
        if not self.sampling.do_sample:
            return logits.argmax(-1)
        return drawn(rows, self._warpers(torch.empty(len(rows), 0, dtype=torch.long), logits))

    def _processed(self, row: Row, logits: Tensor) -> Tensor:
        """(1, vocabulary) → the same. By row: the ids of a padded batch would hold pad tokens as if they were said."""
        sampling = self.sampling
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.no_repeat_ngram_size > 0:
            processors.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
        if sampling.min_new_tokens > 0 and self._eos:
            processors.append(
                MinNewTokensLengthLogitsProcessor(
                    len(row.prompt), sampling.min_new_tokens, self._eos, device=str(self._device)
                )
            )
        return processors(torch.tensor([row.prompt + row.new], device=self._device), logits)


def drawn(rows: Sequence[Row], scores: Tensor) -> Tensor:
    """One token a row from softmax(scores), (rows, vocabulary), at the point of its cumulative sum that the row's
    next random number names."""
    cumulative = torch.softmax(scores.double(), -1).cumsum(-1)
    points = [row.uniform() for row in rows]
    at = torch.tensor(points, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    found: Tensor = torch.searchsorted(cumulative, at, right=True)[:, 0]
    return found.clamp(max=scores.shape[-1] - 1)


class RowSampler(LogitsProcessor):
    """Makes `generate` without do_sample draw as `drawn` does: the drawn token keeps a score, all others lose theirs."""

    def __init__(self, rows: Sequence[Row], warpers: LogitsProcessorList) -> None:
        self._rows = rows
        self._warpers = warpers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = drawn(self._rows, self._warpers(input_ids, scores))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class FinishRule:
    """When a row is done: at an end token, at a stop string, or at its limit; a `decode.Finish`.

    A stop string that is one of the tokenizer's added tokens, as "<|im_end|>" often is, is met as that token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        decoded: Callable[[list[int]], str],
        eos: list[int],
        stop: tuple[str, ...],
    ) -> None:
        added = tokenizer.get_added_vocab()
        self._ends = {*eos, *(added[string] for string in stop if string in added)}
        self._stop = tuple(string for string in stop if string not in added)
        self._decoded = decoded
        # A token that is shown is a byte or more, so a string that just ended lies within this many of the last.
        self._tail = 8 + max((len(string.encode()) for string in self._stop), default=0)

    @property
    def has_strings(self) -> bool:
        return bool(self._stop)

    def __call__(self, row: Row) -> FinishReason | None:
        if row.new[-1] in self._ends:
            return "stop"
        if self._stop and self._found(row.new[-self._tail :]) and self._found(row.new):
            return "stop"
        return "length" if len(row.new) >= row.limit else None

    def _found(self, ids: list[int]) -> bool:
        text = self._decoded(ids)
        return any(string in text for string in self._stop)

    def cut(self, row: Row, ids: list[int]) -> None:
        """Gives `row` the tokens of `ids` up to where it is done; what `generate` padded behind falls away."""
        row.new = []
        row.finish = None
        for token in ids:
            row.new.append(token)
            row.finish = self(row)
            if row.finish is not None:
                return
        row.finish = "length"


class StopRows(StoppingCriteria):
    """The same rule inside `generate`, so that a batch ends when all its rows met a stop string."""

    def __init__(self, rows: Sequence[Row], rule: FinishRule, start: int) -> None:
        self._rows = rows
        self._rule = rule
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in zip(self._rows, input_ids[:, self._start :].tolist(), strict=True):
            if row.finish is None:
                row.new = ids
                row.finish = self._rule(row)
        return torch.tensor([row.finish is not None for row in self._rows], device=input_ids.device)
