"""Turns examples into token ids and says which of them carry loss, with the base's own tokenizer and chat template.

The rendered text is `tokenizer.apply_chat_template`'s, the ids are the tokenizer's; what is found here is where the loss lies.
A loss span (start, end) counts positions in `input_ids`: the tokens start … end-1 are targets. Position 0 is never one,
because nothing predicts it. Runs in workers; does not import torch, does not read files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kubepeft.errors import UserError

from .formats import LAST_TURN_ONLY, OPEN_PROMPT, Conversation, Example, Loss, Pair, Task, Text
from .read import RowError


class Encoded(NamedTuple):
    """`target` is the flat loss spans [start, end, …] for CAUSAL_LM and the label ids for SEQ_2_SEQ_LM."""

    ids: list[int]
    target: list[int]
    note: str = ""

    def loss_tokens(self, task: Task) -> int:
        if task == "SEQ_2_SEQ_LM":
            return len(self.target)
        return sum(self.target[1::2]) - sum(self.target[::2])


class _Rendered(NamedTuple):
    """A conversation as text; `spans` are character ranges that carry loss."""

    text: str
    spans: list[tuple[int, int]]
    note: str = ""


class Encoder:
    """Encodes examples in batches. `tokenizer`'s truncation and padding are switched off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, loss: Loss) -> None:
        self.tokenizer, self.task, self.loss = tokenizer, task, loss
        self._backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._prefix = self._added_in_front()
        self._anchors = [(anchor, ids) for anchor in ("\n", ":", "a") if (ids := self._ids([anchor])[0])]
        self._continues_plainly = all(
            self._ids([text])[0] == self._after_anchor(text) for text in ("b", " b", "1", "\nb", "é")
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """One result for each example, in order. Raises UserError NoChatTemplate and BrokenChatTemplate."""
        if not self.has_chat_template and any(isinstance(example, Conversation) for example in examples):
            raise UserError(
                "NoChatTemplate",
                "the rows are conversations, but the base's tokenizer has no chat template",
                where="spec.model",
                mend="use an instruction-tuned base, put a chat_template.jinja beside the base's tokenizer, "
                "or write the rows with the columns prompt and completion (format: prompt-completion)",
            )
        if self.task == "SEQ_2_SEQ_LM":
            return self._encode_seq2seq(examples)
        results: list[Encoded | RowError] = [RowError("not encoded")] * len(examples)
        groups: dict[type, list[int]] = {}
        for index, example in enumerate(examples):
            groups.setdefault(type(example), []).append(index)
        encoders: dict[type, Any] = {Conversation: self._conversations, Pair: self._pairs, Text: self._texts}
        for kind, indices in groups.items():
            for index, result in zip(indices, encoders[kind]([examples[i] for i in indices]), strict=True):
                results[index] = result
        return results

    # Texts and pairs

    def _texts(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        return [
            self._with_spans(ids, [(0, len(ids))])
            for ids in (self._closed(self._opened(ids)) for ids in self._ids([text.text for text in texts]))
        ]

    def _pairs(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """The prompt's ids are what generation sees, `tokenizer(prompt)`; the completion is tokenized as its continuation."""
        prompts = self._ids([pair.prompt for pair in pairs])
        completions = self._continuations([pair.completion for pair in pairs])
        results = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt, completion = self._opened(prompt), self._closed(completion)
            ids = prompt + completion
            results.append(self._with_spans(ids, [(0 if self.loss == "all" else len(prompt), len(ids))]))
        return results

    def _opened(self, ids: list[int]) -> list[int]:
        """With the tokens that the tokenizer puts in front (BOS), unless the text already begins with them."""
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _closed(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _with_spans(self, ids: list[int], spans: Sequence[tuple[int, int]], note: str = "") -> Encoded | RowError:
        flat: list[int] = []
        for start, end in spans:
            start = max(start, 1)
            if start < end:
                flat += (start, end)
        return Encoded(ids, flat, note) if flat else RowError("no token is left to learn from")

    # Conversations

    def _conversations(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        rendered = self._render_with_spans(conversations)
        good = [result for result in rendered if isinstance(result, _Rendered)]
        encoded = iter(self._encode_spans(good))
        return [next(encoded) if isinstance(result, _Rendered) else result for result in rendered]

    def _encode_spans(self, rendered: Sequence[_Rendered]) -> list[Encoded | RowError]:
        if self._backend is None:
            return [self._piecewise(text) for text in rendered]
        results = []
        encodings = self._backend.encode_batch([text.text for text in rendered], add_special_tokens=False)
        for text, encoding in zip(rendered, encodings, strict=True):
            spans = []
            for start, end in text.spans if len(encoding) else ():
                first = 0 if start == 0 else _border(encoding, start)
                if first is None:
                    results.append(self._piecewise(text))
                    break
                spans.append((first, len(encoding) if end == len(text.text) else _tokens_before(encoding, end)))
            else:
                results.append(self._with_spans(encoding.ids, spans, text.note))
        return results

    def _piecewise(self, rendered: _Rendered) -> Encoded | RowError:
        """Where a token would lie across the border of prompt and answer, they are tokenized apart, as generation does."""
        ids: list[int] = []
        spans, at = [], 0
        for start, end in rendered.spans:
            for piece in (rendered.text[at:start], rendered.text[start:end]):
                begin = len(ids)
                if piece:
                    ids += self._continuations([piece])[0] if ids else self._ids([piece])[0]
            spans.append((begin, len(ids)))
            at = end
        if rendered.text[at:]:
            ids += self._continuations([rendered.text[at:]])[0]
        return self._with_spans(ids, spans, rendered.note)

    def _render_with_spans(self, conversations: Sequence[Conversation]) -> list[_Rendered | RowError]:
        if self.loss == "all":
            whole = self._render([(c.messages, c.tools) for c in conversations], prompt=False)
            return [text if isinstance(text, RowError) else _Rendered(text, [(0, len(text))]) for text in whole]
        results: list[_Rendered | RowError | None] = [None] * len(conversations)
        unmarked = []
        for index, conversation in enumerate(conversations):
            if self._is_marked(conversation):
                results[index] = self._render_marked(conversation)
            else:
                unmarked.append(index)
        for index, result in zip(unmarked, self._render_prefixes([conversations[i] for i in unmarked]), strict=True):
            results[index] = result
        return results  # type: ignore[return-value]  # each is filled by one of the two

    def _render_prefixes(self, conversations: Sequence[Conversation]) -> list[_Rendered | RowError]:
        """An answer begins where the rendering of what is before it, with the generation prompt, ends."""
        prompts, wholes = [], []
        for messages, trained, tools in conversations:
            wholes.append((messages, tools))
            for index, learn in enumerate(trained):
                if learn:
                    prompts.append((messages[:index], tools))
                    if index + 1 < len(messages):
                        wholes.append((messages[: index + 1], tools))
        begun = iter(self._render(prompts, prompt=True))
        ended = iter(self._render(wholes, prompt=False))
        results: list[_Rendered | RowError] = []
        for messages, trained, tools in conversations:
            whole = next(ended)
            spans: list[tuple[int, int]] = []
            failure = whole if isinstance(whole, RowError) else None
            stable = True
            for index, learn in enumerate(trained):
                if learn:
                    before = next(begun)
                    after = next(ended) if index + 1 < len(messages) else whole
                    if isinstance(whole, str) and isinstance(before, str) and isinstance(after, str):
                        if not whole.startswith(after):  # Phi-3's template closes every text with EOS
                            after = after.removesuffix(self.tokenizer.eos_token or "")
                        stable &= whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)
                        spans.append((len(before), len(after)))
                    else:
                        stable = False  # a template may refuse a beginning that it takes as part of the whole
            if failure is not None:
                results.append(failure)
            elif stable and isinstance(whole, str):
                results.append(_Rendered(whole, spans))
            else:
                results.append(self._render_last_turn(messages, trained, tools))
        return results

    def _render_last_turn(
        self, messages: list[dict[str, Any]], trained: list[bool], tools: list[dict[str, Any]] | None
    ) -> _Rendered | RowError:
        last = len(trained) - 1 - trained[::-1].index(True)
        [whole, bare] = self._render([(messages[: last + 1], tools), (messages[:last], tools)], prompt=False)
        [before] = self._render([(messages[:last], tools)], prompt=True)
        for text in (whole, bare, before):
            if isinstance(text, RowError):
                return text
        assert isinstance(whole, str)
        assert isinstance(bare, str)
        assert isinstance(before, str)
        note = LAST_TURN_ONLY if sum(trained) > 1 or last + 1 < len(messages) else ""
        shared = _common_prefix(whole, before)
        if shared < len(before):
            note = OPEN_PROMPT
            if shared < len(bare.removesuffix(self.tokenizer.eos_token or "")):
                return RowError("the chat template renders the messages before the last answer differently without it")
        return _Rendered(whole, [(shared, len(whole))], note)

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        return self.tokenizer.get_chat_template(None, tools)

    def _is_marked(self, conversation: Conversation) -> bool:
        return _GENERATION.search(self._template(conversation.tools)) is not None

    def _render_marked(self, conversation: Conversation) -> _Rendered | RowError:
        """Spans by the template's own `{% generation %}` marks, one for each assistant message."""
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in conversation.messages
        ]
        try:
            [text], [marks] = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self._template(conversation.tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except _TEMPLATE_ERRORS as error:
            return _refused(error)
        answers = [
            learn
            for learn, message in zip(conversation.trained, messages, strict=True)
            if message["role"] == "assistant"
        ]
        if len(marks) != len(answers):
            if not all(answers):
                return RowError(
                    f"the chat template marks {len(marks)} answers, the row has {len(answers)}: weights cannot be applied"
                )
            answers = [True] * len(marks)
        return _Rendered(text, [mark for mark, learn in zip(marks, answers, strict=True) if learn])

    def _render(
        self, chats: Sequence[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]], *, prompt: bool
    ) -> list[str | RowError]:
        """`apply_chat_template` for many; those with tools, and all when one is refused, go one by one."""
        if all(tools is None for _, tools in chats):
            try:
                return (
                    list(
                        self.tokenizer.apply_chat_template(
                            [messages for messages, _ in chats], tokenize=False, add_generation_prompt=prompt
                        )
                    )
                    if chats
                    else []
                )
            except _TEMPLATE_ERRORS:
                pass  # found again below, with the row it belongs to
        results: list[str | RowError] = []
        for messages, tools in chats:
            try:
                results.append(
                    self.tokenizer.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                    )
                )
            except _TEMPLATE_ERRORS as error:
                results.append(_refused(error))
        return results

    # Encoder-decoder

    def _encode_seq2seq(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        results: list[Encoded | RowError] = []
        inputs, targets, good = [], [], []
        for index, example in enumerate(examples):
            results.append(RowError("format text has no target for an encoder-decoder"))
            if isinstance(example, Conversation):
                turn = self._render_last_turn(*example)
                if isinstance(turn, RowError):
                    results[index] = turn
                    continue
                border = turn.spans[0][0]
                example = Pair(turn.text[:border], turn.text[border:])
            if isinstance(example, Pair):
                inputs.append(example.prompt)
                targets.append(example.completion)
                good.append(index)
        if good:
            encoder_ids = self.tokenizer(inputs)["input_ids"]
            labels = self.tokenizer(text_target=targets)["input_ids"]
            for index, ids, target in zip(good, encoder_ids, labels, strict=True):
                results[index] = Encoded(self._closed(list(ids)), self._closed(list(target)))
        return results

    # The tokenizer

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens around them."""
        if self._backend is None:
            return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that follow other text: without the space that SentencePiece puts before a text's first word."""
        if self._continues_plainly:
            return self._ids(texts)
        return [self._after_anchor(text) for text in texts]

    def _after_anchor(self, text: str) -> list[int]:
        for anchor, ids in self._anchors:
            whole = self._ids([anchor + text])[0]
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._ids([text])[0]

    def _added_in_front(self) -> list[int]:
        bare = self._ids(["a"])[0]
        full = list(self.tokenizer(["a"])["input_ids"][0])
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at]


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template raises on a conversation it does not take: raise_exception, or an operation on a value that is missing."""


def _border(encoding: Any, at: int) -> int | None:
    """The token that begins at character `at`, right where the one before ends; None where a token lies across or a gap is left."""
    token = encoding.char_to_token(at)
    if (
        token is not None
        and encoding.token_to_chars(token)[0] == at
        and (token == 0 or encoding.token_to_chars(token - 1)[1] == at)
    ):
        return int(token)
    # a tokenizer that trims its offsets leaves the space before a word without a token: the word's own begins behind `at`
    starts, ends = zip(*encoding.offsets, strict=True)
    token = bisect_right(ends, at)
    return token if (token == 0 or ends[token - 1] == at) and (token == len(starts) or starts[token] >= at) else None


def _tokens_before(encoding: Any, at: int) -> int:
    """How many tokens end at or before character `at`."""
    border = _border(encoding, at)
    return bisect_right([end for _, end in encoding.offsets], at) if border is None else border


def _refused(error: Exception) -> RowError:
    if isinstance(error, jinja2.TemplateSyntaxError):
        raise UserError(
            "BrokenChatTemplate",
            f"the base's chat template does not compile: {error}",
            mend="use a base with a valid chat template",
        ) from None
    return RowError(f"the chat template refuses the conversation: {error}")


def _common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def fit(encoded: Encoded, max_length: int, task: Task, eos: int | None) -> Encoded | None:
    """The first `max_length` tokens; None where no loss is left.

    A completion that is cut does not end with EOS, so that nothing teaches the model to stop in mid-sentence.
    An encoder's input keeps its EOS; for SEQ_2_SEQ_LM input and labels are each cut to `max_length`.
    """
    if task == "SEQ_2_SEQ_LM":
        ids = encoded.ids
        if len(ids) > max_length:
            ids = [*ids[: max_length - 1], eos] if eos is not None and ids[-1] == eos else ids[:max_length]
        return Encoded(ids, encoded.target[:max_length], encoded.note)
    spans: list[int] = []
    for start, end in zip(encoded.target[::2], encoded.target[1::2], strict=True):
        if start < max_length:
            spans += (start, min(end, max_length))
    return Encoded(encoded.ids[:max_length], spans, encoded.note) if spans else None
