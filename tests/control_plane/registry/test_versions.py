"""Versions of models: one name whatever its case."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlmodel import select

from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.registry import Model
from control_plane.registry.versions import find_version, register
from control_plane.services import Services
from tests.simulators.plane import make_services
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


def test_names_that_differ_by_case_alone_are_one_model(services: Services, tmp_path: Path) -> None:
    for number, name in enumerate(("tiny", "Tiny")):
        tiny_bundle(tmp_path / name, name=name, view_px=16, bias=0.1 * number)
        with writing(services.engine) as session:
            register(session, services.store, tmp_path / name, actor="t", now=utc_now())
            session.commit()
    with reading(services.engine) as session:
        assert [model.name for model in session.exec(select(Model))] == ["tiny"]
        assert find_version(session, "TINY")[1].number == 2
        assert find_version(session, "Tiny:1")[1].number == 1
