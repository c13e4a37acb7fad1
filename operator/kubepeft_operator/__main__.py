"""The operator's process: `python -m kubepeft_operator --config FILE`. It puts the parts together, and ends them in order.

Every replica keeps its caches warm; only the one that holds the lease acts, and it asks for that before each write.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from prometheus_client import REGISTRY

from kubepeft import __version__, logs
from kubepeft.errors import KubepeftError
from kubepeft_operator import config as configuration
from kubepeft_operator import metrics, observe
from kubepeft_operator.config import Config
from kubepeft_operator.job import SELECTOR
from kubepeft_operator.progress import Key, Progress
from kubepeft_operator.reconcile import BATCH_INFERENCES, FINE_TUNES, REFERENCES, Caches, Reconciler
from kubepeft_operator.runtime.api import JOBS, PODS, Api, ConfigException, Object
from kubepeft_operator.runtime.cache import Name, name_of
from kubepeft_operator.runtime.controller import Controller
from kubepeft_operator.runtime.events import Events
from kubepeft_operator.runtime.informer import Handler, Informer
from kubepeft_operator.runtime.leader import Elector
from kubepeft_operator.runtime.queue import Queue
from kubepeft_operator.runtime.serve import HealthServer, MetricsServer

log = logging.getLogger("kubepeft.operator")

USER_AGENT = f"kubepeft-operator/{__version__}"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kubepeft_operator", description="The kubepeft operator.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="what the chart's ConfigMap holds")
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="outside a cluster; default: $KUBECONFIG")
    arguments = parser.parse_args()
    logs.configure()
    try:
        return run(configuration.load(arguments.config), arguments.kubeconfig)
    except KubepeftError as error:
        log.error("%s", error)
        return error.exit_code
    except ConfigException as error:
        log.error("no way to the API server: %s", error)
        return 78  # EX_CONFIG


def run(config: Config, kubeconfig: Path | None) -> int:
    """Run until SIGTERM. Returns: the exit code; a lost lease ends the process with 1 from elsewhere."""
    stopping = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    identity = os.environ.get("POD_NAME") or socket.gethostname()
    elector = _elector(config, kubeconfig, identity)
    api = Api.connect(
        kubeconfig,
        user_agent=USER_AGENT,
        connections=2 * config.workers + 4 * max(1, len(config.watch_namespaces)) + 4,
        guard=elector.may_act if elector else None,
    )
    caches = Caches()
    REGISTRY.register(metrics.Fleet(caches.fine_tunes, caches.batch_inferences))
    queues: dict[str, Queue[Name]] = {"FineTune": Queue("finetune"), "BatchInference": Queue("batchinference")}

    def changed(key: Key) -> None:
        queues[key[0]].add((key[1], key[2]))

    events = Events(api, "kubepeft.io/operator", identity)
    progress = Progress(changed, interval=config.progress_interval_seconds)
    reconciler = Reconciler(api, caches, events, progress, config)
    controllers = [
        Controller("finetune", reconciler.fine_tune, config.workers, queues["FineTune"]),
        Controller("batchinference", reconciler.batch_inference, config.workers, queues["BatchInference"]),
    ]
    informers = _informers(api, config, caches, queues)
    healthy = [informer.problem for informer in informers] + [controller.problem for controller in controllers]
    if elector:
        healthy.append(elector.problem)
    health = HealthServer(config.health_port, healthy=healthy, ready=[lambda: _not_synced(informers)])
    page = MetricsServer(config.metrics_port)
    log.info("started", extra={"version": __version__, "metrics": page.port, "health": health.port})

    for informer in informers:
        informer.start()
    if elector:
        elector.start()
    while not stopping.is_set() and not all(informer.wait_synced(0.2) for informer in informers):
        pass
    while elector and not stopping.is_set() and not elector.wait_leading(0.2):
        pass
    acting = not stopping.is_set()
    if acting:
        log.info("acting", extra={"finetunes": len(caches.fine_tunes), "jobs": len(caches.jobs)})
        events.start()
        progress.start()
        for controller in controllers:
            controller.start()
        stopping.wait()

    log.info("stopping")
    if acting:
        progress.stop()
        for controller in controllers:
            controller.stop()
        events.stop()
    if elector:
        elector.release()
    for informer in informers:
        informer.stop()
    page.stop()
    health.stop()
    return 0


def _elector(config: Config, kubeconfig: Path | None, identity: str) -> Elector | None:
    wish = config.leader_election
    if not wish.enabled:
        return None

    def lost() -> None:
        # At once: whatever this process still has in hand, another one acts now.
        logging.shutdown()
        os._exit(1)

    timeout = min(5.0, wish.renew_deadline / 2)
    return Elector(
        Api.connect(kubeconfig, user_agent=USER_AGENT, connections=1, timeout=timeout),
        _own_namespace(),
        wish.lease_name,
        identity,
        on_lost=lost,
        lease_duration=wish.lease_duration,
        renew_deadline=wish.renew_deadline,
        retry_period=wish.retry_period,
    )


def _own_namespace() -> str:
    """Where the lease is kept: the namespace that the operator runs in."""
    if namespace := os.environ.get("POD_NAMESPACE"):
        return namespace
    try:
        return NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


def _informers(api: Api, config: Config, caches: Caches, queues: dict[str, Queue[Name]]) -> list[Informer]:
    """One a kind, and where only some namespaces are watched, one a kind and namespace."""

    def on(handle: Callable[[Object], None], is_news: Callable[[Object, Object], bool] | None = None) -> Handler:
        def handler(old: Object | None, new: Object | None) -> None:
            obj = new or old
            if obj and (is_news is None or not old or not new or is_news(old, new)):
                handle(obj)

        return handler

    def fine_tune(obj: Object) -> None:
        queues["FineTune"].add(name_of(obj))
        for waiting in caches.batch_inferences.by_index(REFERENCES, "/".join(name_of(obj))):
            queues["BatchInference"].add(name_of(waiting))

    def batch_inference(obj: Object) -> None:
        queues["BatchInference"].add(name_of(obj))
        owner(obj)

    def owner(obj: Object) -> None:
        for one in obj["metadata"].get("ownerReferences") or ():
            if one.get("controller") and one["kind"] in queues:
                queues[one["kind"]].add((obj["metadata"]["namespace"], one["name"]))

    def pod(obj: Object) -> None:
        for one in obj["metadata"]["ownerReferences"]:
            if job := caches.jobs.get(obj["metadata"]["namespace"], one["name"]):
                owner(job)

    made = []
    namespaces: list[str | None] = [*config.watch_namespaces] or [None]
    for namespace in namespaces:
        for resource, cache, handler, trim, selector in (
            (FINE_TUNES, caches.fine_tunes, on(fine_tune), observe.trim_object, ""),
            (BATCH_INFERENCES, caches.batch_inferences, on(batch_inference), observe.trim_object, ""),
            (JOBS, caches.jobs, on(owner, observe.is_news), observe.trim_job, SELECTOR),
            (PODS, caches.pods, on(pod), observe.trim_pod, SELECTOR),
        ):
            informer = Informer(api, resource, cache, namespace=namespace, label_selector=selector, trim=trim)
            informer.add_handler(handler)
            made.append(informer)
    return made


def _not_synced(informers: list[Informer]) -> str | None:
    missing = [informer.resource.plural for informer in informers if not informer.synced]
    return f"not listed yet: {', '.join(missing)}" if missing else None


if __name__ == "__main__":
    sys.exit(main())
