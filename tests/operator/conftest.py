"""A real control plane with the two kinds, and a player that runs its pods."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kubepeft import crd
from kubepeft_operator.runtime.api import Api
from tests.cluster.control_plane import ControlPlane
from tests.operator.faults import ApiProxy
from tests.operator.harness import Cluster, Operator
from tests.operator.player import Play, Player


@contextmanager
def played(plane: ControlPlane) -> Iterator[tuple[Api, Player]]:
    """The control plane with the two kinds and a player: an administrator's client, and the player."""
    plane.apply(*crd.definitions())
    for one in crd.definitions():
        plane.kubectl("wait", "--for=condition=Established", f"crd/{one['metadata']['name']}")
    client = Api.connect(plane.kubeconfig, user_agent="test")
    player = Player(client)
    player.start()
    try:
        yield client, player
    finally:
        player.stop()
        client.close()


@pytest.fixture(scope="session")
def _played(control_plane: ControlPlane) -> Iterator[tuple[Api, Player]]:
    with played(control_plane) as running:
        yield running


@pytest.fixture(scope="session")
def admin(_played: tuple[Api, Player]) -> Api:
    """An administrator's client; the two kinds are there."""
    return _played[0]


@pytest.fixture
def player(_played: tuple[Api, Player]) -> Player:
    """The player with nothing remembered: pods succeed at once."""
    running = _played[1]
    running.script = lambda pod: Play()
    running.started.clear()
    return running


@pytest.fixture
def cluster(admin: Api, namespace: str, player: Player) -> Cluster:
    return Cluster(admin, namespace)


@pytest.fixture
def proxy(control_plane: ControlPlane, admin: Api) -> Iterator[ApiProxy]:
    """A way to the API server that can be spoiled."""
    certificate, key = control_plane.authority.issue("proxy", "proxy", groups=["system:masters"])
    with ApiProxy(control_plane.url, control_plane.ca, certificate, key, control_plane.folder) as running:
        yield running


@pytest.fixture
def run_operator(proxy: ApiProxy, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Operator]]:
    """Starts replicas that go through the proxy; at the end none may have logged a defect."""
    made: list[Operator] = []

    def start(**config: Any) -> Operator:
        made.append(Operator(proxy.kubeconfig, namespace, tmp_path, **config))
        return made[-1]

    yield start
    for one in made:
        one.kill()
    assert [one.defects() for one in made] == [[] for _ in made]
