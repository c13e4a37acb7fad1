"""One installation for all end-to-end tests: building and loading its images takes minutes."""

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.cluster.fixtures import start
from tests.cluster.node import Cluster
from tests.e2e.installation import Installation, Prometheus, Team, found_team, install

_numbers = count(1)


@pytest.fixture(scope="session")
def installation(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = install(node, tmp_path_factory.mktemp("installation"))
    yield start(lambda: next(made))
    made.close()


@pytest.fixture(scope="session", autouse=True)
def prometheus(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It watches from the first test on, so that the last ones find something to draw."""
    running = Prometheus(installation.cluster, tmp_path_factory.mktemp("prometheus") / "here")
    yield running
    running.stop()


@pytest.fixture
def team(installation: Installation) -> Iterator[Team]:
    """A namespace of its own, removed with all that is in it when the test is over."""
    one = found_team(installation, f"team-{next(_numbers)}")
    yield one
    one.cluster.kubectl("delete", "namespace", one.namespace, "--wait=false")
    one.cluster.request(
        f"/api/v1/namespaces/{one.namespace}/pods",
        "DELETE",
        {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0},
    )


@pytest.fixture
def make_team(installation: Installation) -> Callable[[str], Team]:
    return lambda name: found_team(installation, name)
