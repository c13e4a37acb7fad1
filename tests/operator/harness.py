"""Runs the operator as a process of its own against a real API server, and looks at what it leaves there."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import yaml

from kubepeft_operator.reconcile import BATCH_INFERENCES, FINE_TUNES
from kubepeft_operator.runtime.api import JOBS, PODS, Api, NotFound, Object
from tests.operator.faults import ApiProxy, Request

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["kubepeft_operator.__main__"])

WRITES = ("POST", "PUT", "PATCH", "DELETE")


def _main(config: str, kubeconfig: str, log: str, namespace: str, clock_offset: float) -> None:
    """The child: what `python -m kubepeft_operator` does, with its log in a file."""
    threading.Thread(target=_end_with_the_session, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ["POD_NAMESPACE"] = namespace
    os.environ["POD_NAME"] = f"operator-{os.getpid()}"
    if clock_offset:
        real = time.time
        time.time = lambda: real() + clock_offset
    sys.argv = ["kubepeft-operator", "--config", config, "--kubeconfig", kubeconfig]
    from kubepeft_operator.__main__ import main

    sys.exit(main())


def _end_with_the_session() -> None:
    """A test session that is killed stops nothing; its operators must not outlive it."""
    session = multiprocessing.parent_process()
    assert session
    connection.wait([session.sentinel])
    os._exit(1)


class Operator:
    """One replica that watches one namespace. `log` is its log file."""

    def __init__(
        self, kubeconfig: Path, namespace: str, folder: Path, *, clock_offset: float = 0, **config: Any
    ) -> None:
        name = f"operator-{time.monotonic_ns()}"
        self.log = folder / f"{name}.log"
        settings = {
            "jobs": {"image": "registry.example/kubepeft-jobs:1"},
            "watchNamespaces": [namespace],
            "leaderElection": {"leaseDuration": 3, "renewDeadline": 2, "retryPeriod": 0.3},
            "metricsPort": 0,
            "healthPort": 0,
            "progressIntervalSeconds": 1,
            **config,
        }
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        self.process = processes.Process(
            target=_main, args=(str(file), str(kubeconfig), str(self.log), namespace, clock_offset), daemon=True
        )
        self.process.start()

    def lines(self) -> list[dict[str, Any]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def said(self, message: str) -> dict[str, Any] | None:
        return next((line for line in self.lines() if line["message"] == message), None)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def stop(self) -> int | None:
        """SIGTERM. Returns: the exit code."""
        self.process.terminate()
        self.process.join(20)
        return self.process.exitcode

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def defects(self) -> list[str]:
        """What must never be in a log: tracebacks, and anything that is no log line."""
        text = self.log.read_text() if self.log.exists() else ""
        return [
            line
            for line in text.splitlines()
            if "Traceback" in line or '"traceback"' in line or not line.startswith("{")
        ]


@contextmanager
def operator(kubeconfig: Path, namespace: str, folder: Path, **config: Any) -> Iterator[Operator]:
    """A replica for the length of a block; at its end it must have logged no defect."""
    running = Operator(kubeconfig, namespace, folder, **config)
    try:
        yield running
    finally:
        running.kill()
        assert running.defects() == []


class Cluster:
    """What a test does and sees in its namespace."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api, self.namespace = api, namespace

    def create(self, obj: Object, name: str | None = None) -> Object:
        resource = FINE_TUNES if obj["kind"] == "FineTune" else BATCH_INFERENCES
        metadata = {key: value for key, value in obj["metadata"].items() if key in ("name", "labels")}
        body = {**obj, "metadata": {**metadata, "name": name or metadata["name"]}}
        return self.api.create(resource, self.namespace, body)

    def fine_tune(self, name: str = "support-bot") -> Object:
        return self.api.get(FINE_TUNES, self.namespace, name)

    def inference(self, name: str = "support-bot") -> Object:
        return self.api.get(BATCH_INFERENCES, self.namespace, name)

    def status(self, name: str = "support-bot") -> Object:
        status: Object = self.fine_tune(name).get("status") or {}
        return status

    def phase(self, name: str = "support-bot") -> str:
        phase: str = self.status(name).get("phase", "")
        return phase

    def reason(self, type: str = "Complete", name: str = "support-bot") -> str:
        conditions = self.status(name).get("conditions", [])
        return next((one["reason"] for one in conditions if one["type"] == type), "")

    def jobs(self) -> list[Object]:
        return self.api.list(JOBS, self.namespace)

    def pods(self) -> list[Object]:
        return self.api.list(PODS, self.namespace)

    def patch(self, spec: Object, name: str = "support-bot") -> None:
        self.api.patch(FINE_TUNES, self.namespace, name, {"spec": spec})

    def delete(self, name: str = "support-bot", resource: Any = FINE_TUNES) -> None:
        self.api.delete(resource, self.namespace, name)

    def gone(self, name: str = "support-bot") -> bool:
        try:
            self.fine_tune(name)
        except NotFound:
            return True
        return False


def writes(proxy: ApiProxy) -> list[Request]:
    """Calls that change something, leases aside."""
    return [one for one in proxy.requests if one.method in WRITES and "/leases" not in one.path]


def eventually(holds: Callable[[], object], timeout: float = 20, what: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"did not come about in {timeout:g} s: {what()}"
        time.sleep(0.02)


def always(holds: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert holds()
        time.sleep(0.05)
