"""Alerts and dashboards ask for what the code counts, and a real Prometheus understands them."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from kubepeft.progress import FIGURES, STAGE_METRIC
from tests.chart import dashboards, pages
from tests.chart.helm import CHART
from tests.cluster import build
from tests.servers import free_port

ALERTS = CHART / "files" / "alerts.yaml"
CASES = Path(__file__).parent / "alerts.yaml"
TARGET = {"namespace", "pod", "instance", "job", "finetune", "batchinference"}
"""Labels that a scrape adds, by the chart's monitors."""
WORDS = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
"""prometheus_client's own."""


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Where → PromQL, of every alert and panel."""
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    return found | {f"{one.dashboard}, {one.panel}, {one.legend}": one.expression for one in dashboards.queries()}


def counted() -> dict[str, set[str]]:
    """Samples that the code can show → the labels that they have."""
    found: dict[str, set[str]] = {name: set() for name in PROCESS}
    for module in pages.COUNTING:
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                labels = set(metric._labelnames)
                suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}[
                    metric._type
                ]
                found |= {
                    metric._name + suffix: labels | ({"le"} if suffix == "_bucket" else set()) for suffix in suffixes
                }
    for metric in pages.fleet().collect():
        found |= {sample.name: set(sample.labels) for sample in metric.samples}
    found |= {name + ("_total" if kind == "counter" else ""): set() for name, (kind, _) in FIGURES.items()}
    return found | {STAGE_METRIC: {"stage"}}


@pytest.mark.parametrize("where", expressions())
def test_only_what_the_code_counts_is_asked_for(where: str) -> None:
    known, expression = counted(), expressions()[where]
    bare = re.sub(r'"[^"]*"', '""', expression)
    named = {word for word in WORDS.findall(bare) if word in known}
    suspects = {
        word
        for word in WORDS.findall(bare)
        if word.startswith(
            ("kubepeft_", "controller_runtime_", "workqueue_", "rest_client_", "leader_", "events_", "process_")
        )
    }
    assert suspects
    assert suspects <= set(known), f"{suspects - set(known)} are counted nowhere"
    for metric, selector in re.findall(r"([a-zA-Z_]+)\{([^}]*)\}", bare):
        labels = set(re.findall(r"([a-zA-Z_]+)\s*(?:=~|!=|!~|=)", selector))
        assert labels <= known[metric] | TARGET, f"{metric} has no label {labels - known[metric]}"
    grouped = {word for group in re.findall(r"(?:by|on) \(([^)]*)\)", bare) for word in WORDS.findall(group)}
    assert grouped <= set().union(*(known[name] for name in named)) | TARGET


def test_no_metric_of_the_code_holds_an_object_s_name() -> None:
    assert not {label for labels in counted().values() for label in labels} & {
        "name_of",
        "object",
        "finetune",
        "namespace",
        "pod",
        "uid",
    }


def test_alerts_fire_when_they_should() -> None:
    promtool = build.program("promtool")
    for command in (["check", "rules", ALERTS], ["test", "rules", CASES]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that scrapes pages of the real code."""
    folder = tmp_path_factory.mktemp("prometheus")
    ports = [free_port() for _ in range(5)]
    jobs = [
        {
            "job_name": "operator",
            "static_configs": [
                {"targets": [f"127.0.0.1:{ports[0]}"], "labels": {"namespace": "kubepeft-system", "pod": "operator-0"}}
            ],
        },
        *(
            {
                "job_name": stage,
                "static_configs": [
                    {
                        "targets": [f"127.0.0.1:{port}"],
                        "labels": {
                            "namespace": "team",
                            "pod": f"{stage}-pod",
                            **({"batchinference": "bot"} if stage == "infer" else {"finetune": "bot"}),
                        },
                    }
                ],
            }
            for stage, port in zip(pages.STAGES, ports[1:4], strict=True)
        ),
    ]
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s"}, "rule_files": [str(ALERTS)], "scrape_configs": jobs})
    )
    served = subprocess.Popen([sys.executable, "-m", "tests.chart.pages", *map(str, ports[:4])], cwd=build.REPOSITORY)
    url = f"http://127.0.0.1:{ports[4]}"
    flags = [
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{ports[4]}",
        "--log.level=warn",
    ]
    running = subprocess.Popen([build.program("prometheus"), *flags])
    try:
        wait_until_ready(url, running)
        yield url
    finally:
        for process in (running, served):
            process.terminate()
            process.wait(20)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=2).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("Prometheus did not start") from None
            time.sleep(0.1)


def test_every_panel_shows_something(prometheus: str) -> None:
    start, deadline = time.time(), time.time() + 60
    while missing := dashboards.empty(prometheus, start, time.time(), interval="5s"):
        assert time.time() < deadline, "\n".join(missing)
        time.sleep(1)
    drawn = dashboards.page(prometheus, start, time.time(), interval="5s")
    assert "no data" not in drawn
    assert drawn.count("<figure>") == len({(one.dashboard, one.panel) for one in dashboards.queries()})
