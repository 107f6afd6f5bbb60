"""What is past its time goes in small steps that may stop anywhere; sums, and what nobody may count twice, stay."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlmodel import SQLModel, func, select

from control_plane.config import RetentionConfig
from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.leases import take_lease
from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.database.tables.audit import Audit
from control_plane.database.tables.windows import AgentHistory, FidelityHour, Rollup
from control_plane.fleet.intake import Message
from control_plane.monitoring import retention
from control_plane.monitoring.rollups import DAY, HOUR, MINUTE
from control_plane.monitoring.upkeep import LEASE, Upkeep, gauges_of
from control_plane.monitoring.windows import spans_of
from control_plane.services import Services
from models.messages import Batch, Event, Record, RecordKind, encode, encode_batch
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import BOOT, A, B, reported, window

NOW = datetime(2026, 6, 30, 12, 0, tzinfo=UTC)
POLICY = RetentionConfig(windows_days=2, minutes_days=5, hours_days=8, days_days=20, events_days=4, history_days=6)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.monitoring.upkeep.ROWS_AT_ONCE", 3)


@pytest.fixture
def upkeep(services: Services, monkeypatch: pytest.MonkeyPatch) -> Upkeep:
    found = Upkeep(services.engine, POLICY, services.counters, "test")
    monkeypatch.setattr(found._stop, "wait", lambda _s: False)
    return found


def send(services: Services, age: timedelta, seq: int, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores a record as if that was so long ago."""
    at = NOW - age
    monkeypatch.setattr("control_plane.fleet.ingest.utc_now", lambda: at)
    kind = RecordKind.EVENT if isinstance(value, Event) else RecordKind.WINDOW
    records = (Record(boot_id=BOOT, seq=seq, kind=kind, payload=msgspec.msgpack.encode(value)),)
    services.ingest.store([Message(0, at, "line-1", Channel.BATCH, encode_batch(Batch(records=records)), False)])


def fill(services: Services, monkeypatch: pytest.MonkeyPatch, days: int = 25, each_day: int = 4) -> None:
    for number in range(days * each_day):
        age = timedelta(days=days) - timedelta(hours=24 // each_day * number)
        started_ms = round((NOW - age).timestamp() * 1000)
        send(services, age, 2 * number, window(number % 9 + 1, started_ms=started_ms), monkeypatch)
        send(services, age, 2 * number + 1, Event(at_ms=started_ms, code="x.y"), monkeypatch)


def count(services: Services, table: type[SQLModel], *where: object) -> int:
    with reading(services.engine) as session:
        return session.exec(select(func.count()).select_from(table).where(*where)).one()


def test_every_kind_goes_in_its_time_and_sums_stay_what_they_were(
    services: Services, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(services, monkeypatch)
    with writing(services.engine) as session:
        audit(session, "ida", "x.y", "z", {}, NOW - timedelta(days=5000))
        session.commit()
    with reading(services.engine) as session:
        before = spans_of(session, "line-1", DAY, NOW - timedelta(days=19), NOW)
    upkeep.turn(NOW)
    with reading(services.engine) as session:
        after = spans_of(session, "line-1", DAY, NOW - timedelta(days=19), NOW)
    assert [(one.start, one.windows, one.window) for one in after] == [
        (one.start, one.windows, one.window) for one in before
    ]
    assert count(services, WindowRow) == 2 * 4
    assert count(services, EventRow) == 4 * 4
    for span_s, days in ((MINUTE, 5), (HOUR, 8), (DAY, 20)):
        with reading(services.engine) as session:
            oldest = session.exec(select(func.min(Rollup.start)).where(Rollup.span_s == span_s)).one()
        assert timedelta(days=days - 1) < NOW - oldest <= timedelta(days=days, hours=12)
    assert count(services, FidelityHour) == 8 * 4
    assert count(services, Audit) >= 1
    assert services.counters["deleted_windows"] == 25 * 4 - 8
    assert upkeep.turn(NOW) == 0
    assert upkeep.usage.overdue_s == 0
    assert upkeep.usage.database_bytes > 100_000
    assert gauges_of(upkeep)["sortline_oldest_window_age_seconds"][1] == 2 * 86_400


def test_a_turn_that_stops_anywhere_is_finished_by_the_next(
    services: Services, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(services, monkeypatch, days=6)
    real, steps = retention._windows, []

    def failing(*arguments: object) -> int:
        steps.append(1)
        if len(steps) in {2, 4}:
            raise OSError("the power failed")
        return real(*arguments)

    monkeypatch.setattr(retention, "_windows", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="power"):
            upkeep.turn(NOW)
    upkeep.turn(NOW)
    assert count(services, WindowRow) == 8
    with reading(services.engine) as session:
        assert sum(one.windows for one in spans_of(session, "line-1", DAY, NOW - timedelta(days=9), NOW)) == 24


def test_a_window_that_comes_again_after_it_was_deleted_is_not_counted_again(
    services: Services, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(services, monkeypatch, days=6)
    upkeep.turn(NOW)
    again = window(1, started_ms=round((NOW - timedelta(days=6)).timestamp() * 1000))
    send(services, timedelta(0), 0, again, monkeypatch)
    assert services.counters["windows_after_retention"] == 1
    with reading(services.engine) as session:
        assert sum(one.windows for one in spans_of(session, "line-1", DAY, NOW - timedelta(days=9), NOW)) == 24
    late = window(5, started_ms=round((NOW - timedelta(days=3)).timestamp() * 1000))
    send(services, timedelta(0), 999, late, monkeypatch)
    with reading(services.engine) as session:
        assert sum(one.windows for one in spans_of(session, "line-1", DAY, NOW - timedelta(days=9), NOW)) == 25


def test_the_newest_set_up_stays_however_old(
    services: Services, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, bundle in ((30, A), (20, B)):
        at = NOW - timedelta(days=days)
        said = encode(reported(active=bundle))
        services.ingest.store([Message(0, at, "line-1", Channel.REPORTED, said, retained=False)])
    upkeep.turn(NOW)
    with reading(services.engine) as session:
        assert [row.facts["active"] for row in session.exec(select(AgentHistory))] == [B]


def test_one_replica_deletes_and_the_others_do_not(
    services: Services, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(services, monkeypatch, days=4)
    with writing(services.engine) as session:
        take_lease(session, LEASE, "another", seconds=300, now=NOW)
        session.commit()
    assert upkeep.turn(NOW) == 0
    assert count(services, WindowRow) == 16


def test_a_policy_that_deletes_sums_before_their_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="windows_days <= minutes_days"):
        RetentionConfig(windows_days=30, minutes_days=10)
