"""kubepeft status, logs and cancel: what becomes of an object on a cluster, with the user's own kubeconfig and rights.

The kubernetes client is imported when one of them runs; nothing else of the command needs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from kubepeft.cli.display import clock, size
from kubepeft.errors import TransientError, UserError
from kubepeft.types import GROUP, KINDS, VERSION

Object = dict[str, Any]

PLURALS = {"FineTune": "finetunes", "BatchInference": "batchinferences"}
LABELS = {"FineTune": "kubepeft.io/fine-tune", "BatchInference": "kubepeft.io/batch-inference"}
STAGE_LABEL = "kubepeft.io/stage"
POLL_SECONDS = 2.0
BAR = 28
COLOURS = {"Succeeded": "green", "Failed": "red", "Pending": "yellow", "Queued": "yellow", "Suspended": "yellow"}


@dataclass(frozen=True)
class Cluster:
    """The API server of the current context, by the official client, and the namespace that is meant."""

    objects: Any
    core: Any
    namespace: str

    def find(self, name: str) -> Object:
        """The FineTune of this name, or where there is none, the BatchInference.

        Raises:
            UserError: reason NotFound.
        """
        for kind, plural in PLURALS.items():
            with _errors(missing_is_fine=True):
                found: Object = self.objects.get_namespaced_custom_object(GROUP, VERSION, self.namespace, plural, name)
                return {**found, "kind": kind}
        raise UserError(
            "NotFound",
            f"there is neither a {' nor a '.join(KINDS)} {name!r} in the namespace {self.namespace!r}",
            mend="see which there are: kubectl get ft,bi --all-namespaces",
        )

    def inference_of(self, obj: Object) -> Object | None:
        """The BatchInference that a FineTune made."""
        name = obj["metadata"]["name"]
        if obj["kind"] == "FineTune" and obj["spec"].get("inference"):
            with _errors(missing_is_fine=True):
                plural = PLURALS["BatchInference"]
                found: Object = self.objects.get_namespaced_custom_object(GROUP, VERSION, self.namespace, plural, name)
                return found
        return None

    def pods(self, obj: Object) -> list[Any]:
        """Its pods, and those of its BatchInference, the oldest first."""
        name = obj["metadata"]["name"][:63].rstrip("-.")
        kinds = [obj["kind"]] + (["BatchInference"] if self.inference_of(obj) else [])
        with _errors():
            found = [
                pod
                for kind in kinds
                for pod in self.core.list_namespaced_pod(self.namespace, label_selector=f"{LABELS[kind]}={name}").items
            ]
        return sorted(found, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))


def connect(namespace: str | None) -> Cluster:
    """By $KUBECONFIG or ~/.kube/config, or the pod's own service account.

    Raises:
        UserError: reason NotInstalled without the kubernetes package, NoCluster without a way to an API server.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise UserError(
            "NotInstalled", "this needs the kubernetes package", mend="install it: pip install 'kubepeft[operator]'"
        ) from None
    settings = client.Configuration()
    settings.retries = False
    try:
        config.load_kube_config(client_configuration=settings)
        _, active = config.list_kube_config_contexts()
        default = (active or {}).get("context", {}).get("namespace")
    except config.ConfigException as error:
        raise UserError(
            "NoCluster", str(error), mend="set KUBECONFIG, or get a kubeconfig from whoever runs the cluster"
        ) from None
    api = client.ApiClient(settings)
    return Cluster(client.CustomObjectsApi(api), client.CoreV1Api(api), namespace or default or "default")


@contextmanager
def _errors(*, missing_is_fine: bool = False) -> Iterator[None]:
    """The client's errors as ours. With `missing_is_fine` the block just ends when the object is not there."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 404 and missing_is_fine:
            return
        try:
            message = json.loads(error.body or "")["message"]
        except (TypeError, ValueError, KeyError):
            message = error.reason or str(error)
        if error.status in (401, 403):
            raise UserError("Forbidden", message, mend="ask whoever runs the cluster for that right") from None
        if error.status == 404:
            raise UserError(
                "NotFound", message, mend="is kubepeft installed there? helm install kubepeft charts/kubepeft"
            ) from None
        raise TransientError("ApiServer", message) from None
    except (HTTPError, OSError) as error:
        raise TransientError("NoCluster", f"no answer from the API server: {error}") from None


# ── status


def show_status(name: str, namespace: str | None, *, watch: bool) -> int:
    """Print how the object stands; with `watch`, until it has ended.

    Returns: 0; with `watch`, 1 where it has failed.
    """
    cluster = connect(namespace)
    console = Console(highlight=False, soft_wrap=True)

    def page() -> tuple[Object, str]:
        obj = cluster.find(name)
        return obj, "\n".join(describe(obj, cluster.inference_of(obj), time.time(), rich=console.is_terminal))

    obj, text = page()
    if not watch:
        console.print(text)
        return 0
    if console.is_terminal:
        with Live(text, console=console, auto_refresh=False) as live:
            while not ended(obj):
                time.sleep(POLL_SECONDS)
                obj, text = page()
                live.update(text, refresh=True)
    else:
        console.print(text)
        while not ended(obj):
            time.sleep(POLL_SECONDS)
            before = text
            obj, text = page()
            if text != before:
                console.print(f"\n{text}")
    return 1 if _condition(obj, "Failed").get("status") == "True" else 0


def ended(obj: Object) -> bool:
    return any(_condition(obj, type).get("status") == "True" for type in ("Complete", "Failed"))


def describe(obj: Object, inference: Object | None, now: float, *, rich: bool) -> list[str]:
    """What `kubepeft status` prints, line by line; with `rich`, marked up for a terminal."""

    def coloured(text: str, style: str) -> str:
        return f"[{style}]{escape(text)}[/{style}]" if rich else text

    def plain(text: str) -> str:
        return escape(text) if rich else text

    metadata, status = obj["metadata"], obj.get("status") or {}
    phase = status.get("phase") or "not looked at yet"
    head = f"{obj['kind']} {metadata['namespace']}/{metadata['name']}: "
    lines = [plain(head) + coloured(phase, COLOURS.get(phase, "cyan"))]
    if "phase" not in status:
        lines.append(
            "  no operator has taken it up: is kubepeft running? kubectl get pods -A -l app.kubernetes.io/name=kubepeft"
        )
    progress = status.get("progress")
    if progress and not ended(obj):
        lines[0] += plain(f"  {_bar(progress)} {progress}")
        if status.get("eta"):
            lines[0] += f"  {status['eta']} to go"
    lines += [f"  {plain(line)}" for line in _why(obj)]
    lines += [f"  {plain(line)}" for line in _facts(obj, now)]
    if inference is not None and not ended(inference) and status.get("phase") != "Inferring":
        lines += [f"  inference: {plain(line)}" for line in _why(inference)]
    attempts = [one for one in status.get("attempts") or () if one.get("outcome") != "Succeeded"]
    if attempts:
        lines.append("  attempts that did not succeed:")
    for one in attempts:
        words = f"{one['stage']} {one['outcome'].lower()}"
        resumed = f", resumed from step {one['resumedFromStep']:,}" if one.get("resumedFromStep") else ""
        reason = ": ".join(part for part in (one.get("reason"), one.get("message")) if part)
        lines.append(plain(f"    {words}{resumed}: {reason}" if reason else f"    {words}{resumed}"))
    return lines


def _why(obj: Object) -> Iterator[str]:
    """Why it does not run, or why it has failed, and what to do."""
    failed, complete, accepted = (_condition(obj, type) for type in ("Failed", "Complete", "Accepted"))
    telling = failed if failed.get("status") == "True" else complete
    if accepted.get("status") == "False" and failed.get("status") != "True":
        telling = accepted
    phase = (obj.get("status") or {}).get("phase")
    if not telling or (telling is complete and phase in ("Preparing", "Training", "Inferring")):
        return
    message, _, hint = telling.get("message", "").partition(" → ")
    if telling is complete and phase == "Succeeded":
        yield message
        return
    yield f"{telling['reason']}: {message}"
    if hint:
        yield f"→ {hint}"


def _facts(obj: Object, now: float) -> Iterator[str]:
    status = obj.get("status") or {}
    training, adapter, inference = (status.get(name) or {} for name in ("training", "adapter", "inference"))
    if "step" in training:
        words = [f"step {training['step']:,} of {training.get('totalSteps', 0):,}"]
        words += [
            f"{label} {training[key]:.4f}"
            for label, key in (("loss", "loss"), ("eval loss", "evalLoss"))
            if key in training
        ]
        if "tokensPerSecond" in training and not ended(obj):
            words.append(f"{training['tokensPerSecond']:,.0f} tokens/s")
        yield "training: " + ", ".join(words)
    if adapter.get("uri"):
        yield f"adapter: {adapter['uri']} ({size(adapter['sizeBytes'])})"
    if "completed" in inference:
        of = f" of {inference['total']:,}" if inference.get("total") is not None else ""
        failed = f", {inference['failed']:,} failed" if inference.get("failed") else ""
        yield f"answers: {inference['completed']:,}{of}{failed}, in {inference.get('output', '')}"
    if status.get("startTime"):
        began = datetime.fromisoformat(status["startTime"]).timestamp()
        until = datetime.fromisoformat(status["completionTime"]).timestamp() if status.get("completionTime") else now
        yield f"{'took' if status.get('completionTime') else 'since'} {clock(max(0.0, until - began))}"


def _bar(progress: str) -> str:
    done = int(progress.rstrip("%") or 0) * BAR // 100
    return "━" * done + "─" * (BAR - done)


def _condition(obj: Object, type: str) -> Object:
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == type), {})


# ── logs


def show_logs(name: str, namespace: str | None, *, stage: str | None, follow: bool) -> int:
    """Print the log of the newest pod, or of the newest of one stage; with `follow`, as it grows."""
    cluster = connect(namespace)
    obj = cluster.find(name)
    pods = [pod for pod in cluster.pods(obj) if stage in (None, pod.metadata.labels.get(STAGE_LABEL))]
    if not pods:
        why = " ".join(_why(obj)) or f"it is {(obj.get('status') or {}).get('phase', 'not looked at yet')}"
        raise UserError("NoPods", f"there is no pod{f' of the stage {stage}' if stage else ''}: {why}", where=name)
    pod = pods[-1]
    if pod.status.phase == "Pending":
        raise UserError(
            "NotStarted", f"the pod {pod.metadata.name} has not started", where=name, mend=f"kubepeft status {name}"
        )
    print(f"── {pod.metadata.labels.get(STAGE_LABEL)}: {pod.metadata.name}", file=sys.stderr)
    with _errors():
        stream = cluster.core.read_namespaced_pod_log(
            pod.metadata.name, cluster.namespace, container="kubepeft", follow=follow, _preload_content=False
        )
        readable = _readable if sys.stdout.isatty() else str
        for line in _lines(stream.stream(1 << 14)):
            print(readable(line), flush=follow)
    return 0


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


def _readable(line: str) -> str:
    """A JSON log line as people read it; any other line as it is."""
    try:
        record = json.loads(line)
        moment = datetime.fromisoformat(record["time"]).astimezone(UTC).strftime("%H:%M:%S")
        text = f"{moment} {record['level'].upper()} {record['message']}"
        return f"{text}\n{record['traceback']}" if "traceback" in record else text
    except (ValueError, KeyError, TypeError, AttributeError):
        return line


# ── cancel


def cancel(name: str, namespace: str | None, *, sure: Callable[[str], bool]) -> int:
    """Delete the object; its pods save and end. What it has published stays.

    sure: asked with the question; nothing is done where it says no.
    """
    cluster = connect(namespace)
    obj = cluster.find(name)
    kind, status = obj["kind"], obj.get("status") or {}
    phase = status.get("phase", "not begun")
    if not sure(f"Delete the {kind} {cluster.namespace}/{name} ({phase})?"):
        return 1
    with _errors(missing_is_fine=True):
        cluster.objects.delete_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURALS[kind], name)
    print(f"{kind} {name} is deleted; its pods save what they have and end.")
    if output := status.get("output") or (status.get("inference") or {}).get("output"):
        print(f"What it has published and saved stays under {output}")
        print("The same manifest applied again goes on from there. To pause without deleting, set spec.suspend: true.")
    return 0
