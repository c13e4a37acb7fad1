"""What the dashboards show of all that the other files' tests did; pytest runs this file last."""

import time

import pytest

from tests.chart import dashboards
from tests.cluster import build
from tests.e2e.installation import Prometheus


def test_every_panel_of_every_dashboard_shows_what_was_done(
    prometheus: Prometheus, request: pytest.FixtureRequest
) -> None:
    if not any("test_trouble" in item.nodeid for item in request.session.items):
        pytest.skip("shows something after the other files of this folder")
    end = time.time()
    # Left to be looked at.
    (build.REPOSITORY / ".build" / "dashboards.html").write_text(
        dashboards.page(prometheus.url, prometheus.since, end, interval="15s")
    )
    assert dashboards.empty(prometheus.url, prometheus.since, end, interval="15s") == []
