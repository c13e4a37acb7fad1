"""The Grafana dashboards of the chart, as tables: a title, what is drawn, and what Prometheus is asked. `make generate` writes their JSON.

Both replicas of the operator count objects, so counts are taken by max; only the one that acts counts what it does, so counters are summed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
WIDTH, HEIGHT = 24, 8
"""Of a row of panels, in Grafana's units."""


@dataclass(frozen=True)
class Panel:
    """One panel; a query is (PromQL, legend)."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    help: str = ""


@dataclass(frozen=True)
class Dashboard:
    """Panels in rows from left to right; a variable is a label, with the metric that has its values."""

    name: str
    title: str
    rows: tuple[tuple[Panel, ...], ...]
    variables: tuple[tuple[str, str], ...] = field(default=())


def quantiles(metric: str, by: str, where: str = "") -> tuple[tuple[str, str], ...]:
    """The median and the 95th percentile of a histogram."""
    rate = f"sum by (le, {by}) (rate({metric}_bucket{where}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {rate})", f"{{{{{by}}}}} p{100 * q:.0f}") for q in (0.5, 0.95))


RUNNING = "Preparing|Training|Inferring"

FLEET = Dashboard(
    "fleet",
    "kubepeft / Fleet",
    (
        (
            Panel("Running", ((f'sum(max by (phase) (kubepeft_finetunes{{phase=~"{RUNNING}"}}))', "FineTunes"),
                              ('sum(max by (phase) (kubepeft_batchinferences{phase="Inferring"}))', "BatchInferences")), kind="stat"),
            Panel("Waiting", (('sum(max by (phase) (kubepeft_finetunes{phase=~"Pending|Queued"}))', "FineTunes"),
                              ('sum(max by (phase) (kubepeft_batchinferences{phase=~"Pending|Queued"}))', "BatchInferences")), kind="stat"),
            Panel("Stalled", (("sum(max by (kind, reason) (kubepeft_stalled)) or vector(0)", "objects"),), kind="stat",
                  help="They wait for longer than config.stuckAfterSeconds for something outside."),
            Panel("GPU hours", (("sum(increase(kubepeft_gpu_seconds_total[$__range])) / 3600", "of ended pods"),), kind="stat"),
        ),
        (
            Panel("FineTunes by phase", (("max by (phase) (kubepeft_finetunes)", "{{phase}}"),), stacked=True),
            Panel("BatchInferences by phase", (("max by (phase) (kubepeft_batchinferences)", "{{phase}}"),), stacked=True),
        ),
        (
            Panel("Wait of pods for a start", quantiles("kubepeft_stage_queue_seconds", "stage"), "s",
                  help="From a pod's making to its start: the scheduler, the image, the volumes."),
            Panel("Duration of stages", quantiles("kubepeft_stage_duration_seconds", "stage"), "s"),
            Panel("Duration of runs", quantiles("kubepeft_run_duration_seconds", "kind"), "s"),
        ),
        (
            Panel("GPU seconds by stage, per hour", (("sum by (stage) (increase(kubepeft_gpu_seconds_total[1h]))", "{{stage}}"),), "s", stacked=True),
            Panel("Runs that ended, per hour", (("sum by (kind, outcome) (increase(kubepeft_outcomes_total[1h]))", "{{kind}} {{outcome}}"),), stacked=True),
        ),
        (
            Panel("Failed attempts by reason, per hour",
                  (('sum by (stage, reason) (increase(kubepeft_attempts_total{outcome="Failed"}[1h]))', "{{stage}} {{reason}}"),), stacked=True),
            Panel("Stalled by reason", (("max by (kind, reason) (kubepeft_stalled)", "{{kind}} {{reason}}"),), stacked=True),
        ),
    ),
)  # fmt: skip

RUN = 'namespace=~"$namespace",finetune=~"$finetune"'

TRAINING = Dashboard(
    "training",
    "kubepeft / Training",
    (
        (
            Panel("Loss", ((f"kubepeft_training_loss{{{RUN}}}", "{{finetune}}"),), help="Nats per token."),
            Panel("Eval loss", ((f"kubepeft_training_eval_loss{{{RUN}}}", "{{finetune}}"),), help="Nats per token."),
            Panel("Progress", ((f"kubepeft_training_step{{{RUN}}} / kubepeft_training_total_steps{{{RUN}}}", "{{finetune}}"),), "percentunit"),
        ),
        (
            Panel("Tokens per second", ((f"kubepeft_training_tokens_per_second{{{RUN}}}", "{{finetune}}"),), help="Padding left out."),
            Panel("Time to the end", ((f"kubepeft_training_eta_seconds{{{RUN}}}", "{{finetune}}"),), "s"),
            Panel("Learning rate", ((f"kubepeft_training_learning_rate{{{RUN}}}", "{{finetune}}"),), "sci"),
        ),
        (
            Panel("Memory", ((f"kubepeft_memory_bytes{{{RUN}}}", "{{finetune}} {{pod}}"),), "bytes",
                  help="The most taken so far: of the GPU, or of the process where there is none."),
            Panel("Micro-batch", ((f"kubepeft_training_micro_batch{{{RUN}}}", "{{finetune}}"),),
                  help="Examples at once; smaller than the manifest says where that did not fit into memory."),
            Panel("Restarts after running out of memory", ((f"kubepeft_out_of_memory_restarts_total{{{RUN}}}", "{{finetune}}"),)),
        ),
        (
            Panel("Epochs", ((f"kubepeft_training_epoch{{{RUN}}}", "{{finetune}}"),)),
            Panel("Tokens trained on", ((f"kubepeft_training_tokens_total{{{RUN}}}", "{{finetune}}"),)),
            Panel("Share of the parameters that is trained",
                  ((f"kubepeft_training_trainable_parameters{{{RUN}}} / kubepeft_training_parameters{{{RUN}}}", "{{finetune}}"),), "percentunit"),
        ),
        (
            Panel("Rows prepared", ((f"kubepeft_prepare_rows{{{RUN}}}", "{{finetune}}"),)),
            Panel("Running pods by stage", ((f"count by (stage) (kubepeft_stage{{{RUN}}})", "{{stage}}"),)),
        ),
    ),
    (("namespace", "kubepeft_stage"), ("finetune", "kubepeft_training_step")),
)  # fmt: skip

BATCH = 'namespace=~"$namespace",batchinference=~"$batchinference"'

INFERENCE = Dashboard(
    "inference",
    "kubepeft / Inference",
    (
        (
            Panel("Progress",
                  ((f"sum by (batchinference) (kubepeft_inference_completed_total{{{BATCH}}} + kubepeft_inference_failed_total{{{BATCH}}})"
                    f" / sum by (batchinference) (kubepeft_inference_rows{{{BATCH}}})", "{{batchinference}}"),), "percentunit",
                  help="Of the shards that run now."),
            Panel("Shards that run", ((f"count by (batchinference) (kubepeft_inference_rows{{{BATCH}}})", "{{batchinference}}"),)),
        ),
        (
            Panel("Lines answered per second",
                  ((f"sum by (batchinference) (rate(kubepeft_inference_completed_total{{{BATCH}}}[$__rate_interval]))", "{{batchinference}}"),)),
            Panel("Lines that can't be answered", ((f"sum by (batchinference) (kubepeft_inference_failed_total{{{BATCH}}})", "{{batchinference}}"),),
                  help="Each is in errors.jsonl with its reason."),
        ),
        (
            Panel("Tokens per second", ((f"sum by (batchinference) (kubepeft_inference_tokens_per_second{{{BATCH}}})", "{{batchinference}}"),)),
            Panel("Tokens generated", ((f"sum by (batchinference) (kubepeft_inference_tokens_total{{{BATCH}}})", "{{batchinference}}"),)),
            Panel("Memory", ((f"max by (batchinference) (kubepeft_memory_bytes{{{BATCH}}})", "{{batchinference}}"),), "bytes"),
        ),
    ),
    (("namespace", "kubepeft_stage"), ("batchinference", "kubepeft_inference_rows")),
)  # fmt: skip

CONTROLLERS = '{controller=~"finetune|batchinference"}'
QUEUES = '{name=~"finetune|batchinference"}'
LEADING = 'leader_election_master_status{name=~"kubepeft.*"}'
CALLS = '{resource!=""}'
"""Only this operator's calls have a resource."""

OPERATOR = Dashboard(
    "operator",
    "kubepeft / Operator",
    (
        (
            Panel("Replicas that act", ((f"sum({LEADING})", "leaders"),), kind="stat", help="1, always."),
            Panel("Replicas", ((f"count({LEADING})", "replicas"),), kind="stat"),
            Panel("Who acts", ((LEADING, "{{pod}}"),)),
        ),
        (
            Panel("Keys that wait", ((f"max by (name) (workqueue_depth{QUEUES})", "{{name}}"),)),
            Panel("Wait in the queue", quantiles("workqueue_queue_duration_seconds", "name", QUEUES), "s"),
            Panel("Time of a pass", quantiles("controller_runtime_reconcile_time_seconds", "controller", CONTROLLERS), "s"),
        ),
        (
            Panel("Passes per second", ((f"sum by (controller, result) (rate(controller_runtime_reconcile_total{CONTROLLERS}[$__rate_interval]))",
                                         "{{controller}} {{result}}"),)),
            Panel("Passes that failed, per second",
                  ((f"sum by (controller) (rate(controller_runtime_reconcile_errors_total{CONTROLLERS}[$__rate_interval]))", "{{controller}}"),)),
            Panel("Workers at work", ((f"sum by (controller) (controller_runtime_active_workers{CONTROLLERS})", "{{controller}}"),)),
        ),
        (
            Panel("Calls to the API server per second",
                  ((f"sum by (verb, resource) (rate(rest_client_requests_total{CALLS}[$__rate_interval]))", "{{verb}} {{resource}}"),)),
            Panel("Calls by status, per second", ((f"sum by (code) (rate(rest_client_requests_total{CALLS}[$__rate_interval]))", "{{code}}"),)),
            Panel("Time of calls", quantiles("rest_client_request_duration_seconds", "verb", '{verb!=""}'), "s"),
        ),
        (
            Panel("Memory", ((f"process_resident_memory_bytes and on (instance) {LEADING}", "{{pod}}"),), "bytes"),
            Panel("CPU", ((f"rate(process_cpu_seconds_total[$__rate_interval]) and on (instance) {LEADING}", "{{pod}}"),)),
            Panel("Events that could not be sent", (("sum(events_dropped_total) or vector(0)", "events"),)),
        ),
    ),
)  # fmt: skip

DASHBOARDS = (FLEET, TRAINING, INFERENCE, OPERATOR)


def to_json(one: Dashboard) -> str:
    """The dashboard as Grafana reads it; the chart has it in `dashboards/`."""
    panels = []
    y = 0
    for row in one.rows:
        height = HEIGHT // 2 if all(panel.kind == "stat" for panel in row) else HEIGHT
        for column, panel in enumerate(row):
            width = WIDTH // len(row)
            panels.append(_panel(panel, len(panels) + 1, {"x": column * width, "y": y, "w": width, "h": height}))
        y += height
    whole: Json = {
        "uid": f"kubepeft-{one.name}",
        "title": one.title,
        "tags": ["kubepeft"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["kubepeft"], "title": "kubepeft", "asDropdown": True}],
        "templating": {"list": [_datasource(), *(_variable(label, metric) for label, metric in one.variables)]},
        "panels": panels,
    }
    return json.dumps(whole, indent=1) + "\n"


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _datasource() -> Json:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(label: str, metric: str) -> Json:
    query = f"label_values({metric}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",  # pods without the label are of another stage
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> Json:
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if panel.stacked else {"fillOpacity": 5}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, **({"custom": custom} if panel.kind == "timeseries" else {})},
            "overrides": [],
        },
        "options": {"tooltip": {"mode": "multi"}, "legend": {"placement": "bottom"}}
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }
