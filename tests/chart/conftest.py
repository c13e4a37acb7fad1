"""A control plane of their own for the chart's tests: they install and remove what belongs to the whole cluster."""

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.cluster.fixtures import start


@pytest.fixture(scope="session")
def chart_cluster() -> Iterator[ControlPlane]:
    """A control plane for the tests of one chart; each leaves it without a release."""
    with start(lambda: ControlPlane(audit=True)) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chart_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")
        if "operator_image" in getattr(item, "fixturenames", ()):
            item.add_marker("node")
