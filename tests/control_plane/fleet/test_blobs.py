"""The broker holds each needed blob once and no other, within its budget; missing ones are published again."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sqlmodel import select

from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.blobs import RetainedBlob
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.blobs import Publisher
from control_plane.registry.versions import register
from control_plane.services import Services
from models.bundle import write_bundle
from models.chunking import CHUNK_BYTES
from models.errors import CapacityError, InputError
from models.messages import Request
from models.topics import BLOBS
from tests.simulators.plane import make_client, make_services, release
from tests.simulators.tiny_bundle import tiny_files


class Published:
    def is_published(self) -> bool:
        return True


class Broker:
    """A broker that keeps the last payload of each topic."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.sent: list[tuple[str, bytes]] = []

    def is_connected(self) -> bool:
        return True

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> Published:
        assert qos == 1
        self.sent.append((topic, payload))
        if retain and payload:
            self.held[topic] = payload
        elif retain:
            self.held.pop(topic, None)
        return Published()

    @property
    def bytes_held(self) -> int:
        return sum(len(data) for data in self.held.values())


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


def publisher(services: Services, broker: Broker, clock=lambda: 0.0, **options: float) -> Publisher:
    config = msgspec.structs.replace(services.config.broker, **({"bundle_bytes_per_s": 1e9} | options))
    return Publisher(config, services.engine, services.store, broker, Counter(), clock)


def push(services: Services, folder: Path, *, seed: int = 0, card: bytes = b"# tiny\n", desired_by: str = "") -> str:
    write_bundle(folder, "tiny", tiny_files(padding=8 * CHUNK_BYTES + seed) | {"card.md": card})
    with writing(services.engine) as session:
        digest = register(session, services.store, folder, actor="t", now=utc_now()).bundle
        if desired_by:
            session.merge(Agent(id=desired_by, generation=1, desired_bundle=digest))
        session.commit()
    return release(services, digest)


def test_a_blob_is_published_once_across_requests_and_restarts(services: Services, tmp_path: Path) -> None:
    digest, broker = push(services, tmp_path / "a", desired_by="line-1"), Broker()
    sent = publisher(services, broker).publish_bundle(digest)
    assert sent == broker.bytes_held > 8 * CHUNK_BYTES
    assert publisher(services, broker).publish_bundle(digest) == 0
    # Another bundle with another card only: its manifest and its card.
    other = push(services, tmp_path / "b", card=b"# another\n", desired_by="line-1")
    assert publisher(services, broker).publish_bundle(other) < 3000
    assert len(broker.sent) == len(broker.held)


def test_an_unconfirmed_blob_is_sent_again(services: Services, tmp_path: Path) -> None:
    digest, broker = push(services, tmp_path / "a", desired_by="line-1"), Broker()
    first = publisher(services, broker)

    class Lost(Broker):
        def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False):
            if len(self.sent) == 5:
                raise RuntimeError("killed")
            return super().publish(topic, payload, qos, retain)

    first._connection = Lost()
    with pytest.raises(RuntimeError):
        first.publish_bundle(digest)
    sent = publisher(services, broker).publish_bundle(digest)
    assert sent == broker.bytes_held > 8 * CHUNK_BYTES


def test_a_blob_that_no_agent_runs_or_shall_run_is_removed(services: Services, tmp_path: Path) -> None:
    old, broker = push(services, tmp_path / "a", seed=1, desired_by="line-1"), Broker()
    found = publisher(services, broker)
    found.publish_bundle(old)
    new = push(services, tmp_path / "b", seed=2, desired_by="line-1")
    found.publish_bundle(new)
    with writing(services.engine) as session:
        agent = session.get(Agent, "line-1")
        agent.reported = {"boot_id": "0" * 16, "at_ms": 1, "active": new, "previous": old}
        session.commit()
    assert found.collect() == 0
    with writing(services.engine) as session:
        session.get(Agent, "line-1").reported = {"active": new, "previous": ""}
        session.commit()
    assert found.collect() > 8
    assert f"{BLOBS}{old}" not in broker.held
    assert f"{BLOBS}{new}" in broker.held
    with reading(services.engine) as session:
        rows = session.exec(select(RetainedBlob)).all()
    assert {f"{BLOBS}{row.digest}" for row in rows} == set(broker.held)
    assert sum(row.size_bytes for row in rows) == broker.bytes_held
    assert found.publish_bundle(old) > 8 * CHUNK_BYTES


def test_the_budget_refuses_before_the_first_byte_and_counts_no_garbage(services: Services, tmp_path: Path) -> None:
    first, broker = push(services, tmp_path / "a", seed=1, desired_by="line-1"), Broker()
    found = publisher(services, broker, retained_max_bytes=12 * CHUNK_BYTES)
    found.publish_bundle(first)
    held = dict(broker.held)
    second = push(services, tmp_path / "b", seed=2, desired_by="line-2")
    with pytest.raises(CapacityError) as caught:
        found.publish_bundle(second)
    assert caught.value.code == "delivery.retained_full"
    assert broker.held == held
    with writing(services.engine) as session:
        session.delete(session.get(Agent, "line-1"))
        session.commit()
    found.publish_bundle(second)
    assert broker.bytes_held <= 12 * CHUNK_BYTES
    assert f"{BLOBS}{first}" not in broker.held


def test_a_rollout_that_does_not_fit_is_refused_when_it_is_asked_for(services: Services, tmp_path: Path) -> None:
    release(services, push(services, tmp_path / "a", desired_by="line-1"))
    services.blobs._config = msgspec.structs.replace(services.config.broker, retained_max_bytes=100_000)
    with make_client(services) as client:
        answer = client.post("/api/v1/rollouts", json={"model": "tiny", "waves": ["100%"]})
        assert answer.status_code == 507
        assert answer.json()["code"] == "delivery.retained_full"
        assert client.get("/api/v1/rollouts").json() == []


def test_a_missed_blob_is_republished_then_sent_directly_and_unknown_agents_get_nothing(
    services: Services, tmp_path: Path
) -> None:
    digest, broker, now = push(services, tmp_path / "a", desired_by="line-1"), Broker(), 100.0
    found = publisher(services, broker, lambda: now)
    total = found.publish_bundle(digest)
    chunk = services.store.manifest(digest).files[3].chunks[0].sha256
    good, broker.held[f"{BLOBS}{chunk}"] = broker.held[f"{BLOBS}{chunk}"], b"poison"
    broker.sent.clear()
    found.answer("line-1", Request(digests=(chunk,)))
    found.answer("line-2", Request(digests=(chunk,)))
    assert broker.held[f"{BLOBS}{chunk}"] == good
    assert len(broker.sent) == 1
    assert len(good) < 0.15 * total
    found.answer("line-1", Request(digests=(chunk,)))
    assert broker.sent[1:] == [("sortline/v1/agents/line-1/blob", good)]
    found.answer("line-1", Request(digests=("f" * 64,)))
    assert found.counters["blobs_unknown"] == 1
    assert len(broker.sent) == 2


def test_without_retained_blobs_every_agent_gets_its_own(services: Services, tmp_path: Path) -> None:
    digest, broker = push(services, tmp_path / "a", desired_by="line-1"), Broker()
    found = publisher(services, broker, retained_max_bytes=0)
    assert found.publish_bundle(digest) == 0
    found.answer("line-1", Request(digests=(digest,)))
    assert broker.held == {}
    assert broker.sent == [("sortline/v1/agents/line-1/blob", services.store.manifest(digest).encoded())]


def test_one_agent_cannot_ask_without_end(services: Services) -> None:
    found = publisher(services, Broker())
    for _ in range(500):
        found.requested("rogue", Request(digests=("f" * 64,)))
    assert found.counters["blob_requests_refused"] > 400
    found.requested("line-1", Request(digests=("f" * 64,)))
    assert found._wanted.qsize() < 100


def test_the_rate_is_kept(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, broker = push(services, tmp_path / "a", desired_by="line-1"), Broker()
    now = [0.0]
    found = publisher(services, broker, lambda: now[0], bundle_bytes_per_s=200_000.0)

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(found, "_pause", wait)
    sent = found.publish_bundle(digest)
    assert now[0] >= (sent - 50_000 - 2 * CHUNK_BYTES) / 200_000.0


def test_an_unknown_bundle_is_refused(services: Services) -> None:
    with pytest.raises(InputError):
        publisher(services, Broker()).want("e" * 64)
