"""The audit trail is checked step by step, and leases that no clock could have given are void."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from control_plane.database import audit_check
from control_plane.database.audit import audit
from control_plane.database.audit_check import AuditCheck, AuditStatus
from control_plane.database.engine import open_database, reading, writing
from control_plane.database.leases import CLOCK_SLACK, leases_ahead, take_lease
from control_plane.database.migrate import migrate
from control_plane.database.tables.audit import Audit

T0 = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'plane.db'}"
    migrate(url)
    found = open_database(url)
    yield found
    found.dispose()


def append(engine: Engine, count: int) -> None:
    with writing(engine) as session:
        for number in range(count):
            audit(session, "maria", "rollout.create", str(number), {"n": number}, T0)
            session.flush()
        session.commit()


def change(engine: Engine, number: int) -> None:
    with writing(engine) as session:
        entry = session.get_one(Audit, number)
        entry.actor = "otto"
        session.add(entry)
        session.commit()


def look(check: AuditCheck, engine: Engine) -> AuditStatus:
    with reading(engine) as session:
        return check.look(session)


def test_each_look_checks_what_is_new(engine: Engine) -> None:
    check = AuditCheck(engine)
    assert look(check, engine) == AuditStatus(None, 0, 0)
    append(engine, 3)
    assert look(check, engine) == AuditStatus(None, 3, 3)
    append(engine, 2)
    assert look(check, engine) == AuditStatus(None, 5, 5)


def test_a_changed_entry_is_found_at_once_when_new_and_in_turn_when_old(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(engine, 4)
    change(engine, 3)
    assert look(AuditCheck(engine), engine).broken_entry == 3
    monkeypatch.setattr(audit_check, "_AGAIN", 2)
    append(engine, 1)
    with writing(engine) as session:
        entry = session.get_one(Audit, 3)
        entry.actor = "maria"
        session.add(entry)
        session.commit()
    check = AuditCheck(engine)
    assert look(check, engine) == AuditStatus(None, 5, 5)
    change(engine, 4)
    assert [look(check, engine).broken_entry for _ in range(2)][-1] == 4


def test_a_long_backlog_is_checked_beside_the_reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_check, "_AT_A_TIME", 3)
    append(engine, 20)
    check = AuditCheck(engine)
    assert look(check, engine).checked_through == 3
    for thread in [t for t in threading.enumerate() if t.name == "audit"]:
        thread.join(20.0)
    assert look(check, engine) == AuditStatus(None, 20, 20)
    check.stop()


def test_a_lease_from_before_the_clock_was_set_back_is_void_and_named(engine: Engine) -> None:
    later = T0 + timedelta(hours=1)
    with writing(engine) as session:
        assert take_lease(session, "rollouts", "a", seconds=10.0, now=later) == 1
        session.flush()
        assert leases_ahead(session, later) == []
        assert leases_ahead(session, T0) == ["rollouts"]
        assert take_lease(session, "rollouts", "b", seconds=10.0, now=T0) == 2
        assert leases_ahead(session, T0) == []


def test_a_lease_within_the_slack_of_two_clocks_holds(engine: Engine) -> None:
    with writing(engine) as session:
        take_lease(session, "rollouts", "a", seconds=10.0, now=T0 + CLOCK_SLACK)
        session.flush()
        assert take_lease(session, "rollouts", "b", seconds=10.0, now=T0) is None
        assert take_lease(session, "rollouts", "a", seconds=10.0, now=T0) == 1
