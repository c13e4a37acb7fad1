"""Finds a data set's format from its columns and turns rows into examples: conversations, prompt-completion pairs, texts.

Pure: no files, no tokenizer. What a row lacks is told by RowError without the place, which the caller knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from kubepeft.errors import UserError

from .read import Row, RowError

Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]
Loss = Literal["completion", "all"]
FormatName = Literal["messages", "prompt-completion", "instruction", "text"]

LAST_TURN_ONLY = "lastTurnOnly"
"""The template renders earlier turns differently once later ones follow, so only the last turn could be learned from."""
OPEN_PROMPT = "openPrompt"
"""The template's generation prompt is not how it renders a finished answer (it opens a thinking block, say)."""

REQUIRED: dict[FormatName, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Columns that a row must have, in the order in which `auto` tries the formats."""
OPTIONAL: dict[FormatName, tuple[str, ...]] = {
    "messages": ("tools",),
    "prompt-completion": ("tools",),
    "instruction": ("input",),
    "text": (),
}
SHAREGPT = "conversations"
"""ShareGPT's name for `messages`, taken without a `columns` entry."""
OUR_COLUMNS = tuple(dict.fromkeys(name for table in (REQUIRED, OPTIONAL) for names in table.values() for name in names))

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca, for bases without a chat template. https://github.com/tatsu-lab/stanford_alpaca"""


class Conversation(NamedTuple):
    """`trained[i]` says whether message i carries loss; only assistant messages do."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None = None


class Pair(NamedTuple):
    prompt: str
    completion: str


class Text(NamedTuple):
    text: str


Example = Conversation | Pair | Text


@dataclass(frozen=True, slots=True)
class Format:
    """A format, where its columns lie in the user's rows (`theirs[ours]`), and why it was taken."""

    name: FormatName
    theirs: Mapping[str, str]
    why: str


def candidate_columns(renames: Mapping[str, str]) -> tuple[str, ...]:
    """Every column of the user's that any format could read. Raises UserError UnknownColumn for a rename to no column of ours."""
    for theirs, ours in renames.items():
        if ours not in OUR_COLUMNS:
            raise UserError(
                "UnknownColumn",
                f"columns maps {theirs!r} to {ours!r}, which no format reads{_nearest(ours, OUR_COLUMNS)}",
                where="spec.data.columns",
                mend=f"map your columns to some of {', '.join(OUR_COLUMNS)}",
            )
    return (*renames, *OUR_COLUMNS, SHAREGPT)


def find_format(wanted: str, renames: Mapping[str, str], found: Iterable[str], where: str) -> Format:
    """The format for rows with the columns `found`; `wanted` is a format's name or "auto".

    Raises UserError MissingColumn, which names the columns found and the nearest, and UnknownColumn.
    """
    candidate_columns(renames)
    columns = list(found)
    for theirs in renames:
        if theirs not in columns:
            raise UserError(
                "MissingColumn",
                f"spec.data.columns names {theirs!r}, but the columns are {_listed(columns)}{_nearest(theirs, columns)}",
                where=where,
                mend="correct spec.data.columns or the file",
            )
    named = {ours: theirs for theirs, ours in renames.items()}
    present = {
        ours: named.get(ours, ours)
        for ours in OUR_COLUMNS
        if ours in named or (ours in columns and ours not in renames)
    }
    if "messages" not in present and SHAREGPT in columns:
        present["messages"] = SHAREGPT

    def complete(name: FormatName) -> bool:
        return all(ours in present for ours in REQUIRED[name])

    def taken(name: FormatName, why: str) -> Format:
        # an optional column may be missing in this row and present in the next
        optional = {ours: named.get(ours, ours) for ours in OPTIONAL[name] if ours in named or ours not in renames}
        return Format(name, {ours: present[ours] for ours in REQUIRED[name]} | optional, why)

    if wanted == "auto":
        fitting = [name for name in REQUIRED if complete(name)]
        if fitting:
            has = " and ".join(repr(present[ours]) for ours in REQUIRED[fitting[0]])
            also = f"; they would fit {' and '.join(fitting[1:])} too" if len(fitting) > 1 else ""
            return taken(fitting[0], f"the rows have {has}{also}")
        hints = [
            _nearest(ours, [c for c in columns if c not in present]) for ours in OUR_COLUMNS if ours not in present
        ]
        hint = next((hint for hint in hints if hint), "")
        raise UserError(
            "MissingColumn",
            f"no format fits the columns {_listed(columns)}{hint}",
            where=where,
            mend="a format needs "
            + "; or ".join(" and ".join(names) for names in REQUIRED.values())
            + ". Where yours are named differently, map them: columns: {yours: ours}",
        )
    name: FormatName = next(name for name in REQUIRED if name == wanted)
    for ours in REQUIRED[name]:
        if ours not in present:
            other = next((f" (the rows look like format {other})" for other in REQUIRED if complete(other)), "")
            raise UserError(
                "MissingColumn",
                f"format {name} needs the column {ours!r}, but the columns are {_listed(columns)}{_nearest(ours, columns) or other}",
                where=where,
                mend=f"name it in spec.data.columns: {{yours: {ours}}}, or choose another format",
            )
    return taken(name, "the manifest says so")


def _listed(columns: Iterable[str]) -> str:
    shown = [repr(column) for column in columns]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "none"


def _nearest(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; the nearest to {name!r} is {near[0]!r}" if near and near[0] != name else ""


def to_example(row: Row, form: Format, chat: bool) -> Example:
    """Turns a row into an example. `chat`: the base has a chat template, so an instruction becomes a conversation.

    Raises RowError with the reason.
    """
    theirs = form.theirs
    for ours in REQUIRED[form.name]:
        if theirs[ours] not in row:
            raise RowError(_missing(row, form, theirs[ours]))
    match form.name:
        case "messages":
            return _conversation(row[theirs["messages"]], theirs["messages"], _tools(row, theirs))
        case "prompt-completion":
            return _pair(row, theirs)
        case "instruction":
            instruction = _string(row, theirs["instruction"])
            output = _string(row, theirs["output"])
            given = _string(row, theirs.get("input", ""), empty=True)
            if chat:
                asked = f"{instruction}\n\n{given}" if given else instruction
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
                return Conversation(messages, [False, True])
            return Pair((ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given), output)
        case "text":
            return Text(_string(row, theirs["text"]))


def _missing(row: Row, form: Format, column: str) -> str:
    others = [name for name, needed in REQUIRED.items() if name != form.name and all(ours in row for ours in needed)]
    looks = f"; it looks like format {others[0]}, while this data set is {form.name}" if others else ""
    return f"no {column!r}; the row has {_listed(row)}{_nearest(column, row)}{looks}"


def _string(row: Row, column: str, *, empty: bool = False) -> str:
    value = row.get(column)
    if type(value) is str:
        if value or empty:
            if value and not empty and value.isspace():
                raise RowError(f"{column!r} is blank")
            return value
        raise RowError(f"{column!r} is empty")
    if value is None:
        if empty:
            return ""
        raise RowError(f"{column!r} is null")
    raise RowError(f"{column!r} is {_kind(value)}, not a string")


def _kind(value: object) -> str:
    names = {
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _pair(row: Row, theirs: Mapping[str, str]) -> Pair | Conversation:
    prompt, completion = row[theirs["prompt"]], row[theirs["completion"]]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _conversation(prompt, theirs["prompt"], None, trains=False)
        after = _conversation(completion, theirs["completion"], _tools(row, theirs), follows=True)
        return Conversation(
            before.messages + after.messages, [False] * len(before.messages) + after.trained, after.tools
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError(
            f"{theirs['prompt']!r} is {_kind(prompt)} and {theirs['completion']!r} {_kind(completion)}; both must be the same"
        )
    prompt = "" if prompt == "" else _string(row, theirs["prompt"])  # an empty prompt is a choice, a blank one a slip
    return Pair(prompt, _string(row, theirs["completion"]))


def _parsed(value: object, column: str) -> object:
    """CSV and many Parquet files carry lists as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RowError(f"{column!r} is text that is not JSON: {error}") from None
    return value


def _tools(row: Row, theirs: Mapping[str, str]) -> list[dict[str, Any]] | None:
    column = theirs.get("tools", "")
    tools = _parsed(row.get(column), column)
    if tools is None or tools == "" or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{column!r} is {_kind(tools)}, not a list of tools (JSON schemas)")
    return tools


def _conversation(
    value: object,
    column: str,
    tools: list[dict[str, Any]] | None,
    *,
    trains: bool = True,
    follows: bool = False,
) -> Conversation:
    """An answer that opens the conversation (some ShareGPT sets have them) answers nothing, so it is context only."""
    value = _parsed(value, column)
    if not isinstance(value, list):
        raise RowError(f"{column!r} is {_kind(value)}, not a list of messages")
    if not value:
        raise RowError(f"{column!r} is empty")
    messages, trained = [], []
    for number, message in enumerate(value, 1):
        if type(message) is not dict:
            raise RowError(f"message {number} of {column!r} is {_kind(message)}, not an object with role and content")
        message, weight = _message(message, number, column)
        messages.append(message)
        trained.append(trains and weight and message["role"] == "assistant" and (follows or number > 1))
    if trains and not any(trained):
        raise RowError(f"no assistant message in {column!r} to learn from")
    return Conversation(messages, trained, tools)


def _message(message: dict[str, Any], number: int, column: str) -> tuple[dict[str, Any], bool]:
    """The message in OpenAI's form without `weight`, and whether its weight lets it carry loss."""
    at = f"message {number} of {column!r}"
    if "role" not in message and "from" in message:
        role = SHAREGPT_ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise RowError(f"{at} is from {message['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        message = {"role": role, "content": message.get("value"), "weight": message.get("weight")}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = _nearest(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{at} has role {role!r}; known are {', '.join(sorted(ROLES))}{hint}")
    content = message.get("content")
    calls = message.get("tool_calls")
    if isinstance(content, list):
        content = _joined(content, at)
        message = {**message, "content": content}
    if content is None:
        if role != "assistant" or not calls:
            raise RowError(f"{at} ({role}) has no content")
    elif type(content) is not str:
        raise RowError(f"{at}: content is {_kind(content)}, not a string")
    elif role == "assistant" and not calls and (not content or content.isspace()):
        raise RowError(f"{at} (assistant) is empty")
    if calls:
        message = {**message, "tool_calls": _tool_calls(calls, at)}
    if "weight" in message:
        weight = message["weight"]
        if weight not in (0, 1, None):
            raise RowError(f"{at} has weight {weight!r}, not 0 or 1")
        return {key: kept for key, kept in message.items() if key != "weight"}, weight != 0
    return message, True


def _joined(parts: list[Any], at: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise RowError(f"{at} has a content part of type {kind!r}; only text can be learned from")
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: object, at: str) -> list[dict[str, Any]]:
    """Arguments as an object: OpenAI writes them as JSON text, chat templates expect them parsed."""
    if not isinstance(calls, list):
        raise RowError(f"{at}: tool_calls is {_kind(calls)}, not a list")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{at} has a tool call without function and name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments or "{}")
            except orjson.JSONDecodeError as error:
                raise RowError(f"{at}: the arguments of tool call {function['name']!r} are not JSON: {error}") from None
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed
