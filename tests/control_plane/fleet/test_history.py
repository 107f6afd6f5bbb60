"""The set-up of an agent is kept from when to when: a row where it changes, none where it does not."""

from datetime import UTC, datetime, timedelta

from sqlmodel import select

from control_plane.database.engine import reading
from control_plane.database.tables.windows import AgentHistory
from control_plane.fleet.history import next_change, parse_set_up, set_up_at
from control_plane.fleet.intake import Message
from control_plane.services import Services, open_services
from models.messages import Reported, RunningLot, encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import A, B, reported

START = datetime(2026, 3, 14, 10, 0, tzinfo=UTC)


def say(services: Services, minutes: float, said: Reported, *, retained: bool = False) -> None:
    at = START + timedelta(minutes=minutes)
    services.ingest.store([Message(0, at, "line-1", Channel.REPORTED, encode(said), retained=retained)])


def history(services: Services) -> list[AgentHistory]:
    with reading(services.engine) as session:
        return list(session.exec(select(AgentHistory).order_by(AgentHistory.id)))


def test_a_change_makes_a_row_and_counters_make_none(services: Services) -> None:
    say(services, 0, reported(active=A, items_on_active=1))
    say(services, 2, reported(active=A, items_on_active=99, rss_mb=3.0, counters={"x": 1}))
    say(services, 4, reported(active=A, lot=RunningLot(lot="7", variety="gala")))
    say(services, 6, reported(active=B, lot=RunningLot(lot="7", variety="gala")))
    assert len(history(services)) == 3
    with reading(services.engine) as session:
        for minutes, active, lot in ((0, A, ""), (3.9, A, ""), (4, A, "7"), (5.9, A, "7"), (6, B, "7"), (600, B, "7")):
            set_up, _ = set_up_at(session, "line-1", START + timedelta(minutes=minutes))
            assert (set_up.active, set_up.lot.lot) == (active, lot)
        assert set_up_at(session, "line-1", START - timedelta(seconds=1)) is None
        assert next_change(session, "line-1", START) == START + timedelta(minutes=4)
        assert next_change(session, "line-1", START + timedelta(minutes=6)) is None


def test_a_replica_and_a_restart_compare_with_what_is_stored(services: Services) -> None:
    other = open_services(services.config)
    say(services, 0, reported(active=A))
    say(other, 2, reported(active=A, items_on_active=5))
    say(other, 4, reported(active=B))
    say(services, 6, reported(active=A, items_on_active=9))
    assert [row.facts["active"] for row in history(services)] == [A, B, A]
    other.engine.dispose()


def test_text_no_database_holds_is_made_fit_and_a_foreign_row_is_read_as_far_as_it_goes(services: Services) -> None:
    say(services, 0, reported(active=A, camera="a\x00b"))
    assert history(services)[0].facts["camera"] == "a\u2400b"
    assert parse_set_up({"active": A, "phase": "of another version", "camera": "x"}).active == A
