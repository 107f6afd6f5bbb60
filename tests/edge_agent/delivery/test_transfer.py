"""Moving blobs over a connection: window, pace, poison and its repair, brokers that keep nothing."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from edge_agent.config import DeliveryConfig
from edge_agent.delivery.transfer import Transfer
from models.bundle import read_bundle
from models.chunking import CHUNK_BYTES
from models.messages import Request, decode
from models.topics import BLOBS, blob_topic
from tests.edge_agent.delivery.test_fetch import Blobs, Clock
from tests.simulators.tiny_bundle import tiny_bundle


class Broker:
    """Keeps retained blobs; delivers on subscription and on publication."""

    def __init__(self, blobs: Blobs, *, keeps: bool = True) -> None:
        self.connected = True
        self.held = {blob_topic(d): data for d, data in blobs.store.items()} if keeps else {}
        self.subscribed: set[str] = set()
        self.most = 0
        self.asked: list[Request] = []
        self.deliveries: list[tuple[str, bytes]] = []
        self.subscriptions: Counter[str] = Counter()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        assert topic == "sortline/v1/agents/line-1/request"
        self.asked.append(decode(payload, Request))
        return True

    def subscribe(self, topics: list[str]) -> None:
        for topic in topics:
            self.subscriptions[topic] += 1
            self.subscribed.add(topic)
            if topic in self.held:
                self.deliveries.append((topic, self.held[topic]))
        self.most = max(self.most, len(self.subscribed))

    def unsubscribe(self, topics: list[str]) -> None:
        self.subscribed -= set(topics)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    directory = tmp_path_factory.mktemp("source") / "bundle"
    tiny_bundle(directory, padding=20 * CHUNK_BYTES)
    return Blobs(directory)


class Bench:
    """An agent's transfer, its broker and its clock."""

    def __init__(self, root: Path, blobs: Blobs, *, keeps: bool = True, **options: float) -> None:
        self.blobs, self.broker, self.clock, self.counters = blobs, Broker(blobs, keeps=keeps), Clock(), Counter()
        config = msgspec.structs.replace(DeliveryConfig(reserve_bytes=0), **options)
        self.transfer = Transfer(root, "line-1", config, self.broker, self.counters, self.clock)
        self.faults: list[str] = []
        self.done = False

    def deliver(self) -> None:
        while self.broker.deliveries:
            topic, data = self.broker.deliveries.pop(0)
            if topic in self.broker.subscribed or not topic.startswith(BLOBS):
                error = self.transfer.take(topic, data)
                if error is not None:
                    self.faults.append(error.code)

    def turn(self, seconds: float = 0.25) -> None:
        self.clock.now += seconds
        self.deliver()
        self.done = self.done or self.transfer.tick(self.blobs.bundle.digest)

    def run(self, turns: int = 400, seconds: float = 0.25) -> None:
        for _ in range(turns):
            if self.done:
                return
            self.turn(seconds)

    def answer_requests(self) -> None:
        for request in self.broker.asked:
            for digest in request.digests:
                self.broker.deliveries.append(("sortline/v1/agents/line-1/blob", self.blobs.store[digest]))
        self.broker.asked.clear()


def test_never_more_than_the_window_is_subscribed(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs)
    bench.run()
    assert bench.done
    assert bench.broker.most <= 8
    assert bench.broker.subscribed == set()
    assert not bench.broker.asked
    read_bundle(tmp_path / "slots" / blobs.bundle.digest)


def test_the_pace_is_kept(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs, bytes_per_s=200_000.0)
    bench.run(turns=4000)
    assert bench.done
    total = sum(len(data) for data in blobs.store.values())
    burst = 8 * CHUNK_BYTES
    assert bench.clock.now >= (total - burst - 2 * CHUNK_BYTES) / 200_000.0


def test_a_poisoned_blob_is_asked_for_thrice_a_minute_at_most_and_others_go_on(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs)
    bad = blob_topic(blobs.bundle.manifest.files[4].chunks[0].sha256)
    good, bench.broker.held[bad] = bench.broker.held[bad], b"poison"
    bench.run(turns=4 * 60)
    assert not bench.done
    assert bench.faults
    assert set(bench.faults) == {"delivery.poisoned_chunk"}
    assert 2 <= bench.broker.subscriptions[bad] <= 3
    assert all(count == 1 for topic, count in bench.broker.subscriptions.items() if topic != bad)
    assert any(bad.endswith(request.digests[0]) for request in bench.broker.asked)
    # The repair is published while we listen: no waiting for the next try.
    assert bad in bench.broker.subscribed
    bench.broker.held[bad] = good
    bench.broker.deliveries.append((bad, good))
    bench.turn()
    bench.turn()
    assert bench.done


def test_poison_everywhere_is_no_hot_loop_and_a_flood_of_it_ends_the_listening(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs)
    manifest = blob_topic(blobs.bundle.digest)
    bench.broker.held = {topic: data if topic == manifest else b"?" for topic, data in bench.broker.held.items()}
    bench.run(turns=4 * 60)
    assert max(bench.broker.subscriptions.values()) <= 3
    assert len(bench.broker.subscribed) <= 8
    listened = set(bench.broker.subscribed)
    for topic in listened:
        bench.broker.deliveries.append((topic, b"again"))
    bench.deliver()
    assert not bench.broker.subscribed & listened


def test_a_broker_that_keeps_no_blobs_is_replaced_by_questions(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs, keeps=False)
    for _ in range(800):
        bench.turn()
        bench.answer_requests()
        if bench.done:
            break
    assert bench.done
    # Only the first question waits for a stall; then it is known who answers.
    assert bench.clock.now < 15.0 + 15.0
    assert bench.counters["fetch_stalled"] == 1


def test_an_answer_that_is_lost_is_asked_for_again(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs, keeps=False)
    for turn in range(3000):
        bench.turn()
        if turn % 3:
            bench.broker.asked.clear()  # lost
        bench.answer_requests()
        if bench.done:
            break
    assert bench.done


def test_a_full_disk_is_looked_at_again_within_ten_seconds(tmp_path: Path, blobs: Blobs) -> None:
    bench = Bench(tmp_path, blobs, reserve_bytes=2**62)
    for _ in range(4):
        bench.turn()
    assert bench.faults == ["delivery.disk_full"]
    assert bench.broker.subscribed == set()
    assert not list((tmp_path / "fetch").glob("*.part"))
    bench.transfer._config = msgspec.structs.replace(bench.transfer._config, reserve_bytes=0)
    until = bench.clock.now + 10.0
    bench.run()
    assert bench.done
    assert bench.clock.now < until
