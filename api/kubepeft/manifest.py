"""From YAML text to typed objects, with errors that name the line, the field and the mend.

Reads text only; opening files is the caller's. YAML is read as the API server reads it: `2e-4` is a number, a key given twice is refused,
and a field set to nothing counts as not given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kubepeft.errors import UserError
from kubepeft.types import API_VERSION, KINDS, Object
from kubepeft.types.base import LOCAL

Loc = tuple[str | int, ...]


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader that reads 2e-4 as a number, as JSON and YAML 1.2 do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(text: str, source: str, *, local: bool) -> list[Object]:
    """The FineTune and BatchInference documents of a YAML (or JSON) text, in order.

    Args:
        text: one or more YAML documents; empty ones are passed over.
        source: what to call the text in errors, such as a file name.
        local: whether file:// and plain paths are allowed (`kubepeft run`).
    Raises:
        UserError: reason BadManifest, with a line for every mistake found.
    """
    found: list[Object] = []
    mistakes: list[str] = []
    for node in _documents(text, source):
        lines = _Lines(source)
        data = lines.read(node)
        mistakes += lines.mistakes
        if data is None:
            continue
        if not isinstance(data, dict):
            mistakes.append(f"{lines.at(())}: expected a mapping with apiVersion, kind, metadata and spec")
            continue
        kind = KINDS.get(data.get("kind", ""))
        if kind is None:
            mistakes.append(
                f"{lines.at(('kind',))}: kind: expected {' or '.join(KINDS)}, found {data.get('kind')!r}{_nearest(data.get('kind'), KINDS)}"
            )
            continue
        if data.get("apiVersion") != API_VERSION:
            mistakes.append(
                f"{lines.at(('apiVersion',))}: apiVersion: expected {API_VERSION}, found {data.get('apiVersion')!r}"
            )
            continue
        try:
            found.append(kind.model_validate(data, context=LOCAL if local else None))
        except ValidationError as error:
            mistakes += [f"{lines.at(loc)}: {words}" for loc, words in explain(error, kind)]
    if mistakes:
        count = "the mistake" if len(mistakes) == 1 else f"the {len(mistakes)} mistakes"
        raise UserError("BadManifest", "\n".join(mistakes), mend=f"mend {count} above and try again")
    if not found:
        raise UserError("BadManifest", "no document in it", where=source, mend="write a FineTune or BatchInference")
    return found


def explain(error: ValidationError, kind: type[BaseModel]) -> Iterator[tuple[Loc, str]]:
    """Each mistake as (where, words): the field, what was expected, what was found, what to do."""
    for mistake in error.errors(include_url=False):
        loc = tuple(part for part in mistake["loc"] if part != "[key]")
        yield loc, f"{_dotted(loc)}: {_words(mistake, kind, loc)}"


def _words(mistake: Any, kind: type[BaseModel], loc: Loc) -> str:
    what, value = mistake["type"], mistake["input"]
    if what == "extra_forbidden":
        known = _fields_at(kind, loc[:-1])
        listed = f"; known here: {', '.join(sorted(known))}"
        return f"unknown field{_nearest(loc[-1], known) or listed}"
    if what == "missing":
        return "must be given"
    if what == "value_error":
        shown = f", found {value!r}" if isinstance(value, str | int | float) else ""
        return f"{mistake['ctx']['error']}{shown}"
    if what in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", mistake["ctx"]["expected"])
        return f"expected {mistake['ctx']['expected']}, found {value!r}{_nearest(value, choices)}"
    text = (
        mistake["msg"]
        .replace("Input should be ", "expected ")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    if what.endswith(("_type", "_parsing")):
        quoted = " (write it in quotes)" if what == "string_type" and isinstance(value, bool | int | float) else ""
        unquoted = (
            " (write it without quotes)"
            if what in ("int_type", "float_type", "bool_type") and isinstance(value, str)
            else ""
        )
        return f"{text}, found {_shown(value)}{quoted}{unquoted}"
    return f"{text}, found {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _nearest(word: Any, known: Any) -> str:
    """A suggestion such as " (did you mean packing?)", or nothing."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower().replace("_", ""), lowered, n=1, cutoff=0.6)
    return f" (did you mean {lowered[close[0]]}?)" if close else ""


def _dotted(loc: Loc) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "the document"


def _fields_at(kind: type[BaseModel], loc: Loc) -> list[str]:
    """The names that the type at this place of `kind` knows."""
    model: Any = kind
    for part in loc:
        if isinstance(part, int):
            continue
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        model = _model_in(field.annotation) if field else None
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found:
            return found
    return None


def _documents(text: str, source: str) -> Iterator[yaml.Node | None]:
    try:
        yield from yaml.compose_all(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(
            "BadManifest", f"not YAML: {problem}", where=f"{source}{line}", mend="mend the YAML there"
        ) from None


class _Lines:
    """Reads one YAML document into plain data and remembers on which line each field stands."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.mistakes: list[str] = []
        self._line: dict[Loc, int] = {}

    def at(self, loc: Loc) -> str:
        """`source:line` of the field, or of the nearest one around it."""
        while loc and loc not in self._line:
            loc = loc[:-1]
        return f"{self.source}:{self._line.get(loc, 1)}"

    def read(self, node: yaml.Node | None, loc: Loc = ()) -> Any:
        """Plain data; keys with no value are left out, as the API server leaves them out."""
        if node is None:
            return None
        self._line.setdefault(loc, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value
                if not isinstance(key, str) or key_node.tag == "tag:yaml.org,2002:merge":
                    self.mistakes.append(f"{self.source}:{key_node.start_mark.line + 1}: expected a plain name as key")
                    continue
                self._line[(*loc, key)] = key_node.start_mark.line + 1
                if key in out:
                    self.mistakes.append(f"{self.at((*loc, key))}: {_dotted((*loc, key))}: given twice")
                value = self.read(value_node, (*loc, key))
                if value is not None:
                    out[key] = value
            return out
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*loc, index)) for index, item in enumerate(node.value)]
        return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        value = loader.construct_object(node)
    finally:
        loader.dispose()
    return value if isinstance(value, str | int | float | bool | None) else node.value
