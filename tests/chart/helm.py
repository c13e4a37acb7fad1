"""Helm on the project's own chart: rendering with values, and the commands a person would type."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import build
from tests.cluster.control_plane import ControlPlane

Object = dict[str, Any]
CHART = build.REPOSITORY / "charts" / "kubepeft"
RELEASE, NAMESPACE = "kubepeft", "kubepeft-system"
MONITORING = (
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
)
"""What a cluster with prometheus-operator has."""


class HelmError(RuntimeError):
    """Helm refused; the message is what it said."""


def helm(*arguments: str | Path, values: Mapping[str, Any] | None = None, kubeconfig: Path | None = None) -> str:
    """What helm prints.

    Raises:
        HelmError: it failed.
    """
    with tempfile.TemporaryDirectory() as home:
        extra = []
        if values is not None:
            (Path(home) / "values.yaml").write_text(json.dumps(values))
            extra = ["--values", Path(home) / "values.yaml"]
        done = subprocess.run(
            [build.program("helm"), *arguments, *extra],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": home, "KUBECONFIG": str(kubeconfig or "")},
        )
    if done.returncode:
        raise HelmError(done.stderr.strip() + done.stdout)
    return done.stdout


def render(
    values: Mapping[str, Any] | None = None, *, apis: Iterable[str] = MONITORING, namespace: str = NAMESPACE
) -> list[Object]:
    """The chart's objects, without asking a cluster."""
    known = [word for api in apis for word in ("--api-versions", api)]
    text = helm("template", RELEASE, CHART, "--namespace", namespace, *known, values=values or {})
    return [one for one in yaml.safe_load_all(text) if one]


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def only(objects: Iterable[Object], kind: str) -> Object:
    """The one object of this kind."""
    (found,) = of_kind(objects, kind)
    return found


def get(cluster: ControlPlane, kind: str, name: str, namespace: str = "default") -> Object:
    """One object of a cluster."""
    return dict(json.loads(cluster.kubectl("get", kind, name, "--namespace", namespace, "--output=json")))
