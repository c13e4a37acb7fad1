"""The geometry of the report's charts: axes, ticks, paths and what a pointer finds, in percent of the plot's box.

Numbers in, dataclasses out: no markup here (page.html draws) and no knowledge of training. Written here rather than taken from a
charting library because a report must stay one small file that needs no script, follows the reader's light or dark scheme, and
keeps its letters at reading size on a phone: plots stretch, text does not, which an image with one fixed viewBox cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MAX_POINTS = 400
"""Points of a drawn line. A longer series is drawn as means of equally many neighbours, inside the range they span."""
MAX_SPOTS = 120
"""Places of a line that answer to the pointer."""
LOG_RATIO = 20
"""A positive series whose largest value is this many times its smallest is drawn on a logarithmic axis."""
BOX = 1000
"""Side of the square that paths are given in; it is stretched over the plot."""
LARGEST = 1e30
"""Values beyond are no measurement; they count as infinite, which keeps the arithmetic of axes finite."""
SMALLEST = 1e-30
"""Likewise, differences below are none."""


@dataclass(frozen=True)
class Point:
    """A measurement; `where` says in words at what x, for tooltips."""

    x: float
    y: float
    where: str


@dataclass(frozen=True)
class Series:
    """Measurements by ascending x. `marked` draws every point as a dot: for the few that matter one by one."""

    label: str
    colour: str
    """CSS class of its strokes and fills."""
    points: Sequence[Point]
    marked: bool = False


@dataclass(frozen=True)
class Reference:
    """A level to compare with, drawn across the whole plot."""

    label: str
    value: float


@dataclass(frozen=True)
class Tick:
    at: float
    """Percent from the left, or from the top."""
    label: str


@dataclass(frozen=True)
class Spot:
    """What a pointer finds: the column from `left`, `width` wide, and the point in it. All in percent."""

    x: float
    y: float
    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    path: str
    """SVG path data in the box; breaks where a value was not finite."""
    ranges: str
    """Path data of the area between the smallest and the largest of the values that each drawn mean stands for; may be empty."""
    spots: list[Spot]
    marked: bool


@dataclass(frozen=True)
class LineChart:
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    references: list[Tick]
    logarithmic: bool
    merged: int
    """Of how many logged values a drawn point of the longest line is the mean; 1 if it is that value."""
    marks: list[Tick] = field(default_factory=list)
    """Upright lines, such as where a run was resumed."""


@dataclass(frozen=True)
class Bar:
    left: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class BarChart:
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick]


@dataclass(frozen=True)
class _Axis:
    """Maps values to 0…1, smallest first."""

    low: float
    high: float
    logarithmic: bool
    ticks: list[float]

    def at(self, value: float) -> float:
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Group:
    """Neighbouring measurements drawn as one point; `mean` is None where none was finite."""

    x: float
    mean: float | None
    smallest: float
    largest: float
    where: str


def is_number(value: object) -> bool:
    """Whether a value can be drawn: a finite number of a size that a measurement has."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < LARGEST


def line_chart(
    series: Iterable[Series],
    *,
    unit: str,
    references: Iterable[Reference] = (),
    marks: Iterable[tuple[float, str]] = (),
    from_zero: bool = False,
    may_be_logarithmic: bool = False,
) -> LineChart | None:
    """Series over a common x from 0. None if no value of them is finite. `unit` follows the values in tooltips; `marks` are (x, label)."""
    grouped = [(one, _group(one.points)) for one in series]
    grouped = [(one, groups) for one, groups in grouped if any(group.mean is not None for group in groups)]
    if not grouped:
        return None
    levels = [reference for reference in references if is_number(reference.value)]
    drawn = [group for _, groups in grouped for group in groups if group.mean is not None]
    lows = [group.smallest for group in drawn] + [level.value for level in levels]
    highs = [group.largest for group in drawn] + [level.value for level in levels]
    y_axis = _axis(min(lows), max(highs), from_zero=from_zero, may_be_logarithmic=may_be_logarithmic)
    x_axis = _x_axis(max(one.points[-1].x for one, _ in grouped))
    return LineChart(
        lines=[_line(one, groups, x_axis, y_axis, unit) for one, groups in grouped],
        x_ticks=[Tick(_percent(x_axis.at(value)), label) for value, label in _labelled(x_axis.ticks)],
        y_ticks=[Tick(_percent(1 - y_axis.at(value)), label) for value, label in _labelled(y_axis.ticks)],
        references=[Tick(_percent(1 - y_axis.at(level.value)), level.label) for level in levels],
        logarithmic=y_axis.logarithmic,
        merged=max(_group_size(len(one.points)) for one, _ in grouped),
        marks=[Tick(_percent(x_axis.at(x)), label) for x, label in marks if is_number(x) and 0 < x < x_axis.high],
    )


def histogram(
    edges: Sequence[float], counts: Sequence[float], *, thing: str, limit: float | None = None, limit_label: str = ""
) -> BarChart | None:
    """Bars of equal width over buckets of any width: counts[i] things have edges[i] <= value < edges[i + 1]. None if there are none.

    `limit` is marked at its place within its bucket. The last edge may be far beyond the largest value: it gets no label.
    """
    usable = len(edges) == len(counts) + 1 and all(is_number(number) for number in [*edges, *counts])
    if not usable or not sum(counts) > 0 or any(left >= right for left, right in pairwise(edges)) or min(counts) < 0:
        return None
    filled = [index for index, count in enumerate(counts) if count]
    first, last = filled[0], filled[-1] + 1
    edges, counts = edges[first : last + 1], counts[first:last]
    axis = _axis(0, max(counts), from_zero=True, may_be_logarithmic=False)
    width, total = 100 / len(counts), sum(counts)
    every = -(-len(counts) // 8)
    texts = [
        f"{_span(edges, index)}: {count:,.0f} {thing}, {share(count, total)}" for index, count in enumerate(counts)
    ]
    bars = [
        Bar(_round(index * width), _round(width), _percent(axis.at(count)), texts[index])
        for index, count in enumerate(counts)
    ]
    marks = []
    if limit is not None and edges[0] <= limit <= edges[-1]:
        bucket = max(index for index in range(len(counts)) if edges[index] <= limit)
        within = (limit - edges[bucket]) / (edges[bucket + 1] - edges[bucket])
        marks = [Tick(_round((bucket + within) * width), limit_label)]
    return BarChart(
        bars=bars,
        x_ticks=[Tick(_round(index * width), short(edges[index])) for index in range(0, len(counts), every)],
        y_ticks=[
            Tick(_percent(1 - axis.at(value)), label) for value, label in _labelled(axis.ticks) if value == int(value)
        ],
        marks=marks,
    )


def share(part: float, whole: float) -> str:
    """A part in percent, with as many digits as it takes to tell it from nothing and from all."""
    percent = 100 * part / whole
    near = min(percent, abs(100 - percent))
    digits = 0 if near >= 10 or near == 0 else 1 if near >= 1 else 2 if near >= 0.1 else 3
    return f"{percent:.{digits}f} %"


def short(value: float) -> str:
    """A number for an axis, in few letters: 0.25, 1,200, 15k, 2.5M, 2e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            unit = 1e3 if letter == "k" else factor
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}" if size >= 1000 and value == int(value) else f"{value:.4g}"


def _group_size(count: int) -> int:
    return max(1, -(-count // MAX_POINTS))


def _group(points: Sequence[Point]) -> list[_Group]:
    size = _group_size(len(points))
    groups = []
    for start in range(0, len(points), size):
        members = points[start : start + size]
        values = [point.y for point in members if is_number(point.y)]
        mean = math.fsum(values) / len(values) if values else None
        where = members[0].where if len(members) == 1 else f"{members[0].where} to {members[-1].where}"
        x = (members[0].x + members[-1].x) / 2
        groups.append(_Group(x, mean, min(values, default=0.0), max(values, default=0.0), where))
    return groups


def _line(series: Series, groups: list[_Group], x_axis: _Axis, y_axis: _Axis, unit: str) -> Line:
    runs: list[list[_Group]] = [[]]
    for group in groups:
        if group.mean is None:
            runs.append([])
        else:
            runs[-1].append(group)
    runs = [run for run in runs if run]

    def place(group: _Group, pick: Callable[[_Group], float]) -> str:
        return f"{_round(BOX * x_axis.at(group.x))} {_round(BOX * (1 - y_axis.at(pick(group))))}"

    def mean(group: _Group) -> float:
        assert group.mean is not None
        return group.mean

    path = ranges = ""
    for run in runs:
        # A lone point is a line of no length, which round caps show as a dot.
        path += "M" + "L".join(place(group, mean) for group in run) + ("h0" if len(run) == 1 else "")
        if _group_size(len(series.points)) > 1:
            upper = [place(group, lambda group: group.largest) for group in run]
            lower = [place(group, lambda group: group.smallest) for group in reversed(run)]
            ranges += "M" + "L".join([*upper, *lower]) + "Z"
    shown = [group for run in runs for group in run]
    shown = shown[:: 1 if series.marked else -(-len(shown) // MAX_SPOTS)]
    at = [100 * x_axis.at(group.x) for group in shown]
    borders = [0.0, *((left + right) / 2 for left, right in pairwise(at)), 100.0]
    spots = []
    for index, group in enumerate(shown):
        value = f"{series.label} {mean(group):.4g}{unit}"
        if group.smallest < group.largest:
            value += f" ({group.smallest:.4g} to {group.largest:.4g})"
        left, right = borders[index], borders[index + 1]
        y = _percent(1 - y_axis.at(mean(group)))
        spots.append(Spot(_round(at[index]), y, _round(left), _round(right - left), f"{group.where}: {value}"))
    return Line(series.label, series.colour, path, ranges, spots, series.marked)


def _x_axis(high: float) -> _Axis:
    step = max(1.0, _nice(high / 4)) if high > 0 else 1.0
    return _Axis(
        0.0, high or 1.0, False, [step * index for index in range(int(high / step) + 1)] if high > 0 else [0.0]
    )


def _axis(low: float, high: float, *, from_zero: bool, may_be_logarithmic: bool) -> _Axis:
    if may_be_logarithmic and low > SMALLEST and high / low >= LOG_RATIO:
        return _logarithmic_axis(low, high)
    if from_zero or 0 <= low < 0.4 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), SMALLEST):
        pad = abs(high) * 0.1 if abs(high) > SMALLEST else 1.0
        low, high = low - pad, high + pad
    step = _nice((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _Axis(first * step, last * step, False, [step * index for index in range(first, last + 1)])


def _logarithmic_axis(low: float, high: float) -> _Axis:
    low, high = low / 1.15, high * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = len(decades) > 4
    digits = (1,) if wide else (1, 2, 5)
    every = -(-len(decades) // 7) if wide else 1
    ticks = [digit * 10.0**decade for decade in decades if decade % every == 0 for digit in digits]
    return _Axis(low, high, True, [tick for tick in ticks if low <= tick <= high])


def _nice(step: float) -> float:
    """The next step upwards that people count in: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((factor * power for factor in (1, 2, 2.5, 5) if step <= factor * power * (1 + 1e-9)), 10 * power)


def _labelled(ticks: list[float]) -> list[tuple[float, str]]:
    return [(tick, short(float(f"{tick:.10g}"))) for tick in ticks]


def _span(edges: Sequence[float], index: int) -> str:
    beyond = index + 2 == len(edges)
    return (
        f"{edges[index]:,.0f} or more"
        if beyond and edges[index + 1] >= 2**31
        else f"{edges[index]:,.0f} to {edges[index + 1] - 1:,.0f}"
    )


def _percent(share_of_box: float) -> float:
    return _round(100 * share_of_box)


def _round(value: float) -> float:
    return round(value, 2) + 0.0  # no "-0.0"
