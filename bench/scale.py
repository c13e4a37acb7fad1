"""The operator at scale, against a bare script that makes the same Jobs: `python bench/scale.py --objects 1000`.

Each side runs on a real control plane (API server, etcd, controllers, scheduler) with simulated nodes, new each time, in turn. The operator's
side creates FineTunes with one BatchInference each and ends when all have Succeeded. The bare side creates the very Jobs that the operator
made, three an object, each when the one before it is complete, with plain HTTP on eight threads and one watch: it keeps no status, checks
no outcome and survives nothing. Printed: wall times and their ratio, where the processor's time went, the operator's memory, its calls per
FineTune, its writes while nothing happens, and how long it takes from "a Job is complete" to "the next one is there", seen by a
third party. With `--seconds` pods run that long and up to as long again, which spreads the ends out.
"""

import argparse
import json
import os
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import urllib3
import yaml
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kubepeft import crd
from kubepeft_operator.job import OWNER_LABELS, STAGE_LABEL
from kubepeft_operator.reconcile import FINE_TUNES
from kubepeft_operator.runtime.api import JOBS, Api
from kubepeft_operator.runtime.cache import Cache
from kubepeft_operator.runtime.informer import Informer
from tests.cluster.simulated import SimulatedNodes, succeeded
from tests.servers import REPOSITORY, free_port

STAGES = ("prepare", "train", "infer")
THREADS = 8
COMPONENTS = ("kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kwok")
TEMPLATE = "template-00000"
WRITES = ("POST", "PUT", "PATCH", "DELETE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="each side this often, in turn")
    parser.add_argument("--seconds", type=float, default=0, help="how long pods run, and up to as long again")
    parser.add_argument("--idle", type=float, default=60, help="seconds in which an idle operator must write nothing")
    parser.add_argument("--workers", type=int, help="of the operator; its default where none is given")
    parser.add_argument("--no-bare", action="store_true", help="the operator's side alone")
    parser.add_argument("--bare-side", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare_side:
        bare_side(json.loads(Path(arguments.bare_side).read_text()))
        return
    walls: dict[str, list[float]] = {"operator": []} if arguments.no_bare else {"bare": [], "operator": []}
    for _ in range(arguments.rounds):
        for side in walls:
            walls[side].append(on_a_cluster_of_its_own(side, arguments))
    if "bare" in walls:
        ratio = statistics.median(walls["operator"]) / statistics.median(walls["bare"])
        pairs = [ours / bare for ours, bare in zip(walls["operator"], walls["bare"], strict=True)]
        print(
            f"\n{arguments.objects} objects: operator {_spread(walls['operator'])}, bare {_spread(walls['bare'])},"
            f" ratio {ratio:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        )


def on_a_cluster_of_its_own(side: str, arguments: argparse.Namespace) -> float:
    """Seconds that a side took. What an earlier one leaves behind, thousands of Jobs and pods, would slow the next by up to a half."""
    seconds = arguments.seconds
    outcomes = [succeeded(stage, seconds=seconds, jitter=seconds) for stage in STAGES]
    with SimulatedNodes(outcomes) as cluster, tempfile.TemporaryDirectory() as folder:
        cluster.apply(*crd.definitions())
        for one in crd.definitions():
            cluster.kubectl("wait", "--for=condition=Established", f"crd/{one['metadata']['name']}")
        bench = Bench(cluster, Path(folder), arguments)
        templates = bench.templates()
        bench.settle()
        if side == "bare":
            return bench.bare(side, templates, arguments.objects)
        return bench.operator(side, arguments.objects, idle=arguments.idle)


class Bench:
    def __init__(self, cluster: SimulatedNodes, folder: Path, arguments: argparse.Namespace) -> None:
        self.cluster, self.folder, self.arguments = cluster, folder, arguments
        self.api = Api.connect(cluster.kubeconfig, user_agent="bench", connections=THREADS + 8)

    def templates(self) -> list[dict[str, Any]]:
        """The Jobs that the operator makes for one FineTune, without what ties them to it. Warms everything up too."""
        namespace = "warm-up"
        self.operator(namespace, 1, quiet=True)
        made = {}
        for job in self.api.list(JOBS, namespace):
            spec, metadata = job["spec"], job["metadata"]
            del spec["selector"]
            labels = spec["template"]["metadata"]["labels"]
            spec["template"]["metadata"]["labels"] = {
                key: value for key, value in labels.items() if "batch.kubernetes.io" not in key and "-uid" not in key and key != "job-name"
            }  # fmt: skip
            stage = metadata["labels"][STAGE_LABEL]
            made[stage] = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": f"{TEMPLATE}-{stage}", "labels": metadata["labels"]},
                "spec": spec,
            }
        return [made[stage] for stage in STAGES]

    def settle(self, timeout: float = 120) -> None:
        """Wait until the cluster has started up; idle it takes a fifth of a core."""
        deadline = time.monotonic() + timeout
        busy = 1.0
        while busy > 0.4 and time.monotonic() < deadline:
            before = self.processor_seconds()
            time.sleep(5)
            busy = sum(value - before[name] for name, value in self.processor_seconds().items()) / 5

    def bare(self, namespace: str, templates: list[dict[str, Any]], count: int) -> float:
        self.cluster.kubectl("create", "namespace", namespace)
        certificate, key = self.cluster.authority.issue("bare", "bare", groups=["system:masters"])
        file = self.folder / "bare.json"
        what = {
            "url": self.cluster.url,
            "ca": str(self.cluster.ca),
            "certificate": str(certificate),
            "key": str(key),
            "namespace": namespace,
            "count": count,
            "templates": templates,
        }
        file.write_text(json.dumps(what))
        observer = Observer(self.api, namespace)
        before = self.processor_seconds()
        script = subprocess.Popen([sys.executable, __file__, "--bare-side", file], stdout=subprocess.PIPE, text=True)
        output, _ = script.communicate()
        if script.returncode:
            raise SystemExit("the bare side failed")
        result = json.loads(output)
        used = {name: value - before[name] for name, value in self.processor_seconds().items()}
        used["bare script"] = result["processor"]
        observer.stop()
        print(f"\n── bare: {count} objects in {result['wall']:.1f} s")
        _print_processor(used, result["wall"])
        _print_latency(observer)
        return float(result["wall"])

    def operator(self, namespace: str, count: int, *, quiet: bool = False, idle: float = 0) -> float:
        self.cluster.kubectl("create", "namespace", namespace)
        process = OperatorProcess(self.cluster.kubeconfig, namespace, self.folder, self.arguments.workers)
        try:
            observer = Observer(self.api, namespace)
            process.wait_acting()
            calls, before, used_before = process.calls(), self.processor_seconds(), process.processor_seconds()
            started = time.monotonic()
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda name: self.create(namespace, name, observer), self.names(namespace, count)))
            created = time.monotonic() - started
            # No watch of our own on FineTunes, which the bare side has no like of: they are asked once the last Jobs are through.
            waiting = set(self.names(namespace, count))
            while waiting:
                time.sleep(0.02)
                if process.process.poll() is not None:
                    raise SystemExit(f"the operator ended:\n{process.log.read_text()[-3000:]}")
                if time.monotonic() - started > 60 + count + 2 * len(STAGES) * self.arguments.seconds:
                    raise SystemExit(f"not done in time: {len(waiting)}\n{process.log.read_text()[-3000:]}")
                if observer.ended[STAGES[-1]] == count:
                    waiting -= {name for name in waiting if self.phase(namespace, name) == "Succeeded"}
            wall = time.monotonic() - started
            used = {name: value - before[name] for name, value in self.processor_seconds().items()}
            used["operator"] = process.processor_seconds() - used_before
            observer.stop()
            if quiet:
                return wall
            print(f"\n── operator: {count} FineTunes in {wall:.1f} s (created in {created:.1f} s)")
            _print_processor(used, wall)
            _print_latency(observer)
            process.print_queue()
            done = process.quiet_calls()
            _print_calls({key: value - calls.get(key, 0) for key, value in done.items()}, count)
            print(
                f"   memory of the operator: {process.memory('VmRSS'):.0f} MB, at most {process.memory('VmHWM'):.0f} MB"
            )
            if idle:
                time.sleep(idle)
                later = process.calls()
                wrote = {
                    key: later[key] - done.get(key, 0)
                    for key in later
                    if key[0] in WRITES and key[1] != "leases" and later[key] != done.get(key, 0)
                }
                print(f"   writes in {idle:.0f} s with nothing to do: {sum(wrote.values()):.0f} {wrote or ''}")
            return wall
        finally:
            process.stop()

    def names(self, namespace: str, count: int) -> list[str]:
        return [TEMPLATE] if namespace == "warm-up" else [f"ft-{number:05}" for number in range(count)]

    def phase(self, namespace: str, name: str) -> str:
        return str(self.api.get(FINE_TUNES, namespace, name).get("status", {}).get("phase"))

    def create(self, namespace: str, name: str, observer: "Observer") -> None:
        observer.complete[name, "created"] = time.monotonic()
        self.api.create(FINE_TUNES, namespace, _fine_tune(name))

    def processor_seconds(self) -> dict[str, float]:
        used = {component: _processor_seconds(self.cluster.pid(component)) for component in COMPONENTS}
        mine = resource.getrusage(resource.RUSAGE_SELF)
        return {**used, "this benchmark": mine.ru_utime + mine.ru_stime}


class OperatorProcess:
    def __init__(self, kubeconfig: Path, namespace: str, folder: Path, workers: int | None) -> None:
        self.log = folder / f"{namespace}.log"
        self._metrics, self._health = free_port(), free_port()
        config = folder / f"{namespace}.yaml"
        settings = {
            "jobs": {"image": "registry.example/kubepeft-jobs:1"},
            "watchNamespaces": [namespace],
            "metricsPort": self._metrics,
            "healthPort": self._health,
            **({"workers": workers} if workers else {}),
        }
        config.write_text(yaml.safe_dump(settings))
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kubepeft_operator", "--config", config, "--kubeconfig", kubeconfig],
                stdout=log,
                stderr=log,
                env={**os.environ, "POD_NAMESPACE": namespace},
            )

    def wait_acting(self) -> None:
        deadline = time.monotonic() + 60
        while '"acting"' not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the operator did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def calls(self) -> dict[tuple[str, str], float]:
        """By method and resource; watches count as one method of their own."""
        found: dict[tuple[str, str], float] = {}
        for (name, labels), value in self.samples().items():
            if name == "rest_client_requests_total":
                by = dict(labels)
                method = "WATCH" if by["verb"] == "watch" else by["method"]
                code = "" if by["code"].startswith("2") else f" ({by['code']})"
                key = method, by["resource"] + code
                found[key] = found.get(key, 0) + value
        return found

    def quiet_calls(self, seconds: float = 5, timeout: float = 600) -> dict[tuple[str, str], float]:
        """The calls, once all Events are sent, which nobody waits for and which are sent slowly: no write for so many seconds."""
        deadline = time.monotonic() + timeout
        done = self.calls()
        while time.monotonic() < deadline:
            time.sleep(seconds)
            before, done = done, self.calls()
            if all(done[key] == before.get(key) for key in done if key[0] in WRITES and key[1] != "leases"):
                break
        return done

    def print_queue(self) -> None:
        samples = self.samples()

        def total(name: str) -> float:
            return sum(value for (found, _), value in samples.items() if found == name)

        passes = total("controller_runtime_reconcile_time_seconds_count")
        busy = total("controller_runtime_reconcile_time_seconds_sum")
        waited = total("workqueue_queue_duration_seconds_sum") / max(1, total("workqueue_queue_duration_seconds_count"))
        print(
            f"   passes: {passes:.0f}, {busy / max(1, passes) * 1000:.1f} ms each; keys waited {waited * 1000:.0f} ms on average"
        )

    def processor_seconds(self) -> float:
        return _processor_seconds(self.process.pid)

    def memory(self, field: str) -> float:
        """MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


class Observer:
    """A third party that sees when Jobs appear and when they are complete. Keys are (object, stage)."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.added: dict[tuple[str, str], float] = {}
        self.complete: dict[tuple[str, str], float] = {}
        self.ended = Counter[str]()
        self._informer = Informer(api, JOBS, Cache(), namespace=namespace, trim=_job)
        self._informer.add_handler(lambda old, new: self._saw(new))
        self._informer.start()
        self._informer.wait_synced(30)

    def _saw(self, job: Mapping[str, Any] | None) -> None:
        if job:
            now, key = time.monotonic(), (job["of"], job["stage"])
            self.added.setdefault(key, now)
            if job["complete"] and key not in self.complete:
                self.complete[key] = now
                self.ended[job["stage"]] += 1

    def stop(self) -> None:
        self._informer.stop()

    def latencies(self, before: str, stage: str) -> list[float]:
        return [
            at - self.complete[name, before]
            for (name, found), at in list(self.added.items())
            if found == stage and (name, before) in self.complete
        ]


def bare_side(what: dict[str, Any]) -> None:
    """Makes the Jobs of all objects, the next one of each when the one before it is complete, and prints how long that took."""
    url = urllib.parse.urlsplit(what["url"])
    pool = urllib3.HTTPSConnectionPool(
        url.hostname or "",
        url.port,
        maxsize=THREADS + 1,
        ca_certs=what["ca"],
        cert_file=what["certificate"],
        key_file=what["key"],
    )
    path = f"/apis/batch/v1/namespaces/{what['namespace']}/jobs"
    texts = [json.dumps(template) for template in what["templates"]]
    todo: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    version = json.loads(pool.request("GET", path).data)["metadata"]["resourceVersion"]

    def work() -> None:
        while (one := todo.get()) is not None:
            number, stage = one
            body = texts[stage].replace(TEMPLATE, f"ft-{number:05}")
            answer = pool.request("POST", path, body=body, headers={"Content-Type": "application/json"})
            if answer.status != 201:
                print(answer.data, file=sys.stderr)
                os._exit(1)

    def watch() -> None:
        seen: set[str] = set()
        finished, since = 0, version
        while (
            finished < what["count"]
        ):  # the API server cuts off a watch that does not keep up; it goes on where it was
            stream = pool.request("GET", f"{path}?watch=true&resourceVersion={since}", preload_content=False)
            rest = b""
            for data in stream.stream(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    job = json.loads(line)["object"]
                    name, since = job["metadata"]["name"], job["metadata"]["resourceVersion"]
                    conditions = job.get("status", {}).get("conditions", [])
                    if name in seen or not any(
                        one["type"] == "Complete" and one["status"] == "True" for one in conditions
                    ):
                        continue
                    seen.add(name)
                    _, number, stage = name.split("-")
                    if stage != STAGES[-1]:
                        todo.put((int(number), STAGES.index(stage) + 1))
                    elif (finished := finished + 1) == what["count"]:
                        return

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    watcher = threading.Thread(target=watch)
    started = time.monotonic()
    for thread in (*threads, watcher):
        thread.start()
    for number in range(what["count"]):
        todo.put((number, 0))
    watcher.join()
    wall = time.monotonic() - started
    for _ in threads:
        todo.put(None)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"wall": wall, "processor": used.ru_utime + used.ru_stime}))


def _fine_tune(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((REPOSITORY / "examples" / "qwen2.5-0.5b-lora.yaml").read_text())
    made["metadata"] = {"name": name}
    made["spec"]["output"]["uri"] = f"s3://adapters/{name}"
    made["spec"]["inference"]["shards"] = 1
    return made


def _job(obj: dict[str, Any]) -> dict[str, Any]:
    metadata, labels = obj["metadata"], obj["metadata"]["labels"]
    conditions = (obj.get("status") or {}).get("conditions") or []
    of = next(labels[label] for label in OWNER_LABELS.values() if label in labels)
    return {
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "of": of,
        "stage": labels[STAGE_LABEL],
        "complete": any(one["type"] == "Complete" and one["status"] == "True" for one in conditions),
    }


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _print_processor(used: Mapping[str, float], wall: float) -> None:
    shares = ", ".join(f"{name} {value:.1f}" for name, value in sorted(used.items(), key=lambda one: -one[1]))
    print(f"   processor seconds: {shares}; all {sum(used.values()):.0f} of {wall * (os.cpu_count() or 1):.0f}")


def _print_latency(observer: Observer) -> None:
    for before, stage in (("created", "prepare"), ("prepare", "train"), ("train", "infer")):
        found = sorted(observer.latencies(before, stage))
        if len(found) > 1:
            p50, p99 = found[len(found) // 2], found[int(len(found) * 0.99)]
            print(
                f"   {before} → {stage} is there: p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, longest {found[-1] * 1000:.0f} ms"
            )


def _print_calls(calls: Mapping[tuple[str, str], float], count: int) -> None:
    lines = [
        f"{method} {what} {value / count:.2f}"
        for (method, what), value in sorted(calls.items(), key=lambda one: -one[1])
        if value and what != "leases"
    ]
    writes = sum(value for (method, what), value in calls.items() if method in WRITES and what != "leases")
    events = sum(value for (method, what), value in calls.items() if method in WRITES and what == "events")
    print(f"   calls per FineTune: {', '.join(lines)}")
    print(f"   writes per FineTune: {writes / count:.2f}, of which events {events / count:.2f}")


def _spread(walls: list[float]) -> str:
    return f"{statistics.median(walls):.1f} s" + (f" ({min(walls):.1f} to {max(walls):.1f})" if len(walls) > 1 else "")


if __name__ == "__main__":
    main()
