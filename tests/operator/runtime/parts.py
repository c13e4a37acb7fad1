"""What the runtime's tests share: a plain kind of object, a proxy to a control plane, and waiting."""

import time
from collections.abc import Callable

from kubepeft_operator.runtime.api import Object, Resource
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import ApiProxy

CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def eventually(holds: Callable[[], object], timeout: float = 10) -> float:
    """Waits until it holds, and returns how many seconds that took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < timeout, f"did not come about in {timeout:g} s"
        time.sleep(0.01)
    return time.monotonic() - started


def proxy_to(control_plane: ControlPlane) -> ApiProxy:
    certificate, key = control_plane.authority.issue("proxy", "proxy", groups=["system:masters"])
    return ApiProxy(control_plane.url, control_plane.ca, certificate, key, control_plane.folder)
