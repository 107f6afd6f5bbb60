"""Messages of agents are stored once or refused by name; assignments and commands reach their agent."""

from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from control_plane.database.audit import audit, broken_audit_entry
from control_plane.database.engine import reading, writing
from control_plane.database.leases import take_lease
from control_plane.database.migrate import _alembic, migration_state
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.jobs import JobKind, JobState
from control_plane.database.tables.registry import Stage
from control_plane.database.tables.rollouts import Rollout
from control_plane.jobs.queue import cancel, claim, finish, get_job, heartbeat, submit
from control_plane.registry.versions import find_version, register, set_stage
from control_plane.rollouts.records import Order, create_rollout
from control_plane.services import Services
from models.bundle import read_bundle
from models.errors import ConflictError, InputError, MessageError, UnavailableError
from models.messages import Batch, Event, Phase, Presence, Record, RecordKind, Reported, encode, encode_batch
from models.topics import Channel, agent_topic
from models.windows import Window
from tests.simulators.plane import release
from tests.simulators.tiny_bundle import tiny_bundle

BOOT = "0123456789abcdef"
A, B = "a" * 64, "b" * 64


def window(items: int = 10, bundle: str = A, **changes: object) -> Window:
    fields = {
        "started_ms": 1_700_000_000_000,
        "duration_ms": 10_000,
        "bundle": bundle,
        "items": items,
        "classes": {"sound": items},
        "outlets": {"pass": items},
        "lanes": (items,),
    }
    return Window(**(fields | changes))


def batch(*payloads: object, first: int = 0) -> bytes:
    records = []
    for at, value in enumerate(payloads):
        kind = RecordKind.EVENT if isinstance(value, Event) else RecordKind.WINDOW
        payload = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
        records.append(Record(boot_id=BOOT, seq=first + at, kind=kind, payload=payload))
    return encode_batch(Batch(records=tuple(records)))


def say(services: Services, channel: Channel, payload: bytes, agent: str = "line-1") -> None:
    services.ingest.take(agent_topic(agent, channel), payload)


def reported(**changes: object) -> Reported:
    return Reported(**({"boot_id": BOOT, "at_ms": 1, "line_running": True} | changes))


# SQLite cannot tell an index over an expression from its text.
@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection:sqlalchemy.exc.SAWarning")
def test_the_migration_makes_the_tables_of_this_program(services: Services) -> None:
    current, needed = migration_state(services.engine)
    assert current == needed
    if services.engine.dialect.name == "sqlite":
        from alembic import command

        command.check(_alembic(services.config.database_url))


def test_a_broker_that_lost_its_store_gets_everything_also_when_the_database_was_away(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, connection, tried = services.outbox, services.connection, []

    def republish() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OperationalError("select", {}, Exception("the database is away"))

    monkeypatch.setattr(outbox, "republish", republish)
    monkeypatch.setattr(outbox._stopping, "wait", lambda _s: False)
    monkeypatch.setattr(connection.sentinel_seen, "wait", lambda _s: False)
    connection.connected_again.set()
    outbox._after_connect()
    assert connection.connected_again.is_set()
    outbox._after_connect()
    assert len(tried) == 2
    assert services.counters["republish_failed"] == 1
    assert not connection.connected_again.is_set()


def test_a_batch_is_stored_once_however_often_it_comes(services: Services) -> None:
    data = batch(window(), Event(at_ms=5, code="x.y", facts={"a": "b"}), window(3))
    for _ in range(3):
        say(services, Channel.BATCH, data)
    with reading(services.engine) as session:
        assert [row.items for row in session.exec(select(WindowRow).order_by(WindowRow.seq))] == [10, 3]
        assert [row.code for row in session.exec(select(EventRow))] == ["x.y"]
    assert services.counters["duplicates"] == 6


def test_a_record_that_is_no_good_is_kept_as_refused_and_does_not_block(services: Services) -> None:
    say(services, Channel.BATCH, batch(b"rubbish", window(items=4, classes={"sound": 1}), window(7)))
    with reading(services.engine) as session:
        rows = session.exec(select(WindowRow).order_by(WindowRow.seq)).all()
        assert [(row.items, row.refused) for row in rows] == [(4, "window.inconsistent"), (7, "")]
        assert session.exec(select(EventRow)).one().code == "message.malformed"
    assert services.board.all()[0].completeness == 1.0


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("sortline/v1/agents/line-1/batch", b"rubbish"),
        ("sortline/v1/agents/line-1/reported", b"{}"),
        ("sortline/v1/agents/line-1/presence", b"x" * 10_000),
        ("sortline/v1/agents/line-1/response", b"{}"),
        ("sortline/v1/agents/line-1/desired", b"{}"),
        ("sortline/v1/agents/LINE/batch", b""),
        ("other", b""),
    ],
)
def test_hostile_messages_are_refused_by_name(services: Services, topic: str, payload: bytes) -> None:
    with pytest.raises(MessageError):
        services.ingest.take(topic, payload)


def test_the_will_of_an_older_boot_does_not_put_an_agent_offline(services: Services) -> None:
    say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT)))
    say(services, Channel.PRESENCE, encode(Presence(online=False, boot_id="f" * 16)))
    with reading(services.engine) as session:
        assert session.get(Agent, "line-1").online
    say(services, Channel.PRESENCE, encode(Presence(online=False, boot_id=BOOT)))
    with reading(services.engine) as session:
        assert not session.get(Agent, "line-1").online


def register_tiny(services: Services, root: Path, **options: object) -> str:
    tiny_bundle(root, **options)
    with writing(services.engine) as session:
        version = register(session, services.store, root, actor="t", now=utc_now())
        session.commit()
    return release(services, version.bundle)


def test_a_bundle_is_registered_once_and_found_by_name_number_and_digest(services: Services, tmp_path: Path) -> None:
    first = register_tiny(services, tmp_path / "1")
    second = register_tiny(services, tmp_path / "2", bias=1.0)
    with writing(services.engine) as session:
        assert register(session, services.store, tmp_path / "1", actor="t", now=utc_now()).number == 1
        for reference, digest in (("tiny", second), ("tiny:1", first), ("tiny:2", second), (first, first)):
            assert find_version(session, reference)[1].bundle == digest
        for reference in ("none", "tiny:9", "tiny:x", "0" * 64):
            with pytest.raises(InputError):
                find_version(session, reference)
        for number in ("1", "2"):
            set_stage(session, f"tiny:{number}", Stage.PRODUCTION, actor="t", reason="r", now=utc_now())
        assert find_version(session, "tiny:1")[1].stage == Stage.ARCHIVED
        session.commit()
    directory = services.store.write_directory(first, tmp_path / "again")
    assert read_bundle(directory, digest=first).digest == first
    path = services.store._path(first)
    path.write_bytes(b"changed")
    with pytest.raises(UnavailableError) as caught:
        services.store.get(first)
    assert caught.value.code == "store.corrupt"


def test_the_audit_trail_notices_a_change(services: Services) -> None:
    with writing(services.engine) as session:
        for number in range(4):
            audit(session, "t", "did", str(number), {"n": number}, utc_now())
            session.flush()
        session.commit()
    with writing(services.engine) as session:
        assert broken_audit_entry(session) is None
        from control_plane.database.tables.audit import Audit

        entry = session.exec(select(Audit).where(Audit.object == "2")).one()
        entry.actor = "somebody else"
        session.add(entry)
        session.flush()
        assert broken_audit_entry(session) == entry.id
        session.rollback()


def test_one_holder_has_the_lease_and_a_new_one_gets_a_higher_fence(services: Services) -> None:
    now = utc_now()
    with writing(services.engine) as session:
        assert take_lease(session, "x", "one", seconds=10, now=now) == 1
        assert take_lease(session, "x", "two", seconds=10, now=now) is None
        assert take_lease(session, "x", "one", seconds=10, now=now + timedelta(seconds=9)) == 1
        assert take_lease(session, "x", "two", seconds=10, now=now + timedelta(seconds=30)) == 2
        assert take_lease(session, "x", "one", seconds=10, now=now + timedelta(seconds=31)) is None
        session.commit()


def test_a_job_whose_worker_died_is_taken_over_and_the_dead_one_writes_no_more(services: Services) -> None:
    engine, now = services.engine, utc_now()
    with writing(engine) as session:
        job_id = submit(session, JobKind.TRAIN, {"name": "x"}, actor="t", now=now).id
        session.commit()
    first = claim(engine, "w1", lease_s=5, max_attempts=2, now=now)
    assert first
    assert claim(engine, "w2", lease_s=5, max_attempts=2, now=now) is None
    second = claim(engine, "w2", lease_s=5, max_attempts=2, now=now + timedelta(seconds=6))
    assert second
    assert second.fence == first.fence + 1
    assert not heartbeat(engine, first, stage="s", progress=0.5, lines=["no"], lease_s=5)
    assert not finish(engine, first, JobState.SUCCEEDED)
    assert heartbeat(engine, second, stage="s", progress=0.5, lines=["yes"], lease_s=5)
    assert get_job(engine, job_id).log == "yes\n"
    with writing(engine) as session:
        cancel(session, job_id, actor="t", now=now)
        session.commit()
    assert not heartbeat(engine, second, stage="s", progress=0.6, lines=[], lease_s=5)
    assert finish(engine, second, JobState.CANCELLED)
    with writing(engine) as session, pytest.raises(ConflictError):
        cancel(session, job_id, actor="t", now=now)


def test_a_job_that_kills_its_workers_ends_as_failed(services: Services) -> None:
    engine, now = services.engine, utc_now()
    with writing(engine) as session:
        job_id = submit(session, JobKind.TRAIN, {}, actor="t", now=now).id
        session.commit()
    for attempt in range(2):
        assert claim(engine, "w", lease_s=1, max_attempts=2, now=now + timedelta(seconds=10 * attempt))
    assert claim(engine, "w", lease_s=1, max_attempts=2, now=now + timedelta(seconds=60)) is None
    assert get_job(engine, job_id).error["code"] == "job.too_many_attempts"


def fleet_of(services: Services, count: int) -> None:
    for number in range(count):
        labels = {"site": "north" if number % 2 else "south"}
        say(services, Channel.REPORTED, encode(reported(labels=labels)), f"line-{number}")


def report_done(services: Services, agent_id: str, bundle: str, **changes: object) -> None:
    with reading(services.engine) as session:
        generation = session.get(Agent, agent_id).generation
    facts = {"generation": generation, "active": bundle, "phase": Phase.COMMITTED, "items_on_active": 60}
    say(services, Channel.REPORTED, encode(reported(**(facts | changes))), agent_id)


def start_rollout(services: Services, **changes: object) -> int:
    values = {"reference": "tiny", "waves": (1, "100%"), "trial_items": 10, "trial_s": 30.0}
    who = {"actor": str(changes.pop("actor", "t")), "now": changes.pop("now", utc_now())}
    with writing(services.engine) as session:
        rollout = create_rollout(session, Order(**(values | changes)), **who)
        session.commit()
        return rollout.id


def state_of(services: Services, rollout_id: int) -> Rollout:
    with reading(services.engine) as session:
        return session.get(Rollout, rollout_id)
