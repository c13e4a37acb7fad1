"""The lines that go into batch inference and the rows that come out of it.

Pure functions over bytes and dataclasses: no torch, no files, no clock. A bad line becomes a `BadLine` and the
next line is read; nothing here raises for what a user wrote.

Three forms of input line are read, one JSON object a line:

    {"id": "7", "prompt": "Once upon a time"}
    {"id": "7", "messages": [{"role": "user", "content": "Hello"}]}
    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 20}}

The third is the OpenAI batch format (https://platform.openai.com/docs/api-reference/batch/request-input). Other
fields beside "prompt" or "messages" are passed over, so a labelled data set can be answered as it is; a field of
an OpenAI body that would change the answer and is not done here makes the line bad.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
Json = dict[str, Any]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Role as written → role as the chat template sees it. OpenAI renamed "system" to "developer"; templates did not."""

_CHAT_URL = "/v1/chat/completions"
_TEXT_URL = "/v1/completions"


@dataclass(frozen=True)
class Overrides:
    """What one OpenAI batch line asks for in place of the run's generation settings. None: as the run has it."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated; the names and meanings are those of transformers' GenerationConfig.

    A None takes the value of the base model's own generation_config.json, and where that is silent too the
    warper is off. Decoding is greedy unless `do_sample` says otherwise, whatever the model's file says.
    `stop` strings end a completion and are cut from its text.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def overridden(self, overrides: Overrides) -> "GenerationSettings":
        """These settings with the fields that `overrides` names replaced."""
        given = {f.name: getattr(overrides, f.name) for f in fields(overrides)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class OpenAIEnvelope:
    """What of an OpenAI batch line its output row has to repeat."""

    url: str
    model: str | None


@dataclass(frozen=True)
class Request:
    """One thing to answer. Exactly one of `prompt` (continued as it is) and `messages` (chat template) is set."""

    id: str
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    overrides: Overrides = Overrides()
    openai: OpenAIEnvelope | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that is no request. `line` counts from 1; `id` is there when it could still be read."""

    file: str
    line: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class Completion:
    """An answer. `token_ids` are all that was generated, an end token and what `text` leaves out included.

    Virtual prompt tokens are not counted as tokens of the prompt.
    """

    id: str
    text: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Failure:
    """A request that reads well and cannot be answered, e.g. a prompt longer than the model's context."""

    id: str
    reason: str


Result = Completion | Failure


def read_requests(
    lines: Iterable[bytes], *, file: str, first_line: int = 1, seen: set[str] | None = None, prefix: str = ""
) -> Iterator[Request | BadLine]:
    """Reads JSON lines. Blank lines are passed over but counted; a line without an id is called "line-<n>".

    The first line with an id wins and each later one is bad. `seen` holds the ids met so far and is added to;
    hand the same set in for several files to keep ids unique over all of them, and another `prefix` for each, which
    goes before "line-<n>".
    """
    seen = set() if seen is None else seen
    for number, raw in enumerate(lines, start=first_line):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        found = parse_line(raw, file=file, line=number, prefix=prefix)
        if isinstance(found, Request):
            if found.id in seen:
                yield BadLine(file, number, found.id, f"the id {found.id!r} was used by an earlier line")
                continue
            seen.add(found.id)
        yield found


def parse_line(raw: bytes, *, file: str, line: int, prefix: str = "") -> Request | BadLine:
    """One line of input as a request, or why it is none."""
    try:
        row = _decode(raw)
    except _Bad as bad:
        return BadLine(file, line, None, str(bad))
    id_field = "custom_id" if "custom_id" in row else "id"
    try:
        id_ = _id(row.get(id_field), id_field) or f"{prefix}line-{line}"
    except _Bad as bad:
        return BadLine(file, line, None, str(bad))
    try:
        return _openai_request(id_, row) if "body" in row or id_field == "custom_id" else _request(id_, row)
    except _Bad as bad:
        return BadLine(file, line, id_, str(bad))


def completion_row(request: Request, completion: Completion, *, created: int) -> Json:
    """The output row of an answer; for an OpenAI batch line, the OpenAI batch output form.

    `created` is a Unix time in seconds and appears in the OpenAI form only.
    """
    if request.openai is None:
        return {
            "id": completion.id,
            "text": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "finish_reason": completion.finish_reason,
        }
    chat = request.openai.url == _CHAT_URL
    key = _key(completion.id)
    answer: Json = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
    body = {
        "id": f"chatcmpl-{key}" if chat else f"cmpl-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": request.openai.model,
        "choices": [{"index": 0, **answer, "logprobs": None, "finish_reason": completion.finish_reason}],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        },
    }
    return {
        "id": f"batch_req_{key}",
        "custom_id": completion.id,
        "response": {"status_code": 200, "request_id": f"req_{key}", "body": body},
        "error": None,
    }


def failure_row(request: Request, failure: Failure) -> Json:
    """The error row of a request that could not be answered, in the form its input line had."""
    if request.openai is None:
        return {"id": failure.id, "error": failure.reason}
    return {
        "id": f"batch_req_{_key(failure.id)}",
        "custom_id": failure.id,
        "response": None,
        "error": {"code": "invalid_request", "message": failure.reason},
    }


def bad_line_row(bad: BadLine) -> Json:
    """The error row of a line that is no request."""
    return {"file": bad.file, "line": bad.line, "id": bad.id, "error": bad.reason}


class _Bad(Exception):
    """Why a line is no request; never leaves this file."""


def _decode(raw: bytes) -> Json:
    if b"\x00" in raw:
        raise _Bad("the line holds a NUL byte")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}") from None
    try:
        row = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError):
        raise _Bad("not readable JSON: nested too deeply, or a number of thousands of digits") from None
    if not isinstance(row, dict):
        raise _Bad(f"a JSON object was expected, found {_kind(row)}")
    return row


def _no_constant(name: str) -> None:
    raise _Bad(f"not JSON: {name} is no JSON number")


def _request(id_: str, row: Json) -> Request:
    if ("prompt" in row) == ("messages" in row):
        raise _Bad('one of "prompt" and "messages" is needed' + (", not both" if "prompt" in row else ""))
    if "prompt" in row:
        return Request(id_, prompt=_text(row["prompt"], "prompt"))
    return Request(id_, messages=_messages(row["messages"]))


def _openai_request(id_: str, row: Json) -> Request:
    if row.get("method", "POST") != "POST":
        raise _Bad(f'method: "POST" was expected, found {row["method"]!r}')
    body = row.get("body")
    if not isinstance(body, dict):
        raise _Bad(f"body: an object was expected, found {_kind(body)}")
    chat = "messages" in body
    if chat == ("prompt" in body):
        raise _Bad('body: one of "messages" and "prompt" is needed' + (", not both" if chat else ""))
    url = row.get("url", _CHAT_URL if chat else _TEXT_URL)
    if url != (_CHAT_URL if chat else _TEXT_URL):
        raise _Bad(f"url: {_CHAT_URL} takes messages and {_TEXT_URL} takes a prompt, found {url!r}")
    for name, harmless in _UNSUPPORTED.items():
        if body.get(name) not in (None, *harmless):
            raise _Bad(f"body.{name}: {body[name]!r} is not supported")
    _only(body, _SUPPORTED | _UNSUPPORTED.keys(), "body.")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _Bad(f"body.model: a string was expected, found {_kind(model)}")
    return Request(
        id_,
        prompt=None if chat else _text(body["prompt"], "body.prompt"),
        messages=_messages(body["messages"], "body.") if chat else None,
        overrides=_overrides(body),
        openai=OpenAIEnvelope(url, model),
    )


_SUPPORTED = frozenset(
    [
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "user",
        "metadata",
    ]
)
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False, True),
}
"""Fields that change an answer in ways that are not done here, with the values that change nothing."""


def _overrides(body: Json) -> Overrides:
    temperature = _number(body, "temperature", 0, 2)
    limit = _integer(body, "max_completion_tokens", 1)
    stop = body.get("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is not None and not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)):
        raise _Bad("body.stop: a string or a list of non-empty strings was expected")
    return Overrides(
        max_new_tokens=_integer(body, "max_tokens", 1) if limit is None else limit,
        do_sample=None if temperature is None else temperature > 0,
        temperature=temperature or None,
        top_p=_number(body, "top_p", 0, 1, above_low=True),
        seed=_integer(body, "seed", None),
        stop=None if stop is None else tuple(stop),
    )


def _messages(value: object, at: str = "") -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Bad(f"{at}messages: a list with at least one message was expected, found {_kind(value)}")
    return tuple(_message(item, f"{at}messages[{index}]") for index, item in enumerate(value))


def _message(value: object, at: str) -> Message:
    if not isinstance(value, dict):
        raise _Bad(f"{at}: an object was expected, found {_kind(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _Bad(f"{at}.role: one of {', '.join(_ROLES)} was expected, found {role!r}")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{at}.content[{index}]") for index, part in enumerate(content))
    _only(value, {"role", "content", "name", "refusal"}, f"{at}.")
    return Message(_ROLES[role], _text(content, f"{at}.content"))


def _text_part(part: object, at: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise _Bad(f"{at}: only parts of type text can be answered")
    return _text(part.get("text"), f"{at}.text")


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{at}: a string was expected, found {_kind(value)}")
    if not value.isprintable() and ("\x00" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise _Bad(f"{at}: holds a NUL or a lone surrogate, which no tokenizer can read")
    return value


def _id(value: object, at: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(value, at)
    if not text:
        raise _Bad(f"{at}: an empty string names nothing")
    return text


def _number(body: Json, name: str, low: float, high: float, *, above_low: bool = False) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        raise _Bad(
            f"body.{name}: a number {'above' if above_low else 'from'} {low} to {high} was expected, found {value!r}"
        )
    return float(value)


def _integer(body: Json, name: str, low: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        raise _Bad(f"body.{name}: a whole number{'' if low is None else f' from {low}'} was expected, found {value!r}")
    return value


def _only(row: Json, known: Iterable[str], at: str) -> None:
    unknown = sorted(row.keys() - set(known))
    if unknown:
        raise _Bad(f"{at}{unknown[0]}: unknown field")


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    names: dict[type, str] = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names[type(value)]


def _key(id_: str) -> str:
    """A name for OpenAI's own id fields that is the same in every run."""
    return hashlib.sha256(id_.encode()).hexdigest()[:24]
