"""Simulated nodes and pods, by kwok: thousands of Jobs run to their end in seconds, with the outcomes that a test chooses.

The nodes and pods are objects only, and kwok writes their status. A pod of the operator ends with the termination message that the test's
template makes of its stage's document. Addresses of pods are loopback ones, where nothing listens.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import build
from tests.cluster.control_plane import SCALE, ControlPlane, is_ready

_STAGE, _DOCUMENT = "kubepeft.io/stage", "kubepeft.io/document"
"""What the operator puts on its pods: a label with the stage's name, an annotation with its document."""


@dataclass(frozen=True)
class Outcome:
    """How pods of one stage end, or those of any other Job.

    Attributes:
        stage: prepare, train or infer; None is pods without a stage.
        result: what `kubepeft.stage.Result` says, in JSON's names. A text in it is a Go template, in which `$document` is the stage's document.
        exit_code: of the container.
        seconds: how long the pod runs, and up to `jitter` longer.
        share: how often, measured against the other outcomes of this stage.
    """

    stage: str | None
    result: Mapping[str, Any]
    exit_code: int = 0
    seconds: float = 0
    jitter: float = 0
    share: int = 1


def succeeded(stage: str, **more: Any) -> Outcome:
    """The Outcome of a stage that did its work; `more` are fields of Outcome."""
    result: dict[str, Any] = {"version": "v1", "stage": stage, "outcome": "Succeeded", "exitCode": 0}
    result["specDigest"] = "{{ $document.specDigest }}"
    match stage:
        case "prepare":
            result["prepared"] = {
                "digest": "0" * 16,
                "modelCommit": "1" * 40,
                "rows": 100,
                "evalRows": 10,
                "tokens": 10_000,
            }
        case "train":
            result["training"] = {"step": 30, "totalSteps": 30, "loss": 0.5, "evalLoss": 0.6, "tokensPerSecond": 1000.0}
            result["adapter"] = {"uri": "{{ $document.outputUri }}/adapter", "digest": "2" * 64, "sizeBytes": 1_000_000}
        case "infer":
            result["inference"] = {"total": 10, "completed": 10, "failed": 0, "output": "{{ $document.outputUri }}"}
    return Outcome(stage, result, **more)


def failed(stage: str, exit_code: int, reason: str, message: str, **more: Any) -> Outcome:
    """The Outcome of a stage that failed; `more` are fields of Outcome."""
    result = {
        "version": "v1",
        "stage": stage,
        "outcome": "Failed",
        "exitCode": exit_code,
        "reason": reason,
        "message": message,
    }
    return Outcome(stage, {**result, "specDigest": "{{ $document.specDigest }}"}, exit_code=exit_code, **more)


OUTCOMES = (succeeded("prepare"), succeeded("train"), succeeded("infer"), Outcome(None, {}))
"""Everything succeeds at once."""


class SimulatedNodes(ControlPlane):
    """A control plane for thousands of objects, with simulated nodes.

    `stop("kwok")` freezes all nodes and pods, `start("kwok")` lets them go on.
    """

    def __init__(
        self, outcomes: Sequence[Outcome] = OUTCOMES, *, nodes: int = 20, gpus: int = 1000, audit: bool = False
    ) -> None:
        """Start one; returns when the nodes are Ready.

        Args:
            outcomes: how pods end; those of a stage that is not among them run for ever.
            nodes: how many.
            gpus: `nvidia.com/gpu` of each.
            audit: as for ControlPlane.

        Raises:
            CannotBuild: the machine lacks something; the message says what.
            RuntimeError: a component did not start.
        """
        build.program("kwok")
        self._outcomes = outcomes
        super().__init__(audit=audit, arguments=SCALE)
        try:
            for number in range(nodes):
                self.request("/api/v1/nodes", "POST", _node(number, gpus))
            self.start("kwok")
            self._wait_for("kwok", lambda: all(map(is_ready, self.request("/api/v1/nodes")["items"])))
        except BaseException:
            self.close()
            raise

    def _command(self, component: str) -> list[str | Path]:
        if component != "kwok":
            return super()._command(component)
        file = self.folder / "kwok.yaml"
        ends = [_pod_end(outcome, number) for number, outcome in enumerate(self._outcomes)]
        file.write_text(yaml.safe_dump_all([_CONFIGURATION, _node_ready(), _pod_running(), *ends, _pod_delete()]))
        return [
            build.BIN / "kwok",
            f"--kubeconfig={self.kubeconfig_for('kwok', ['system:masters'])}",
            f"--config={file}",
            "--v=WARN",
        ]


_CONFIGURATION = {
    "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
    "kind": "KwokConfiguration",
    "options": {
        "manageAllNodes": True,
        "cidr": "127.100.0.0/16",  # no other address may be sent anything to
        "nodeIP": "127.0.0.1",
        "nodeLeaseDurationSeconds": 40,
        "podPlayStageParallelism": 16,
        "nodePlayStageParallelism": 4,
        "nodeLeaseParallelism": 4,
        "podsOnNodeSyncParallelism": 4,
    },
}


def _node(number: int, gpus: int) -> dict[str, Any]:
    name = f"simulated-{number:02}"
    resources = {
        "cpu": "10000",
        "memory": "100Ti",
        "ephemeral-storage": "1000Ti",
        "pods": "10000",
        "nvidia.com/gpu": str(gpus),
    }
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"capacity": resources, "allocatable": resources},
    }


def _stage(name: str, kind: str, selector: Mapping[str, Sequence[str] | None], **spec: Any) -> dict[str, Any]:
    """A kwok Stage for objects of which each jq path has one of these values; None is that it has none.

    https://kwok.sigs.k8s.io/docs/user/stages-configuration/
    """
    expressions = [
        {"key": key, "operator": "DoesNotExist"}
        if values is None
        else {"key": key, "operator": "In", "values": [*values]}
        for key, values in selector.items()
    ]
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": expressions},
            **spec,
        },
    }


def _node_ready() -> dict[str, Any]:
    template = """
        {{ $now := Now }}
        phase: Running
        conditions:
        {{ range NodeConditions }}
        - {type: {{ .type | Quote }}, status: {{ .status | Quote }}, reason: {{ .reason | Quote }}, message: {{ .message | Quote }}, lastHeartbeatTime: {{ $now | Quote }}, lastTransitionTime: {{ $now | Quote }}}
        {{ end }}
        addresses:
        - {type: InternalIP, address: {{ NodeIP | Quote }}}
        - {type: Hostname, address: {{ NodeName | Quote }}}
        """
    return _stage("node-ready", "Node", {".status.phase": None}, next={"statusTemplate": textwrap.dedent(template)})


def _pod_running() -> dict[str, Any]:
    template = """
        {{ $now := Now }}
        phase: Running
        startTime: {{ $now | Quote }}
        conditions:
        - {type: PodReadyToStartContainers, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
        - {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
        containerStatuses:
        {{ range .spec.containers }}
        - name: {{ .name | Quote }}
          image: {{ .image | Quote }}
          ready: true
          started: true
          restartCount: 0
          state: {running: {startedAt: {{ $now | Quote }}}}
        {{ end }}
        hostIP: {{ index (NodeIPsWith .spec.nodeName) 0 | Quote }}
        {{ $address := index (PodIPsWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace) 0 }}
        podIP: {{ $address | Quote }}
        podIPs: [{ip: {{ $address | Quote }}}]
        """
    selector: dict[str, list[str] | None] = {".metadata.deletionTimestamp": None, ".status.phase": ["Pending"]}
    return _stage("pod-running", "Pod", selector, next={"statusTemplate": textwrap.dedent(template)})


def _pod_end(outcome: Outcome, number: int) -> dict[str, Any]:
    document = f'{{{{ $document := index .metadata.annotations "{_DOCUMENT}" | fromJson }}}}' if outcome.stage else ""
    succeeded = outcome.exit_code == 0
    text = f"""\
        {{{{ $now := Now }}}}
        {{{{ $begun := .status.startTime }}}}
        {document}
        phase: {"Succeeded" if succeeded else "Failed"}
        conditions:
        - {{type: Ready, status: "False", lastTransitionTime: {{{{ $now | Quote }}}}, reason: PodCompleted}}
        - {{type: ContainersReady, status: "False", lastTransitionTime: {{{{ $now | Quote }}}}, reason: PodCompleted}}
        containerStatuses:
        {{{{ range .spec.containers }}}}
        - name: {{{{ .name | Quote }}}}
          image: {{{{ .image | Quote }}}}
          ready: false
          started: false
          restartCount: 0
          state:
            terminated:
              exitCode: {outcome.exit_code}
              reason: {"Completed" if succeeded else "Error"}
              startedAt: {{{{ $begun | Quote }}}}
              finishedAt: {{{{ $now | Quote }}}}
              message: |-
                MESSAGE
        {{{{ end }}}}
        """
    template = textwrap.dedent(text).replace("MESSAGE", json.dumps(outcome.result))
    selector: dict[str, list[str] | None] = {
        ".metadata.deletionTimestamp": None,
        ".status.phase": ["Running"],
        f'.metadata.labels["{_STAGE}"]': [outcome.stage] if outcome.stage else None,
        ".metadata.ownerReferences.[].kind": ["Job"],
    }
    delay = {
        "durationMilliseconds": round(outcome.seconds * 1000),
        "jitterDurationMilliseconds": round((outcome.seconds + outcome.jitter) * 1000),
    }
    return _stage(
        f"pod-end-{number}", "Pod", selector, weight=outcome.share, delay=delay, next={"statusTemplate": template}
    )


def _pod_delete() -> dict[str, Any]:
    stage = _stage("pod-delete", "Pod", {}, next={"delete": True})
    stage["spec"]["selector"]["matchExpressions"] = [{"key": ".metadata.deletionTimestamp", "operator": "Exists"}]
    return stage
