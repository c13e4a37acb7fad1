"""pytest fixtures of the tiers that need a Kubernetes: a control plane, a node that runs pods, simulated nodes.

A test gets its tier's marker from the fixtures that it asks for. What the machine lacks skips the test and says so, but under CI=true
it fails.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.cluster.build import CannotBuild
from tests.cluster.control_plane import ControlPlane, control_plane_logs
from tests.cluster.node import Cluster
from tests.cluster.simulated import SimulatedNodes

TIERS = {"control_plane": "cluster", "new_control_plane": "cluster", "node": "node", "simulate": "scale"}
"""Fixture → marker."""

_numbers = itertools.count(1)
_Cluster = TypeVar("_Cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in TIERS:
                item.add_marker(TIERS[fixture])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.failed:
        report.sections.extend((f"log of {name}", text) for name, text in control_plane_logs())
    return report


def start(make: Callable[[], _Cluster]) -> _Cluster:
    """What `make` starts; where this machine lacks something for it, the test is skipped, under CI=true it fails."""
    try:
        return make()
    except CannotBuild as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The control plane that a session's tests share, with an audit log. Leave it as it was found: use `namespace`."""
    with start(lambda: ControlPlane(audit=True)) as running:
        yield running


@pytest.fixture
def new_control_plane() -> Iterator[Callable[..., ControlPlane]]:
    """Makes control planes (with the arguments of ControlPlane) for one test alone, such as one that stops a component."""
    made: list[ControlPlane] = []

    def make(**arguments: Any) -> ControlPlane:
        made.append(start(lambda: ControlPlane(**arguments)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def node() -> Iterator[Cluster]:
    """The one-node cluster that a session's tests share, with an audit log. Leave it as it was found: use `node_namespace`."""
    with start(lambda: Cluster(audit=True)) as running:
        yield running


@pytest.fixture
def simulate() -> Iterator[Callable[..., SimulatedNodes]]:
    """Makes control planes with simulated nodes (with the arguments of SimulatedNodes) for one test alone."""
    made: list[SimulatedNodes] = []

    def make(*arguments: Any, **named: Any) -> SimulatedNodes:
        made.append(start(lambda: SimulatedNodes(*arguments, **named)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of the shared control plane for one test."""
    yield from _namespace(control_plane)


@pytest.fixture
def node_namespace(node: Cluster) -> Iterator[str]:
    """A namespace of the shared one-node cluster for one test; its pods are gone when the test is over."""
    yield from _namespace(node)


def _namespace(cluster: ControlPlane) -> Iterator[str]:
    name = f"test-{os.getpid()}-{next(_numbers)}"
    cluster.request("/api/v1/namespaces", "POST", {"metadata": {"name": name}})
    yield name
    pods = f"/api/v1/namespaces/{name}/pods"
    cluster.request(pods, "DELETE", {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0})
    cluster.request(f"/api/v1/namespaces/{name}", "DELETE")
