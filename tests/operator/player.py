"""Plays the kubelet of one big node: pods that the real scheduler puts on it run, and end as a test says. All else is the real cluster's.

Pods of this tier have no containers; what they say (termination messages, exit codes, metrics pages) is what a test gives them.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubepeft.stage import AdapterResult, InferenceResult, PreparedRef, Result, TrainingResult
from kubepeft_operator.job import DOCUMENT, STAGE_LABEL
from kubepeft_operator.observe import INDEX
from kubepeft_operator.runtime.api import PODS, Api, ApiError, NotFound, Object, Resource
from kubepeft_operator.runtime.cache import Cache
from kubepeft_operator.runtime.informer import Informer

NODES = Resource("", "v1", "nodes", "Node")
NODE = "played"


@dataclass(frozen=True)
class Play:
    """How one pod goes: waits, runs, ends. `waiting`: a container state that it never leaves. `runs` None: until it is deleted."""

    runs: float | None = 0.05
    code: int = 0
    message: str | None = None
    """Termination message; None for the one of a stage that succeeded."""
    waiting: Object | None = None
    address: str = "127.0.0.1"
    reason: str = ""


def success(pod: Object) -> str:
    """The termination message of this pod's stage, done well."""
    document = json.loads(pod["metadata"]["annotations"][DOCUMENT])
    output = document["outputUri"]
    stage = document["stage"]
    fields: dict[str, Any] = {
        "prepare": {"prepared": PreparedRef(digest="v1-prepared", model_commit="c" * 40, rows=10, tokens=100)},
        "train": {
            "adapter": AdapterResult(uri=f"{output}/adapter", digest="a" * 64, size_bytes=4321),
            "training": TrainingResult(step=12, total_steps=12, loss=0.5),
        },
        "infer": {"inference": InferenceResult(total=8, completed=7, failed=1, output=output, whole=True)},
    }[stage]
    return Result(stage=stage, outcome="Succeeded", exit_code=0, spec_digest=document["specDigest"], **fields).dumps()


def stage_of(pod: Object) -> str:
    stage: str = pod["metadata"]["labels"][STAGE_LABEL]
    return stage


class Player:
    """`script` says how a pod goes; it may be changed while the player runs."""

    def __init__(self, api: Api) -> None:
        self.script: Callable[[Object], Play] = lambda pod: Play()
        self.started: list[Object] = []
        """Pods that began to run, in order."""
        self._api = api
        self._cache = Cache()
        self._stopping = threading.Event()
        self._at: dict[str, tuple[float | None, Play]] = {}
        self._threads = [
            threading.Thread(target=self._run, name="player", daemon=True),
            threading.Thread(target=self._heartbeat, name="player-heartbeat", daemon=True),
        ]
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="player")
        self._informer = Informer(api, PODS, self._cache, field_selector=f"spec.nodeName={NODE}", trim=_trim)

    def start(self) -> None:
        with contextlib.suppress(ApiError):
            self._api.create(NODES, None, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._beat()
        self._informer.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._informer.stop()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        with contextlib.suppress(ApiError):
            self._api.delete(NODES, None, NODE)

    def _heartbeat(self) -> None:
        while not self._stopping.wait(10):
            with contextlib.suppress(ApiError):
                self._beat()

    def _beat(self) -> None:
        sizes = {"cpu": "1000", "memory": "4Ti", "pods": "5000", "nvidia.com/gpu": "1000", "ephemeral-storage": "4Ti"}
        now = _now()
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "Played",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        status = {"capacity": sizes, "allocatable": sizes, "conditions": [ready]}
        self._api.patch(NODES, None, NODE, {"status": status}, subresource="status")

    def _run(self) -> None:
        while not self._stopping.wait(0.01):
            mine = [pod for pod in self._cache.all() if DOCUMENT in pod["metadata"].get("annotations", {})]
            for _ in self._pool.map(self._try, mine):
                pass

    def _try(self, pod: Object) -> None:
        try:
            self._play(pod)
        except NotFound:
            pass
        except ApiError:
            time.sleep(0.05)

    def _play(self, pod: Object) -> None:
        uid, phase = pod["metadata"]["uid"], pod["status"]["phase"]
        if phase in ("Succeeded", "Failed"):
            if "deletionTimestamp" in pod["metadata"]:
                self._remove(pod)
            return
        if "deletionTimestamp" in pod["metadata"]:
            if uid in self._at and self._at[uid][0] is not None:
                self._end(pod, 143, Result(stage=stage_of(pod), outcome="Saved", exit_code=143).dumps())  # type: ignore[arg-type]
            self._remove(pod)
            return
        if uid not in self._at:
            play = self.script(pod)
            if play.waiting is not None:
                self._at[uid] = None, play
                self._status(pod, "Pending", {"waiting": play.waiting})
                return
            self._at[uid] = time.monotonic(), play
            self.started.append(pod)
            self._status(pod, "Running", {"running": {"startedAt": _now()}}, play.address)
            return
        began, play = self._at[uid]
        if began is not None and play.runs is not None and time.monotonic() - began >= play.runs:
            message = play.message if play.message is not None else success(pod)
            self._end(pod, play.code, message, play.reason)

    def _end(self, pod: Object, code: int, message: str, reason: str = "") -> None:
        now = _now()
        word = reason or ("Error" if code else "Completed")
        ended = {"exitCode": code, "reason": word, "message": message, "startedAt": now, "finishedAt": now}
        self._status(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    def _status(self, pod: Object, phase: str, state: Object, address: str = "127.0.0.1") -> None:
        container = pod["spec"]["containers"][0]
        status = {
            "phase": phase,
            "podIP": address,
            "podIPs": [{"ip": address}],
            "startTime": _now(),
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": "",
                    "ready": phase == "Running",
                    "restartCount": 0,
                    "state": state,
                }
            ],
        }
        self._api.patch(
            PODS, pod["metadata"]["namespace"], pod["metadata"]["name"], {"status": status}, subresource="status"
        )

    def _remove(self, pod: Object) -> None:
        metadata = pod["metadata"]
        self._api.delete(PODS, metadata["namespace"], metadata["name"], uid=metadata["uid"], grace_seconds=0)


def _trim(pod: Object) -> Object:
    metadata = {key: value for key, value in pod["metadata"].items() if key not in ("managedFields", "ownerReferences")}
    container = {key: pod["spec"]["containers"][0][key] for key in ("name", "image")}
    return {"metadata": metadata, "spec": {"containers": [container]}, "status": {"phase": pod["status"]["phase"]}}


def index_of(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
