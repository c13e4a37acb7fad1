"""The chart's dashboards against a Prometheus: which panels show nothing, and a picture of them all.

`python -m tests.chart.dashboards http://127.0.0.1:9090 START END page.html` (times in seconds since 1970) writes a page that a browser shows.
"""

import html
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chart.helm import CHART

COLORS = ("#3274d9", "#e02f44", "#37872d", "#ff780a", "#8f3bb8", "#f2cc0c", "#0a437c", "#b877d9")


@dataclass(frozen=True)
class Query:
    """One query of a panel, with Grafana's variables filled in for all objects."""

    dashboard: str
    panel: str
    expression: str
    legend: str


def queries(*, interval: str = "1m", whole: str = "1h") -> list[Query]:
    """Every query of every dashboard. `interval` is the range of rates, `whole` that of the time shown."""
    found = []
    for file in sorted((CHART / "dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", interval).replace("$__range", whole)
                for variable in dashboard["templating"]["list"]:
                    expression = expression.replace(f"${variable['name']}", ".+")
                found.append(Query(dashboard["title"], panel["title"], expression, target["legendFormat"]))
    return found


def ask(prometheus: str, query: Query, start: float, end: float, *, points: int = 200) -> list[dict[str, Any]]:
    """The series of a query between two moments (seconds since 1970), at so many points but never more than one a second.

    Raises:
        ValueError: Prometheus does not understand it.
    """
    step = max(1, round((end - start) / points))
    parameters = urllib.parse.urlencode({"query": query.expression, "start": start, "end": end, "step": step})
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{parameters}", timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        raise ValueError(f"{query.dashboard}, {query.panel}: {error.read().decode()}") from None


def empty(prometheus: str, start: float, end: float, *, interval: str = "1m") -> list[str]:
    """The panels for which one of the queries has no number between two moments."""
    found = []
    for query in queries(interval=interval):
        series = ask(prometheus, query, start, end, points=10_000)  # a small pod answers its questions in a second
        if not any(value != "NaN" for one in series for _, value in one["values"]):
            found.append(f"{query.dashboard}, {query.panel}: {query.expression}")
    return found


def page(prometheus: str, start: float, end: float, *, interval: str = "1m") -> str:
    """All panels as one page: lines, the last values as the legend."""
    panels: dict[tuple[str, str], list[tuple[str, list[tuple[float, float]]]]] = {}
    for query in queries(interval=interval):
        lines = panels.setdefault((query.dashboard, query.panel), [])
        for one in ask(prometheus, query, start, end):
            points = [(float(at), float(value)) for at, value in one["values"] if value != "NaN"]
            lines.append((_legend(query.legend, one["metric"]), points))
    parts, title = [], ""
    for (dashboard, panel), lines in panels.items():
        if dashboard != title:
            title = dashboard
            parts.append(f"<h2>{html.escape(title)}</h2>")
        parts.append(f"<figure><figcaption>{html.escape(panel)}</figcaption>{_chart(lines, start, end)}</figure>")
    style = (
        "body{font:13px sans-serif;margin:12px;width:1500px}figure{display:inline-block;width:480px;margin:4px;border:1px solid #ccc;"
        "vertical-align:top;padding:4px}figcaption{font-weight:bold}h2{margin:12px 4px 2px}div{font-size:11px}"
    )
    return f"<!doctype html><meta charset=utf-8><title>kubepeft</title><style>{style}</style>{''.join(parts)}"


def _legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace(f"{{{{{name}}}}}", value)
    return form


def _chart(lines: list[tuple[str, list[tuple[float, float]]]], start: float, end: float) -> str:
    top = max((value for _, points in lines for _, value in points), default=0) or 1
    drawn, legend = [], []
    for index, (name, points) in enumerate(lines):
        color = COLORS[index % len(COLORS)]
        path = " ".join(
            f"{470 * (at - start) / (end - start):.1f},{110 - 105 * value / top:.1f}" for at, value in points
        )
        drawn.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{path}"/>')
        last = f"{points[-1][1]:.4g}" if points else "no data"
        legend.append(f'<span style="color:{color}">■</span> {html.escape(name)}: {last}')
    shown = " · ".join(legend[:8]) or "no data"
    return f'<svg width="470" height="112"><rect width="470" height="112" fill="#f7f7f7"/>{"".join(drawn)}</svg><div>{shown}</div>'


if __name__ == "__main__":
    prometheus, start, end, to = sys.argv[1:]
    Path(to).write_text(page(prometheus, float(start), float(end)), encoding="utf-8")
