"""Databases that are not there yet, and replicas that start in one moment."""

import contextlib
import logging
import sys
from pathlib import Path

import pytest

from control_plane.database.engine import open_database
from control_plane.database.migrate import migrate, migrate_when_reachable, migration_state
from models.errors import UnavailableError
from tests.simulators.postgres import empty
from tests.simulators.processes import free_port, running

ROOT = Path(__file__).parents[3]


class EnoughError(Exception):
    """Ends a wait that has no end."""


def test_a_server_that_is_away_is_waited_for_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise EnoughError

    with caplog.at_level(logging.INFO, "sortline.database"), pytest.raises(EnoughError):
        migrate_when_reachable(
            f"postgresql://sortline@127.0.0.1:{free_port()}/sortline", waiting=said.append, pause=pause
        )
    assert len(said) == 1
    assert said[0].startswith("waits for the database at 127.0.0.1: ")
    assert "\n" not in said[0]
    assert [record.getMessage() for record in caplog.records] == said


def test_a_file_that_cannot_be_made_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnavailableError) as caught:
        migrate_when_reachable(f"sqlite:///{tmp_path / 'folder'}", waiting=pytest.fail, pause=pytest.fail)
    assert caught.value.code == "database.unreachable"


@pytest.mark.slow
@pytest.mark.postgresql
def test_replicas_that_start_in_one_moment_migrate_one_after_the_other(postgres: str, tmp_path: Path) -> None:
    empty(postgres)
    code = f"from control_plane.database.migrate import migrate; migrate({postgres!r})"
    logs = [(tmp_path / f"{number}.log").open("w+") for number in range(3)]
    with contextlib.ExitStack() as stack:
        replicas = [
            stack.enter_context(running([sys.executable, "-c", code], stderr=stack.enter_context(log), cwd=ROOT))
            for log in logs
        ]
        for replica, log in zip(replicas, logs, strict=True):
            assert replica.wait(120) == 0, Path(log.name).read_text(encoding="utf-8")[-2000:]
    engine = open_database(postgres)
    try:
        current, needed = migration_state(engine)
        assert current == needed
        migrate(postgres)  # nothing is left to do
    finally:
        engine.dispose()
