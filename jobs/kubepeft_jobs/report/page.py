"""Draws ReportData as one HTML document: `render`. What it says and how figures are worded is here, how it looks is in page.html.

The document takes nothing from outside and runs no script. Everything in it that came from data or a manifest goes through the
template's escaping: no markup may be made in this file. No I/O but reading the template.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from .chart import BarChart, LineChart, Point, Reference, Series, histogram, is_number, line_chart, share
from .data import ReportData, Sample

SHOWN_SAMPLES = 6
"""Samples that are open at once; the rest is folded away."""
MAX_SAMPLES = 60
MAX_TEXT = 4000
"""Characters shown of one text of a sample."""
MAX_ROWS = 40
"""Rows of the table behind the curves."""
MAX_BAD_ROWS = 20
MAX_FILES = 5
MISSING = "–"
_NARROW_SPACE = "\u202f"

_AUTO_CLASS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoPeftModelForSeq2SeqLM"),
}
_SPLITS = (("training", "train"), ("evaluation", "eval"))
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    """What the upright axis counts."""
    chart: LineChart
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Verdict:
    """The result in one sentence. `tone` is good, bad or plain."""

    tone: str
    sentence: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class LossBar:
    label: str
    colour: str
    width: float
    """Percent of the larger one."""
    loss: str
    perplexity: str


@dataclass(frozen=True)
class Answer:
    """One text of a sample as it is shown; `mark` is True or False where it can be compared with the expected one."""

    label: str
    text: str
    cut: str
    mark: bool | None = None


@dataclass(frozen=True)
class Snippet:
    title: str
    code: str
    note: str = ""


def render(data: ReportData) -> str:
    """The report as a self-contained HTML document, at most a few hundred kilobytes, to be written as UTF-8.

    Parts without data are left out, and values that are missing or not finite are shown as such.
    """
    prepared = data.prepared
    history = [entry for entry in data.history if is_number(entry.get("step"))]
    return _template().render(
        data=data,
        verdict=_verdict(data, history),
        matches=_matches(data.samples),
        figures=_figures(data, history),
        loss_chart=_loss_chart(data, history),
        charts=[
            chart
            for chart in (_rate_chart(history), _gradient_chart(history), _throughput_chart(history, data))
            if chart
        ],
        numbers=_numbers(history),
        loss_bars=_loss_bars(data),
        lengths=_length_chart(prepared),
        length_figures=_length_figures(prepared),
        samples=[_answers(sample) for sample in data.samples[:MAX_SAMPLES]],
        samples_open=SHOWN_SAMPLES,
        samples_left_out=max(0, len(data.samples) - MAX_SAMPLES),
        splits=_splits(prepared),
        data_facts=_data_facts(prepared, data),
        data_notes=[str(note) for note in _list(prepared.get("notes"))],
        bad_rows=[row for row in _list(prepared.get("bad_rows"))[:MAX_BAD_ROWS] if isinstance(row, Mapping)],
        method_facts=_method_facts(data.method_config),
        lineage=_flat(data.lineage),
        snippets=_snippets(data),
        count=count,
        moment=moment,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def printable(value: object) -> object:
    """A text without what HTML and UTF-8 cannot hold: control characters become their pictures, lone surrogates U+FFFD."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNPRINTABLE.sub(lambda match: _picture(ord(match.group())), value)
    return value


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def number(value: object, digits: int = 4) -> str:
    """A measurement in `digits` significant digits; MISSING, "NaN" or "∞" where it is none."""
    if not isinstance(value, int | float):
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def count(value: object) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}" if isinstance(value, int | float) and is_number(value) else number(value)


def compact(value: object) -> str:
    """A count in three digits: 942, 12.3 k, 1.08 M, 7.62 G."""
    if not isinstance(value, int | float) or not is_number(value):
        return number(value)
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{_three_digits(value / (1e3 if letter == 'k' else factor))}{_NARROW_SPACE}{letter}"
    return count(value)


def size(octets: object) -> str:
    """Bytes, in the units of storage bills (1 MB is 10⁶ bytes)."""
    if not isinstance(octets, int | float) or not is_number(octets):
        return number(octets)
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if octets >= factor:
            return f"{_three_digits(octets / factor)}{_NARROW_SPACE}{unit}"
    return f"{octets:.0f}{_NARROW_SPACE}B"


def duration(seconds: object) -> str:
    """A time in its two largest units."""
    if not isinstance(seconds, int | float) or not is_number(seconds) or seconds < 0:
        return number(seconds)
    if seconds < 60:
        return f"{_three_digits(seconds) if seconds < 10 else f'{seconds:.0f}'}{_NARROW_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NARROW_SPACE}min {rest}{_NARROW_SPACE}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{_NARROW_SPACE}h {minutes}{_NARROW_SPACE}min"
    return f"{hours // 24}{_NARROW_SPACE}d {hours % 24}{_NARROW_SPACE}h"


def moment(timestamp: str) -> str:
    """An RFC 3339 time in UTC to the minute, as people write it; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d(\.\d+)?Z", timestamp)
    return f"{found[1]} {found[2]} UTC" if found else timestamp


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _verdict(data: ReportData, history: Sequence[Mapping[str, Any]]) -> Verdict:
    base, adapter = data.base_eval_loss, data.eval_loss
    before, after = number(base), number(adapter)
    if adapter is None:
        losses = [entry["loss"] for entry in history if is_number(entry.get("loss"))]
        course = (
            f"Training loss went from {number(losses[0])} to {number(losses[-1])} nats per token. "
            if len(losses) > 1
            else ""
        )
        return Verdict("plain", f"{course}There was no evaluation data to judge the adapter by.")
    if not is_number(adapter):
        return Verdict(
            "bad",
            f"The evaluation loss with the adapter is {after}: it is broken, most likely by too high a learning rate.",
        )
    if base is None or not is_number(base) or base <= 0:
        return Verdict("plain", f"Evaluation loss with the adapter is {after} nats per token.")
    if before == after:
        return Verdict(
            "plain",
            f"Evaluation loss stayed at {after} nats per token: the adapter is no better than its base.",
            before,
            after,
        )
    course, change = f"from {before} (base) to {after} (adapter) nats per token", share(abs(base - adapter), base)
    if adapter < base:
        return Verdict("good", f"Evaluation loss fell {course}, {change} less.", before, after)
    return Verdict(
        "bad", f"Evaluation loss rose {course}, {change} more: the adapter is worse than its base.", before, after
    )


def _matches(samples: Sequence[Sample]) -> tuple[int, int, int] | None:
    """Of the samples that have an expected answer: how many the base meets, how many the adapter, how many there are."""
    judged = [sample for sample in samples if sample.expected.strip()]
    if not judged:
        return None
    before = sum(_equal(sample.before, sample.expected) for sample in judged)
    after = sum(_equal(sample.after, sample.expected) for sample in judged)
    return before, after, len(judged)


def _equal(answer: str, expected: str) -> bool:
    return answer.strip() == expected.strip()


def _figures(data: ReportData, history: Sequence[Mapping[str, Any]]) -> list[Figure]:
    figures = []
    trainable, total = data.trainable_parameters, data.total_parameters
    of_all = (
        f"{share(trainable, total)} of {compact(total)}"
        if is_number(trainable) and is_number(total) and total > 0
        else ""
    )
    figures.append(Figure("trainable parameters", compact(trainable), of_all))
    of_base = ""
    if is_number(data.base_bytes) and is_number(data.adapter_bytes) and data.base_bytes > 0:
        of_base = f"{share(data.adapter_bytes, data.base_bytes)} of the base's {size(data.base_bytes)}"
    figures.append(Figure("adapter size", size(data.adapter_bytes), of_base))
    steps, epochs = _last(history, "step"), _last(history, "epoch")
    if steps is not None:
        passes = "" if epochs is None else "1 epoch" if epochs == 1 else f"{number(round(epochs, 2))} epochs"
        figures.append(Figure("optimizer steps", count(steps), passes))
    tokens = _dict(data.prepared.get("train")).get("tokens")
    if isinstance(tokens, int | float) and is_number(tokens):
        trained = tokens * epochs if epochs is not None else tokens
        figures.append(Figure("tokens trained on", compact(round(trained)), f"{compact(tokens)} in the data"))
    figures.append(Figure("wall time", duration(data.seconds)))
    speeds = [entry["tokens_per_second"] for entry in history if is_number(entry.get("tokens_per_second"))]
    if speeds:
        figures.append(Figure("tokens per second", compact(round(median(speeds))), "median while training"))
    return figures


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    by_step = {entry["step"]: entry for entry in history if isinstance(entry.get(key), int | float)}
    return [Point(step, entry[key], _where(entry)) for step, entry in sorted(by_step.items())]


def _where(entry: Mapping[str, Any]) -> str:
    epoch = entry.get("epoch")
    return f"step {count(entry['step'])}" + (f" (epoch {epoch:.2f})" if is_number(epoch) and epoch is not None else "")


def _loss_chart(data: ReportData, history: Sequence[Mapping[str, Any]]) -> Chart | None:
    train, evaluation = _points(history, "loss"), _points(history, "eval_loss")
    base = data.base_eval_loss
    chart = line_chart(
        [
            Series("training loss", "blue", train),
            Series("evaluation loss", "orange", evaluation, marked=len(evaluation) <= 60),
        ],
        unit="",
        references=[Reference(f"base {number(base)}", base)] if base is not None else [],
        marks=[(attempt.from_step, "resumed") for attempt in data.attempts],
        may_be_logarithmic=True,
    )
    if chart is None:
        return None
    warning = _not_finite(train, "training loss") or _not_finite(evaluation, "evaluation loss")
    return Chart("Loss", "nats per token", chart, _thinned(chart), warning)


def _rate_chart(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    points = _points(history, "learning_rate")
    chart = line_chart([Series("learning rate", "blue", points)], unit="", from_zero=True)
    return None if chart is None else Chart("Learning rate", "", chart)


def _gradient_chart(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    points = _points(history, "grad_norm")
    chart = line_chart([Series("gradient norm", "blue", points)], unit="", may_be_logarithmic=True)
    return (
        None
        if chart is None
        else Chart("Gradient norm", "before clipping", chart, warning=_not_finite(points, "gradient norm"))
    )


def _throughput_chart(history: Sequence[Mapping[str, Any]], data: ReportData) -> Chart | None:
    points = _points(history, "tokens_per_second")
    chart = line_chart(
        [Series("throughput", "blue", points)],
        unit=" tokens/s",
        from_zero=True,
        marks=[(attempt.from_step, "resumed") for attempt in data.attempts],
    )
    return None if chart is None else Chart("Throughput", "tokens per second", chart)


def _thinned(chart: LineChart) -> str:
    if chart.merged == 1:
        return ""
    return f"The line shows means of {chart.merged} logged values each, the shade their range."


def _not_finite(points: Sequence[Point], name: str) -> str:
    bad = [point for point in points if not is_number(point.y)]
    if not bad:
        return ""
    times = "once" if len(bad) == 1 else f"{count(len(bad))} times"
    return f"The {name} was NaN or infinite {times}, first at {bad[0].where}."


def _numbers(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of step, epoch, training loss, evaluation loss, learning rate, tokens/s: the evaluations, or without any the log thinned out."""
    shown = ("loss", "eval_loss", "learning_rate", "tokens_per_second")
    rows: dict[float, dict[str, Any]] = {}
    for entry in history:
        kept = {key: entry[key] for key in ("epoch", *shown) if isinstance(entry.get(key), int | float)}
        if kept.keys() & set(shown):
            rows.setdefault(entry["step"], {}).update(kept)
    ordered = sorted(rows.items())
    chosen = [row for row in ordered if "eval_loss" in row[1]] or ordered
    every = -(-len(chosen) // MAX_ROWS) or 1
    chosen = chosen[::-1][::every][::-1]  # the last is always among them
    return [[count(step), *(number(row.get(key)) for key in ("epoch", *shown))] for step, row in chosen]


def _loss_bars(data: ReportData) -> list[LossBar]:
    before, after = data.base_eval_loss, data.eval_loss
    if before is None or after is None or not is_number(before) or not is_number(after):
        return []
    largest = max(before, after)
    return [
        LossBar(
            label,
            colour,
            round(100 * max(0.0, loss) / largest, 2) if largest > 0 else 0.0,
            number(loss),
            _perplexity(loss),
        )
        for label, colour, loss in (("base", "grey", before), ("adapter", "orange", after))
    ]


def _perplexity(loss: float) -> str:
    return number(math.exp(loss), 3) if loss < 20 else f"e^{number(loss)}"


def _length_chart(prepared: Mapping[str, Any]) -> BarChart | None:
    lengths = _dict(prepared.get("lengths"))
    limit = prepared.get("max_length")
    return histogram(
        _list(lengths.get("edges")),
        _list(lengths.get("counts")),
        thing="rows",
        limit=limit if is_number(limit) else None,
        limit_label=f"maxLength {count(limit)}",
    )


def _length_figures(prepared: Mapping[str, Any]) -> list[Figure]:
    lengths = _dict(prepared.get("lengths"))
    named = (("mean", "mean"), ("median", "p50"), ("90 % below", "p90"), ("99 % below", "p99"), ("longest", "longest"))
    figures = [Figure(label, count(lengths[key])) for label, key in named if is_number(lengths.get(key))]
    outcomes = (("truncated", "rows_truncated"), ("dropped, too long", "rows_dropped_too_long"))
    return figures + [Figure(label, count(prepared[key])) for label, key in outcomes if is_number(prepared.get(key))]


def _answers(sample: Sample) -> list[Answer]:
    judged = bool(sample.expected.strip())
    answers = [
        _shown(label, text, _equal(text, sample.expected) if judged else None)
        for label, text in (("base", sample.before), ("adapter", sample.after))
    ]
    return [_shown("prompt", sample.prompt), *([_shown("expected", sample.expected)] if judged else []), *answers]


def _shown(label: str, text: str, mark: bool | None = None) -> Answer:
    left_out = len(text) - MAX_TEXT
    return Answer(label, text[:MAX_TEXT], f"… {count(left_out)} more characters" if left_out > 0 else "", mark)


def _splits(prepared: Mapping[str, Any]) -> list[list[str]]:
    """Rows of split, rows, tokens, tokens with loss."""
    splits = [(name, _dict(prepared.get(key))) for name, key in _SPLITS]
    return [
        [name, *(count(split.get(column)) for column in ("rows", "tokens", "loss_tokens"))]
        for name, split in splits
        if split
    ]


def _files(prepared: Mapping[str, Any]) -> list[Figure]:
    found = []
    for name, key in _SPLITS:
        files = [str(file) for file in _list(_dict(prepared.get(key)).get("files"))]
        if files:
            more = f"and {count(len(files) - MAX_FILES)} more" if len(files) > MAX_FILES else ""
            found.append(Figure(f"{name} files", ", ".join(files[:MAX_FILES]), more))
    return found


def _data_facts(prepared: Mapping[str, Any], data: ReportData) -> list[Figure]:
    facts = _files(prepared)
    if prepared.get("format"):
        facts.append(Figure("format", str(prepared["format"]), str(prepared.get("format_why") or "")))
    columns = _dict(prepared.get("columns"))
    if columns:
        facts.append(
            Figure(
                "columns",
                ", ".join(ours if ours == theirs else f"{ours} from {theirs}" for ours, theirs in columns.items()),
            )
        )
    if prepared.get("loss"):
        facts.append(Figure("loss on", str(prepared["loss"])))
    if data.packing:
        facts.append(Figure("batches", data.packing))
    named = (
        ("rows read", "rows_read"),
        ("rows kept", "rows_kept"),
        ("rows refused as bad", "rows_bad"),
        ("rows dropped, too long", "rows_dropped_too_long"),
        ("rows dropped, no answer left within maxLength", "rows_dropped_no_loss"),
        ("rows truncated", "rows_truncated"),
    )
    return facts + [Figure(label, count(prepared[key])) for label, key in named if is_number(prepared.get(key))]


def _method_facts(config: Mapping[str, Any]) -> list[Figure]:
    """The adapter's configuration without the fields that say nothing: None, and empty lists, mappings and texts."""
    return [
        Figure(str(key), _value(value))
        for key, value in config.items()
        if value is not None and value not in ([], {}, "")
    ]


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(item, str | int) for item in value):
        return ", ".join(sorted(map(str, value)) if isinstance(value, set | frozenset) else map(str, value))
    return json.dumps(value, ensure_ascii=False, default=str)


def _flat(lineage: Mapping[str, Any], before: str = "") -> list[Figure]:
    rows: list[Figure] = []
    for key, value in lineage.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        elif value is not None:
            rows.append(Figure(f"{before}{key}", _value(value)))
    return rows


def _snippets(data: ReportData) -> list[Snippet]:
    model_class, peft_class = _AUTO_CLASS.get(data.task, _AUTO_CLASS["CAUSAL_LM"])
    folder, fetch = _local(data.adapter_uri, "adapter")
    base, fetch_base = _local(data.base, "base")
    named = "://" in data.base
    commands = [command for command in (fetch, fetch_base if named else "") if command]
    lines = [f"from peft import {'PeftModel' if named else peft_class}"]
    lines += [f"from transformers import {model_class + ', ' if named else ''}AutoTokenizer", ""]
    lines += [f"folder = {_literal(folder)}", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if named:
        lines += [
            f"base = {model_class}.from_pretrained({_literal(base)})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    else:
        lines.append(f"model = {peft_class}.from_pretrained(folder)")
    lines.append("")
    if _dict(data.prepared).get("format") == "messages":
        lines += [
            'messages = [{"role": "user", "content": "…"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    else:
        lines.append('inputs = tokenizer("…", return_tensors="pt")')
    lines.append("output = model.generate(**inputs, max_new_tokens=100)[0]")
    new = "output" if data.task == "SEQ_2_SEQ_LM" else 'output[inputs["input_ids"].shape[1]:]'
    lines.append(f"print(tokenizer.decode({new}, skip_special_tokens=True))")
    snippets = [Snippet("Fetch the files", "\n".join(commands))] if commands else []
    snippets.append(Snippet("With PEFT", "\n".join(lines)))
    manifest = (
        "apiVersion: kubepeft.io/v1alpha1\nkind: BatchInference\n"
        f"metadata: {{name: {_yaml(data.name[:40].rstrip('-.') + '-answers')}}}\n"
        f"spec:\n  adapter: {{uri: {_yaml(data.adapter_uri)}}}\n  input: prompts.jsonl\n"
    )
    note = "With kubepeft run on one machine, or with kubectl apply where the input lies in a bucket."
    snippets.append(Snippet("In batch", manifest + "  maxNewTokens: 100", note))
    return snippets


def _local(uri: str, folder: str) -> tuple[str, str]:
    """Where code finds what the URI means, and the command that brings it there, if one is needed."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri, ""
    if scheme == "file":
        return rest, ""
    if scheme == "hf":
        return rest.partition("@")[0], ""
    return (
        folder,
        f"aws s3 cp --recursive {_shell(uri)} {folder}" if scheme == "s3" else f"# copy {_value(uri)} to ./{folder}",
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _yaml(text: str) -> str:
    return text if re.fullmatch(r"[a-z][a-z0-9:/._-]*[a-z0-9]", text) else _literal(text)


def _shell(text: str) -> str:
    return text if re.fullmatch(r"[\w:/.=@-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _last(history: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [entry[key] for entry in history if is_number(entry.get(key))]
    return values[-1] if values else None


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
