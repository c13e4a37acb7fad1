"""Loads an adapter on its base model and answers requests with it, in batches.

Works for every PEFT method on causal and encoder-decoder models: what the faster ways here cannot do goes through
`generate`. Which way is taken is measured, never assumed, and a way that picks other greedy tokens than the plain
adapter under `generate` is not taken. Nothing here reads or writes requests' files; `requests` names the rows, and the stage
around this keeps them.

What is guaranteed. Greedy: a row's tokens do not depend on the rows beside it, up to ties within the rounding of the
model's dtype. Sampling: a row's random numbers follow from the seed and the row's id alone, so a row sampled again after
a kill, in another batch or on another machine, draws the same numbers, and the same tokens up to the same rounding.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache
from jinja2.exceptions import TemplateError
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftType
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from kubepeft.errors import UserError
from kubepeft_jobs import memory

from .choose import LEFT_TO_GENERATE, Chooser, FinishRule, RowSampler, Sampling, StopRows
from .decode import ContinuousDecoder, OutOfMemory, Row, SlotSearch
from .packed import can_pack, pack
from .requests import Completion, Failure, GenerationSettings, Request, Result

Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]
Merge = Literal["auto", "always", "never"]

_PROBE_ROWS = 4
_PROBE_TOKENS = 12
_PROBE_PROMPT = 128
"""Longest prompt of a probe, in tokens; of longer ones it is the end that is used."""

_PREFIX_METHODS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""Prompt learning whose whole effect is embeddings in front of the prompt's."""
_CACHE_METHODS = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
"""Prompt learning whose whole effect is a filled cache in front of the prompt."""


@dataclass(frozen=True)
class Plan:
    """How requests are answered, and why so.

    `unmerged_tokens_per_second` and `merged_tokens_per_second` are those of the probe; None: not tried.
    """

    merged: bool
    continuous: bool
    packed: bool
    reason: str
    unmerged_tokens_per_second: float | None = None
    merged_tokens_per_second: float | None = None


@dataclass(frozen=True)
class _Loaded:
    """`top` generates (a PeftModel, or the merged base); `base` is the model whose forward the adapter changes."""

    top: Any
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    adapter_dir: str | Path,
    base_dir: str | Path,
    task: Task,
    dtype: str,
    device: str,
    merge: Merge = "auto",
    *,
    trust_remote_code: bool = False,
) -> "Engine":
    """Loads the adapter in `adapter_dir`, whose adapter_config.json names `base_dir` and which holds the tokenizer.

    dtype: "float32", "bfloat16" or "float16". device: "cpu", "cuda", "cuda:1" … merge: "auto" merges where that is
    faster and picks the same tokens, "always" merges where it picks the same tokens, "never" leaves it.
    Raises UserError when tokenizer and base disagree on the vocabulary, ValueError when the adapter names another base.
    """
    adapter = Path(adapter_dir)

    def fresh() -> _Loaded:
        return _load(adapter, str(base_dir), task, getattr(torch, dtype), torch.device(device), trust_remote_code)

    return Engine(fresh, merge)


def _load(
    adapter: Path, base: str, task: Task, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> _Loaded:
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    _check_vocabulary(adapter, base, len(tokenizer), trust_remote_code)
    auto = AutoPeftModelForCausalLM if task == "CAUSAL_LM" else AutoPeftModelForSeq2SeqLM
    top = auto.from_pretrained(str(adapter), dtype=dtype, trust_remote_code=trust_remote_code)
    named = next(iter(top.peft_config.values())).base_model_name_or_path
    if named != base:
        raise ValueError(f"{adapter}/adapter_config.json names the base {named!r}, expected {base!r}")
    top = top.to(device).eval().requires_grad_(False)
    return _Loaded(top, top.get_base_model(), tokenizer)


def _check_vocabulary(adapter: Path, base: str, tokens: int, trust_remote_code: bool) -> None:
    """AutoPeftModel grows a too small embedding by random rows and only logs it; right only for an adapter that saved them."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    rows = config.get_text_config().vocab_size
    if tokens <= rows:
        return
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as weights:
        if any(tokens in weights.get_slice(name).get_shape()[:1] for name in weights.keys()):  # noqa: SIM118
            return
    raise UserError(
        "VocabularyMismatch",
        f"the tokenizer has {tokens} tokens and the base model's embedding {rows} rows",
        where=str(adapter),
        mend="use the tokenizer that belongs to the base model, or train the embedding with the adapter",
    )


class Engine:
    """Answers requests with one adapter. `plan` is made at the first run, from that run's own requests."""

    def __init__(self, load_again: Callable[[], _Loaded], merge: Merge) -> None:
        self._load_again = load_again
        self._merge = merge
        self._loaded = load_again()
        self.plan: Plan | None = None
        self._continuous_search = SlotSearch()
        self._generate_search = SlotSearch(first=4)
        # PEFT puts virtual embeddings in front of the padding, at a distance to the prompt that depends on it.
        config = self._loaded.top.active_peft_config
        causal = not self._loaded.base.config.is_encoder_decoder
        self._padding_changes_answers = causal and config.is_prompt_learning and config.peft_type not in _CACHE_METHODS

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded.tokenizer

    @property
    def micro_batch(self) -> int:
        """Rows decoded at once, as found by measuring so far."""
        plan = self.plan
        return (self._continuous_search if plan is not None and plan.continuous else self._generate_search).slots

    def run(self, requests: Iterable[Request], settings: GenerationSettings) -> Iterator[Result]:
        """Answers each request once, in the order in which they get done. Holds all the requests in memory.

        A request that cannot be answered (no tokens, longer than the context, too large for the memory) becomes a
        Failure. Raises nothing for what stands in a request.
        """
        prompts: dict[str, int] = {}
        groups: dict[GenerationSettings, list[Row]] = {}
        for request in requests:
            ids = self._encode(request)
            own = settings.overridden(request.overrides)
            problem = ids if isinstance(ids, str) else self._problem(ids)
            if isinstance(ids, str) or problem is not None:
                yield Failure(request.id, str(problem))
                continue
            prompts[request.id] = len(ids)
            row = Row(request.id, ids, int(min(own.max_new_tokens, self._room(len(ids)))), seed=own.seed)
            # Seed and limit belong to the row, so rows that differ only in them can share a batch.
            groups.setdefault(replace(own, seed=0, max_new_tokens=0), []).append(row)
        if self.plan is None and groups:
            self.plan = self._chosen([row for rows in groups.values() for row in rows])
        for own, rows in groups.items():
            rows.sort(key=lambda row: len(row.prompt), reverse=True)
            for done in self._answered(rows, own):
                if isinstance(done, Failure):
                    yield done
                else:
                    text = self._text(done, own.stop)
                    yield Completion(done.id, text, prompts[done.id], tuple(done.new), done.finish or "length")

    # -- requests to token ids and back

    def _encode(self, request: Request) -> list[int] | str:
        """Token ids of a request, or why it has none."""
        if request.messages is None:
            return list(self.tokenizer(request.prompt or "").input_ids)
        if not self.tokenizer.chat_template:
            return "the adapter's tokenizer has no chat template, so it can answer prompts only, not messages"
        chat = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            return f"the chat template refuses these messages: {error}"
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _problem(self, ids: list[int]) -> str | None:
        if not ids:
            return "the prompt has no tokens"
        if self._room(len(ids)) < 1:
            return f"the prompt has {len(ids)} tokens and leaves no room for an answer in the model's context"
        return None

    def _text(self, row: Row, stop: tuple[str, ...]) -> str:
        text = self._decoded(row.new)
        cuts = [at for at in (text.find(string) for string in stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _room(self, prompt_tokens: int) -> float:
        """New tokens that the model's context has room for; infinite where the model names no limit."""
        config = self._loaded.base.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return math.inf
        left = limit - self._virtual - prompt_tokens
        if config.is_encoder_decoder:
            return limit - 1 if left >= 0 else 0
        return left

    @property
    def _virtual(self) -> int:
        """Virtual tokens that the adapter puts before each prompt."""
        config = getattr(self._loaded.top, "active_peft_config", None)
        return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self._eos[0] if self._eos else 0)

    @property
    def _eos(self) -> list[int]:
        """The model's own end tokens and the tokenizer's, which chat models end their turns with."""
        own = self._loaded.base.generation_config.eos_token_id
        ids = [own] if isinstance(own, int) else list(own or [])
        return list(
            dict.fromkeys([*ids, self.tokenizer.eos_token_id]) if self.tokenizer.eos_token_id is not None else ids
        )

    # -- ways to answer

    def _answered(self, rows: list[Row], settings: GenerationSettings) -> Iterator[Row | Failure]:
        """`rows` longest first, all of one group; each comes back done, or as a Failure when it fits no memory."""
        model = self._loaded.base.generation_config
        sampling = Sampling.of(settings, model)
        rule = FinishRule(self.tokenizer, self._decoded, self._eos, settings.stop)
        plan = self.plan
        if plan is None or not plan.continuous or sampling.num_beams > 1:
            yield from self._generated(rows, sampling, rule)
            return
        decoder = self._decoder()
        chooser = Chooser(sampling, self._eos, decoder.device)
        while rows:
            try:
                yield from decoder.decode(rows, choose=chooser, finish=rule, search=self._continuous_search)
                return
            except OutOfMemory as error:
                yield _too_large(error.row)
                rows = [row for row in rows if row.finish is None and row is not error.row]

    def _decoder(self) -> ContinuousDecoder:
        top = self._loaded.top
        prefix = top.get_prompt(batch_size=1)[0] if self._virtual else None
        return ContinuousDecoder(self._loaded.base, pad_id=self._pad, prefix=prefix)

    def _generated(self, rows: list[Row], sampling: Sampling, rule: FinishRule) -> Iterator[Row | Failure]:
        """By transformers' `generate`, in batches whose size is found by measuring."""
        search = self._generate_search
        while rows:
            batch = _alike(rows, self._batch_bound(sampling), self._same_length(sampling))
            started = time.perf_counter()
            try:
                self._generate(batch, sampling, rule)
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error):
                    raise
                failed = True
            else:
                failed = False
            if failed:
                clear_device_cache(garbage_collection=True)
                search.out_of_memory(len(batch))
                for row in batch:
                    row.restart()
                if len(batch) > 1:
                    continue
                yield _too_large(batch[0])
            else:
                tokens = sum(len(row.new) for row in batch)
                # Seconds for as many tokens as there are rows, so that this compares with a decoding step.
                search.observe(len(batch), (time.perf_counter() - started) * len(batch) / tokens)
                yield from batch
            rows = rows[len(batch) :]

    def _batch_bound(self, sampling: Sampling) -> int:
        # Beam sampling draws inside `generate`; alone in its batch a row still has its own random numbers.
        return 1 if sampling.num_beams > 1 and sampling.do_sample else self._generate_search.slots

    def _same_length(self, sampling: Sampling) -> bool:
        """Whether padding would change what `generate` answers; processors that look back see pad tokens as said."""
        causal = not self._loaded.base.config.is_encoder_decoder
        return self._padding_changes_answers or (causal and sampling.looks_back)

    def _generate(self, rows: list[Row], sampling: Sampling, rule: FinishRule) -> None:
        """Fills in `new` and `finish` of rows that share a limit."""
        ids, mask = self._padded(rows)
        start = 1 if self._loaded.base.config.is_encoder_decoder else ids.shape[1]
        config = self._generation_config(sampling, rows[0].limit)
        extra: dict[str, Any] = {}
        if sampling.do_sample and not config.do_sample:
            extra["logits_processor"] = LogitsProcessorList([RowSampler(rows, sampling.warpers())])
        if rule.has_strings and sampling.num_beams == 1:
            extra["stopping_criteria"] = StoppingCriteriaList([StopRows(rows, rule, start)])
        if config.do_sample:
            with torch.random.fork_rng():
                torch.manual_seed(int(rows[0].uniform() * 2**53))
                output = self._call_generate(ids, mask, config, **extra)
        else:
            output = self._call_generate(ids, mask, config, **extra)
        for row, found in zip(rows, output[:, start:].tolist(), strict=True):
            rule.cut(row, found)

    def _generation_config(self, sampling: Sampling, limit: int) -> GenerationConfig:
        beams = sampling.num_beams > 1
        drawing = (
            {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
            }
            if beams and sampling.do_sample
            else {"do_sample": False}
        )
        return GenerationConfig(
            max_new_tokens=limit,
            min_new_tokens=sampling.min_new_tokens,
            num_beams=sampling.num_beams,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            eos_token_id=self._eos or None,
            pad_token_id=self._pad,
            **({"length_penalty": sampling.length_penalty} if beams else {}),
            **drawing,
        )

    @torch.inference_mode()
    def _call_generate(self, ids: Tensor, mask: Tensor, config: GenerationConfig, **extra: Any) -> Any:
        with warnings.catch_warnings():
            # PEFT drops the position ids that transformers computes, and says so each time.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return self._loaded.top.generate(input_ids=ids, attention_mask=mask, generation_config=config, **extra)

    def _padded(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 (rows, longest); on the left for causal models, on the right for an encoder."""
        width = max(len(row.prompt) for row in rows)
        right = self._loaded.base.config.is_encoder_decoder
        ids, mask = [], []
        for row in rows:
            n, gap = len(row.prompt), width - len(row.prompt)
            ids.append(row.prompt + [self._pad] * gap if right else [self._pad] * gap + row.prompt)
            mask.append([1] * n + [0] * gap if right else [0] * gap + [1] * n)
        device = self._loaded.base.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    # -- choosing the way

    def _chosen(self, rows: list[Row]) -> Plan:
        """Tries the faster ways on a few of the rows themselves, against the plain adapter under `generate`."""
        probe = _probe(rows)
        expected = [self._expected(row) for row in probe]
        loop = self._why_not_continuous()
        tokens, speed = self._tried(probe, continuous=loop is None)
        if loop is None and not self._agree(expected, tokens):
            loop = "its tokens differ from generate's"
            tokens, speed = self._tried(probe, continuous=False)
        if loop is not None and not self._agree(expected, tokens):
            self._padding_changes_answers = True
            _, speed = self._tried(probe, continuous=False)
        reasons = [] if loop is None else [f"batches of generate, for continuous batching can't be used: {loop}"]
        merged, merged_speed, reason = self._merged_if_better(probe, expected, speed, continuous=loop is None)
        reasons.append(reason)
        packed = False
        if can_pack(self._loaded.base):
            pack(self._loaded.base)
            tokens, _ = self._tried(probe, continuous=loop is None, timed=False)
            packed = self._agree(expected, tokens)
            if not packed:
                reasons.append("oneDNN's linear layers are not used: they pick other tokens")
                self._reload(merged)
        return Plan(merged, loop is None, packed, "; ".join(reasons), speed, merged_speed)

    def _why_not_continuous(self) -> str | None:
        base = self._loaded.base
        config = self._loaded.top.active_peft_config
        if config.is_prompt_learning and config.peft_type not in _PREFIX_METHODS:
            return f"{config.peft_type.value} starts from a filled cache"
        for name in LEFT_TO_GENERATE:
            if getattr(base.generation_config, name, None):
                return f"the model's generation_config sets {name}"
        return ContinuousDecoder.supports(base)

    def _merged_if_better(
        self, probe: list[Row], expected: list["_Expected"], speed: float, *, continuous: bool
    ) -> tuple[bool, float | None, str]:
        """Leaves the engine with the adapter merged or not; whether it is, the merged tokens a second, and why."""
        if self._merge == "never":
            return False, None, "not merged, as asked"
        why_not = self._merge_now()
        if why_not is not None:
            return False, None, f"not merged: {why_not}"
        tokens, merged_speed = self._tried(probe, continuous=continuous)
        figures = f"{merged_speed:.0f} tokens/s merged, {speed:.0f} not, on {len(probe)} prompts"
        if not self._agree(expected, tokens):
            self._reload(False)
            return False, merged_speed, f"not merged: the merged model picks other greedy tokens ({figures})"
        if self._merge == "auto" and merged_speed < speed:
            self._reload(False)
            return False, merged_speed, f"not merged: slower ({figures})"
        return True, merged_speed, f"merged: the same greedy tokens ({figures})"

    def _merge_now(self) -> str | None:
        """Merges, or says why this adapter can't be."""
        top, base, tokenizer = self._loaded.top, self._loaded.base, self._loaded.tokenizer
        if top.active_peft_config.is_prompt_learning:
            return "virtual tokens are no change of the weights"
        if getattr(base, "is_quantized", False):
            return "the base model is quantized"
        try:
            merged = top.merge_and_unload(safe_merge=True)
        except (NotImplementedError, ValueError, AttributeError) as error:
            # PEFT has no question to ask beforehand, and may have merged some of the layers by now.
            self._reload(False)
            return f"PEFT can't merge it ({error})"
        self._loaded = _Loaded(merged, merged, tokenizer)
        return None

    def _reload(self, merged: bool) -> None:
        del self._loaded
        clear_device_cache(garbage_collection=True)
        self._loaded = self._load_again()
        if merged:
            self._merge_now()

    def _tried(self, probe: list[Row], *, continuous: bool, timed: bool = True) -> tuple[list[list[int]], float]:
        """Greedy tokens of each probe row, and tokens a second. The first pass warms up and, two at a time, lets rows
        of unlike length share a batch and join it midway; the passes after it are timed, all rows at once."""
        sampling = _GREEDY
        rule = FinishRule(self.tokenizer, self._decoded, self._eos, ())

        def once(at_a_time: int) -> float:
            for row in probe:
                row.restart()
            started = time.perf_counter()
            if continuous:
                decoder = self._decoder()
                search = SlotSearch(first=at_a_time, most=at_a_time)
                chooser = Chooser(sampling, self._eos, decoder.device)
                for _ in decoder.decode(probe, choose=chooser, finish=rule, search=search):
                    pass
            else:
                waiting = probe
                while waiting:
                    batch = _alike(waiting, at_a_time, self._same_length(sampling))
                    self._generate(batch, sampling, rule)
                    waiting = waiting[len(batch) :]
            return time.perf_counter() - started

        seconds = once(2)
        tokens = [list(row.new) for row in probe]
        if timed:
            seconds = min(once(len(probe)) for _ in range(2))
        return tokens, sum(len(row.new) for row in probe) / seconds

    def _expected(self, row: Row) -> "_Expected":
        ids, mask = self._padded([row])
        config = self._generation_config(_GREEDY, row.limit)
        config.update(return_dict_in_generate=True, output_logits=True)
        output = self._call_generate(ids, mask, config)
        start = 1 if self._loaded.base.config.is_encoder_decoder else ids.shape[1]
        return _Expected(output.sequences[0, start:].tolist(), torch.stack(output.logits)[:, 0].float().cpu())

    def _agree(self, expected: Sequence["_Expected"], found: Sequence[list[int]]) -> bool:
        eps = torch.finfo(self._loaded.base.dtype).eps
        return all(agrees(one.tokens, one.logits, tokens, eps=eps) for one, tokens in zip(expected, found, strict=True))


_GREEDY = Sampling.of(GenerationSettings(), GenerationConfig())


@dataclass(frozen=True)
class _Expected:
    """What one row alone yields under `generate`; `logits`: float32, (tokens, vocabulary)."""

    tokens: list[int]
    logits: Tensor


def agrees(expected: Sequence[int], logits: Tensor, found: Sequence[int], *, eps: float) -> bool:
    """Whether greedy `found` is `expected`, or leaves it first where the model itself is undecided.

    `logits`, (tokens, vocabulary), are those that `expected` was picked by, and `eps` the machine epsilon of the dtype they
    were computed in. Undecided means that the two tokens' logits are no further apart than 4 eps of the largest logit:
    then rounding alone may pick either, and what follows may differ wholly.
    """
    for step, token in enumerate(expected):
        if step >= len(found):
            return False
        if found[step] != token:
            apart = logits[step, token] - logits[step, found[step]]
            return bool(apart <= 4 * eps * logits[step].abs().max())
    return len(found) == len(expected)


def _probe(rows: list[Row]) -> list[Row]:
    """A few of `rows`, from the longest to the shortest, with short answers."""
    ordered = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    last = len(ordered) - 1
    places = sorted({round(i * last / (_PROBE_ROWS - 1)) for i in range(_PROBE_ROWS)})
    return [
        Row(ordered[at].id, ordered[at].prompt[-_PROBE_PROMPT:], min(ordered[at].limit, _PROBE_TOKENS)) for at in places
    ]


def _alike(rows: Sequence[Row], most: int, same_length: bool) -> list[Row]:
    """The first of `rows` that `generate` can take together."""
    first = rows[0]
    found: list[Row] = []
    for row in rows[:most]:
        if row.limit != first.limit or (same_length and len(row.prompt) != len(first.prompt)):
            break
        found.append(row)
    return found


def _too_large(row: Row) -> Failure:
    return Failure(row.id, f"out of memory with this request alone ({len(row.prompt)} tokens, up to {row.limit} more)")
