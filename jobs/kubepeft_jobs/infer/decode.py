"""A batched decode loop for causal models: rows leave when they are done and others take their place.

To the model each step is an ordinary left-padded batch over an ordinary transformers `Cache`: `forward` gets
input_ids, a 2-D attention_mask, position_ids and past_key_values, as `generate` would hand them over. So this file
knows no architecture, and must not learn one; `engine` compares its tokens with `generate`'s before it is used.
What it adds: the key-value cache is preallocated, finished rows are dropped instead of padded along, new rows are
prefilled apart and joined in, and the number of rows is found by measuring.
"""

import inspect
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kubepeft_jobs import memory

from .requests import FinishReason

_ROOM = 128
"""Columns the cache is allocated ahead of what is written, in tokens."""
_PREFILL_TOKENS = 4096
"""Most tokens, padding included, of one prefill; bounds its activations, which no slot count does."""
_PREFILL_PADDING = 64
"""Padding tokens of one prefill that cost less than the start of another."""
_MEMORY_SHARE = 0.5
"""Of the memory free when decoding starts, the share that the cache may take."""


@dataclass(eq=False)
class Row:
    """One request while it is answered. `limit` is the most new tokens; `finish` is set when it is done.

    `seed` and `id` alone give the row's random numbers, so they do not depend on the rows beside it.
    """

    id: str
    prompt: list[int]
    limit: int
    seed: int = 0
    new: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    _random: random.Random | None = None

    def uniform(self) -> float:
        """The row's next number from [0, 1). Python keeps this sequence the same over versions and platforms."""
        if self._random is None:
            self._random = random.Random(f"{self.seed}\0{self.id}")
        return self._random.random()

    def restart(self) -> None:
        self.new = []
        self.finish = None
        self._random = None


class Choose(Protocol):
    """Picks one token for each row. `logits`: float32, (rows, vocabulary). Returns int64, (rows,)."""

    def __call__(self, rows: Sequence[Row], logits: Tensor) -> Tensor: ...


Finish = Callable[[Row], FinishReason | None]
"""Whether the row, to which a token was just added, is done, and why."""


class OutOfMemory(Exception):
    """One row alone does not fit in memory; `row` says which."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.id)
        self.row = row


class SlotSearch:
    """Finds how many rows to decode at once: doubles while that raises rows a second, then stays at the best.

    Steps are timed on real work, so looking costs nothing that would not be done anyway. Running out of memory
    halves the slots for good.
    """

    _STEPS = 6
    _GAIN = 1.03

    def __init__(self, first: int = 8, most: int = 1024) -> None:
        self.slots = first
        self.most = most
        self.settled = False
        self.rates: dict[int, float] = {}
        self._seconds: list[float] = []

    def observe(self, rows: int, seconds: float) -> None:
        """Takes in one step of `rows` rows. Steps that were not full say nothing about this number of slots."""
        if self.settled or rows != self.slots:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < self._STEPS:
            return
        rate = rows / statistics.median(self._seconds)
        self._seconds = []
        best = max(self.rates.values(), default=0.0)
        self.rates[rows] = rate
        if rate < best * self._GAIN or rows >= self.most:
            self.slots = max(self.rates, key=lambda slots: self.rates[slots])
            self.settled = True
        else:
            self.slots = min(2 * rows, self.most)

    def bound(self, most: int) -> None:
        """No more than `most` slots from now on."""
        self.most = max(1, min(self.most, most))
        if self.slots > self.most:
            self.slots = self.most
            self._seconds = []

    def out_of_memory(self, rows: int) -> None:
        """`rows` rows at once did not fit."""
        self.bound(rows // 2)
        self.rates = {slots: rate for slots, rate in self.rates.items() if slots <= self.most}
        self._seconds = []


class PreallocatedLayer(DynamicLayer):
    """A DynamicLayer that writes new keys and values in place instead of copying all of them at every token.

    `keys` and `values`, (rows, heads, length, head size), are views of the first `length` columns of a buffer.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or after > self._buffers[0].shape[-2]:
            keys, values = (_widened(states, after + _ROOM) for states in (key_states, value_states))
            if before:
                keys[:, :, :before], values[:, :, :before] = self.keys, self.values
            self._buffers = keys, values
        keys, values = self._buffers
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self._buffers is None else int(self.keys.shape[-2])

    @classmethod
    def joined(cls, parts: Sequence[tuple["PreallocatedLayer", list[int]]], length: int) -> "PreallocatedLayer":
        """The named rows of several layers in one of `length` columns, right-aligned, zeros to the left."""
        layer = cls()
        first = parts[0][0]
        layer.lazy_initialization(first.keys, first.values)
        rows = sum(len(kept) for _, kept in parts)
        made = []
        for name in ("keys", "values"):
            source = getattr(first, name)
            buffer = source.new_empty((rows, source.shape[1], length + _ROOM, source.shape[3]))
            at = 0
            for part, kept in parts:
                old = getattr(part, name)
                old = old if len(kept) == len(old) else old[kept]
                taken = min(length, old.shape[-2])
                # Zeros, for what is masked is still multiplied by nought, and nought times NaN is NaN.
                buffer[at : at + len(kept), :, : length - taken] = 0
                buffer[at : at + len(kept), :, length - taken : length] = old[:, :, old.shape[-2] - taken :]
                at += len(kept)
            made.append(buffer)
        layer._buffers = made[0], made[1]
        layer.keys, layer.values = made[0][:, :, :length], made[1][:, :, :length]
        return layer


def _alike(lengths: Sequence[int]) -> int:
    """How many of the first prompts, longest first, to prefill together: few enough that padding stays small."""
    width, used = lengths[0], 0
    for count, length in enumerate(lengths):
        padded = width * (count + 1)
        used += length
        if count and (padded > _PREFILL_TOKENS or padded - used > max(_PREFILL_PADDING, used // 8)):
            return count
    return len(lengths)


def _widened(states: Tensor, columns: int) -> Tensor:
    rows, heads, _, size = states.shape
    return states.new_empty((rows, heads, columns, size))


@dataclass
class _Batch:
    """The rows being decoded. `padding` and `length` count the cache's columns, `tokens` is not in it yet."""

    rows: list[Row]
    cache: Cache
    padding: list[int]
    tokens: Tensor
    """int64, (rows,): the newest token of each row"""

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())


class ContinuousDecoder:
    """Decodes rows with `model`, a causal LM in eval mode.

    `prefix`, (virtual tokens, hidden size), goes before every prompt's embeddings: what prompt tuning learnt.
    """

    def __init__(self, model: PreTrainedModel, *, pad_id: int, prefix: Tensor | None = None) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.pad_id = pad_id
        self.prefix = prefix
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @staticmethod
    def supports(model: PreTrainedModel) -> str | None:
        """Why this loop cannot drive `model`, or None when it can be tried."""
        if model.config.is_encoder_decoder:
            return "an encoder-decoder model"
        missing = {"past_key_values", "attention_mask"} - inspect.signature(model.forward).parameters.keys()
        if missing:
            return f"its forward takes no {sorted(missing)[0]}"
        for layer in DynamicCache(config=model.config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                return f"its cache has layers of type {type(layer).__name__}"
        return None

    def decode(self, rows: Sequence[Row], *, choose: Choose, finish: Finish, search: SlotSearch) -> Iterator[Row]:
        """Yields each row when it is done. Give them longest first: they then waste the least padding.

        Raises OutOfMemory when a row does not fit even alone; the others go on with the next call.
        """
        waiting = deque(rows)
        batch: _Batch | None = None
        bounded = False
        while waiting or batch is not None:
            pending = [row for row in batch.rows if row.finish is None] if batch is not None else []
            try:
                if batch is None or self._should_rebuild(batch, search.slots, bool(waiting)):
                    room = max(0, search.slots - len(pending))
                    fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                    pending += fresh
                    batch = self._rebuilt(batch, fresh, choose, finish)
                    if batch is not None and not bounded:
                        search.bound(self._fitting(batch, rows))
                        bounded = True
                else:
                    started = time.perf_counter()
                    self._step(batch, choose, finish)
                    search.observe(len(batch.rows), time.perf_counter() - started)
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
                failed = True
            else:
                failed = False
            if not failed:
                yield from (row for row in pending if row.finish is not None)
                continue
            # Out here the traceback no longer holds the tensors that did not fit.
            batch = None
            clear_device_cache(garbage_collection=True)
            search.out_of_memory(len(pending))
            for row in reversed(pending):
                row.restart()
                waiting.appendleft(row)
            if len(pending) == 1:
                raise OutOfMemory(waiting.popleft())

    @staticmethod
    def _should_rebuild(batch: _Batch, slots: int, more: bool) -> bool:
        """Copying the cache is worth it once a quarter of the rows is done, or there is room for as many new ones."""
        alive = sum(row.finish is None for row in batch.rows)
        done = len(batch.rows) - alive
        return alive == 0 or 4 * done >= len(batch.rows) or (more and 4 * (slots - alive) >= slots)

    @torch.inference_mode()
    def _rebuilt(self, batch: _Batch | None, fresh: list[Row], choose: Choose, finish: Finish) -> _Batch | None:
        """The unfinished rows of `batch` and the `fresh` ones, prefilled, with one token each."""
        parts: list[tuple[_Batch, list[int]]] = []
        if batch is not None:
            parts.append((batch, [i for i, row in enumerate(batch.rows) if row.finish is None]))
        parts += [(part, list(range(len(part.rows)))) for part in self._prefilled(fresh, choose, finish)]
        parts = [(part, [i for i in kept if part.rows[i].finish is None]) for part, kept in parts]
        parts = [(part, kept) for part, kept in parts if kept]
        if not parts:
            return None
        if len(parts) == 1 and len(parts[0][1]) == len(parts[0][0].rows) and not min(parts[0][0].padding):
            return parts[0][0]
        length = max(part.length - part.padding[i] for part, kept in parts for i in kept)
        layers = [
            PreallocatedLayer.joined([(part.cache.layers[at], kept) for part, kept in parts], length)
            for at in range(len(parts[0][0].cache.layers))
        ]
        return _Batch(
            rows=[part.rows[i] for part, kept in parts for i in kept],
            cache=Cache(layers=layers),
            padding=[length - (part.length - part.padding[i]) for part, kept in parts for i in kept],
            tokens=torch.cat([part.tokens[kept] for part, kept in parts]),
        )

    def _prefilled(self, rows: list[Row], choose: Choose, finish: Finish) -> Iterator[_Batch]:
        virtual = 0 if self.prefix is None else len(self.prefix)
        while rows:
            count = _alike([virtual + len(row.prompt) for row in rows])
            taken, rows = rows[:count], rows[count:]
            width = virtual + max(len(row.prompt) for row in taken)
            padding = [width - virtual - len(row.prompt) for row in taken]
            ids = torch.tensor(
                [[self.pad_id] * (width - len(row.prompt)) + row.prompt for row in taken], device=self.device
            )
            cache = Cache(layer_class_to_replicate=PreallocatedLayer)
            batch = _Batch(taken, cache, padding, tokens=ids[:, -1])
            logits = self._forward(batch, self._prompt_inputs(ids, padding), width)
            self._take(batch, logits, choose, finish)
            yield batch

    def _prompt_inputs(self, ids: Tensor, padding: list[int]) -> dict[str, Tensor]:
        """Virtual tokens stand between padding and prompt: in front of the padding they would be at a distance from
        the prompt that depends on the other rows."""
        if self.prefix is None:
            return {"input_ids": ids}
        embeds = self.model.get_input_embeddings()(ids)
        for row, pad in enumerate(padding):
            embeds[row, pad : pad + len(self.prefix)] = self.prefix.to(embeds.dtype)
        return {"inputs_embeds": embeds}

    @torch.inference_mode()
    def _step(self, batch: _Batch, choose: Choose, finish: Finish) -> None:
        logits = self._forward(batch, {"input_ids": batch.tokens[:, None]}, 1)
        self._take(batch, logits, choose, finish)

    def _forward(self, batch: _Batch, inputs: dict[str, Tensor], width: int) -> Tensor:
        """Logits of the last column, float32, (rows, vocabulary)."""
        before = batch.length
        padding = torch.tensor(batch.padding, device=self.device)[:, None]
        columns = torch.arange(before + width, device=self.device)
        positions = {"position_ids": (columns[before:] - padding).clamp(min=0)} if self._takes_positions else {}
        output = self.model(
            **inputs,
            **positions,
            **self._last_only,
            attention_mask=(columns >= padding).long() if any(batch.padding) else None,
            past_key_values=batch.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()

    @staticmethod
    def _take(batch: _Batch, logits: Tensor, choose: Choose, finish: Finish) -> None:
        batch.tokens = choose(batch.rows, logits)
        for row, token in zip(batch.rows, batch.tokens.tolist(), strict=True):
            if row.finish is None:
                row.new.append(token)
                row.finish = finish(row)

    def _fitting(self, batch: _Batch, rows: Sequence[Row]) -> int:
        """Rows whose cache fits in memory, each as long as the longest can become; twice, for rebuilding copies it."""
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in batch.cache.layers)
        a_token = held / (len(batch.rows) * batch.length)
        virtual = 0 if self.prefix is None else len(self.prefix)
        longest = virtual + max(len(row.prompt) + row.limit for row in rows)
        return int(_MEMORY_SHARE * memory.free(self.device) / (2 * a_token * (longest + _ROOM)))
