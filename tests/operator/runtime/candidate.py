"""A process that wants to lead, for the tests of leader election: `candidate.py KUBECONFIG NAMESPACE NAME DURATION CLOCK_OFFSET`.

While it leads it writes its name into the ConfigMap `written`, says so, and rests for 100 ms. It ends with 3 when it loses the lease and
0 on SIGTERM.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from kubepeft_operator.runtime.api import Api, ApiError, NotLeading, Resource
from kubepeft_operator.runtime.leader import Elector

CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")


def main(kubeconfig: str, namespace: str, name: str, duration: float, offset: float) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    elector = Elector(
        Api.connect(Path(kubeconfig), user_agent=f"elector-{name}", timeout=duration / 4),
        namespace,
        "the-lease",
        name,
        on_lost=lambda: os._exit(3),
        lease_duration=duration,
        renew_deadline=duration * 2 / 3,
        retry_period=duration / 8,
        wall_clock=lambda: time.time() + offset,
    )
    api = Api.connect(Path(kubeconfig), user_agent=f"writer-{name}", timeout=5, guard=elector.may_act)
    elector.start()
    print("waits", flush=True)
    while not stop.is_set() and not elector.wait_leading(0.02):
        pass
    print("leads" if elector.leading.is_set() else "stops", flush=True)
    count = 0
    while not stop.is_set():
        count += 1
        try:
            api.patch(CONFIG_MAPS, namespace, "written", {"data": {"by": name, "count": str(count)}})
            print("wrote", flush=True)
        except (NotLeading, ApiError) as error:
            print(error.reason, flush=True)
        stop.wait(0.1)
    elector.release()


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5]))
