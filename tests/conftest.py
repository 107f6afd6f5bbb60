"""Rules for every test: skips are failures where they are forbidden, and slow tests run on request."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from control_plane.services import Services
from tests.simulators.plane import make_services
from tests.simulators.postgres import empty, private_postgres

# How long one example takes says how busy the machine is, not whether the code is right.
settings.register_profile("sortline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sortline")


ASKED_FOR = ("slow", "mosquitto", "postgresql", "images")
"""Tests with these markers run in `.ci/run`, except `images`. Those of `mosquitto` and `postgresql` are the same as on
the embedded broker and on SQLite, once more on the counterpart of production."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take long, or repeat others on another program, run only when a marker expression asks for them."""
    if config.getoption("-m"):
        return
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in ASKED_FOR)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """`SORTLINE_NO_SKIPS=1` (continuous integration) turns a skip into a failure."""
    report = yield
    if os.environ.get("SORTLINE_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where no skip is allowed: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a private PostgreSQL server, one for the whole run."""
    yield from private_postgres(tmp_path_factory.mktemp("postgres"))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    """A control plane without a broker, on both databases."""
    url = ""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")
        empty(url)
    found = make_services(tmp_path / "plane", database=url)
    yield found
    found.engine.dispose()
