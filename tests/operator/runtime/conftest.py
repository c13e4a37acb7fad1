"""A client of the real API server, straight and through a proxy that makes faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kubepeft_operator.runtime.api import Api
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import ApiProxy
from tests.operator.runtime.parts import proxy_to


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Api]:
    client = Api.connect(control_plane.kubeconfig, user_agent="test")
    yield client
    client.close()


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[ApiProxy]:
    with proxy_to(control_plane) as running:
        yield running


@pytest.fixture
def proxied(proxy: ApiProxy) -> Iterator[Api]:
    """A client that goes through the proxy and gives up on an answer after two seconds."""
    client = Api.connect(proxy.kubeconfig, user_agent="test", timeout=2)
    yield client
    client.close()


@pytest.fixture
def kubeconfig(control_plane: ControlPlane) -> Path:
    return control_plane.kubeconfig
