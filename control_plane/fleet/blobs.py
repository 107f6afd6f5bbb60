"""Keeps on the broker the blobs that some agent may need, each published once, and nothing else.

A ledger in the database says which blobs the broker holds, so a restart or a second replica sends nothing twice; it
is written before a blob is sent, so nothing is on the broker that it does not know. One thread sends, at a bounded
rate and with few messages in flight, so that control and telemetry find room. Rules: the retained bytes never exceed
their budget, a bundle that does not fit is refused before its first byte; blobs that no agent runs, ran before or
shall run are removed; an agent that gets a blob wrongly or not at all asks, and the blob is published once more, or
sent to it alone when that did not help or the broker shall hold no blobs.
"""

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from sqlalchemy import Engine, func
from sqlmodel import col, delete, select

from control_plane.config import BrokerConfig
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.blobs import RetainedBlob
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.fleet.reports import report_of
from control_plane.registry.store import Store
from models.bundle import FileEntry, Manifest, blobs_of, sha256
from models.errors import CapacityError, InputError, SortlineError, UnavailableError
from models.messages import Request
from models.token_bucket import TokenBucket
from models.topics import Channel, agent_topic, blob_topic

log = logging.getLogger("sortline.publishing")
_IN_FLIGHT: Final = 16
_CONFIRM_AT_ONCE: Final = 64
_COLLECT_S: Final = 60.0
_REPAIR_AGAIN_S: Final = 5.0
"""A blob is not published again within this time, however many agents ask."""
_ASKED_AGAIN_S: Final = 600.0
"""An agent that asks for the same blob twice within this time gets it directly."""
_REQUESTS_PER_S, _REQUESTS_BURST = 20.0, 64.0
"""Rate and burst of requests that one agent may make; each request may name eight blobs."""


class Connection(Protocol):
    """The part of an MQTT client that the publisher needs."""

    def is_connected(self) -> bool:
        """Returns whether there is a connection."""

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> Any:
        """Sends; returns an object with `is_published()`."""


class Publisher:
    """Publishes bundles.

    Args:
        config: Budget and rate.
        engine: Database.
        store: Where bundles are.
        connection: Sends; also used by others.
        counters: What happened.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        config: BrokerConfig,
        engine: Engine,
        store: Store,
        connection: Connection,
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._engine, self._store, self._connection = config, engine, store, connection
        self.counters, self._clock = counters, clock
        self._wanted: queue.Queue[str | tuple[str, Request]] = queue.Queue(1000)
        self._stopping = threading.Event()
        self._waiting: set[str] = set()
        self._bucket = TokenBucket(config.bundle_bytes_per_s, config.bundle_bytes_per_s / 4.0, clock)
        self._agents: dict[str, TokenBucket] = {}
        self._asked: dict[tuple[str, str], float] = {}
        self._repaired: dict[str, float] = {}
        self._collect_at_s = clock() + _COLLECT_S
        self._thread = threading.Thread(target=self._run, name="blobs", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within a few seconds."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(3.0)

    # -- asked for by others ----------------------------------------------------------------------------------

    def want(self, digest: str) -> None:
        """Has a bundle published in the background, as far as the broker does not hold it already.

        Raises:
            CapacityError: `delivery.retained_full`.
            InputError: `store.unknown`.
        """
        self.check_room(digest)
        if digest not in self._waiting:
            self._waiting.add(digest)
            self._put(digest)

    def requested(self, agent_id: str, request: Request) -> None:
        """Takes an agent's request for blobs; requests beyond its rate are counted and left out."""
        bucket = self._agents.setdefault(agent_id, TokenBucket(_REQUESTS_PER_S, _REQUESTS_BURST, self._clock))
        if not bucket.take(1.0):
            self.counters["blob_requests_refused"] += 1
            return
        self._put((agent_id, request))

    def _put(self, item: str | tuple[str, Request]) -> None:
        try:
            self._wanted.put_nowait(item)
        except queue.Full:
            # The agent that waits for it asks again.
            self.counters["blob_requests_dropped"] += 1
            if isinstance(item, str):
                self._waiting.discard(item)

    def store_lost(self) -> None:
        """Clears the ledger after the broker has lost what it held."""
        with writing(self._engine) as session:
            session.exec(delete(RetainedBlob))
            session.commit()

    def check_room(self, digest: str) -> None:
        """Checks that the bundle fits into the budget of retained bytes; blobs that no agent needs are not counted.

        Raises:
            CapacityError: `delivery.retained_full`.
        """
        if not self._config.retained_max_bytes:
            return
        sizes = _sizes(self._store.manifest(digest))
        with reading(self._engine) as session:
            named = self._named_blobs(_named_bundles(session))
            held = {row.digest: row.size_bytes for row in session.exec(select(RetainedBlob))}
        kept = {key: size for key, size in held.items() if key in named} | sizes
        if sum(kept.values()) > self._config.retained_max_bytes:
            raise CapacityError(
                "delivery.retained_full",
                "The broker would hold more than its budget of retained bytes; end a rollout or raise "
                "broker.retained_max_bytes.",
                expected=f"<= {self._config.retained_max_bytes} bytes",
                got=sum(kept.values()),
                bundle=digest,
            )

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                item = self._wanted.get(timeout=0.5)
            except queue.Empty:
                item = None
            try:
                self._turn(item)
            except SortlineError as error:
                self.counters[f"refused_{error.code}"] += 1
                log.warning("%s", error)
            except Exception:
                # The database or the broker may be away: who still needs the blobs asks again.
                self.counters["publishing_failed"] += 1
                log.exception("publishing failed")
                self._stopping.wait(0.5)

    def _turn(self, item: str | tuple[str, Request] | None) -> None:
        if isinstance(item, str):
            # From here on it may be wanted again: the broker may lose its store meanwhile.
            self._waiting.discard(item)
            self.publish_bundle(item)
        elif item is not None:
            self.answer(*item)
        if self._clock() >= self._collect_at_s:
            self._collect_at_s = self._clock() + _COLLECT_S
            self.collect()

    def publish_bundle(self, digest: str) -> int:
        """Publishes the blobs of a bundle that the broker does not hold; returns the bytes sent.

        Raises:
            CapacityError: `delivery.retained_full`: nothing was sent.
        """
        if not self._config.retained_max_bytes:
            return 0
        self.check_room(digest)
        sizes = _sizes(manifest := self._store.manifest(digest))
        with writing(self._engine) as session:
            held = {row.digest: row for row in session.exec(select(RetainedBlob).where(_among(sizes)))}
            known = sum(size for key, size in sizes.items() if key not in held)
            total = int(session.exec(select(func.sum(RetainedBlob.size_bytes))).one() or 0)
            new = [key for key in sizes if key not in held]
            session.add_all(RetainedBlob(digest=key, size_bytes=sizes[key], confirmed=False) for key in new)
            session.commit()
        if total + known > self._config.retained_max_bytes:
            self.collect()  # there is room once the garbage is gone: `check_room` has looked
        missing = set(new) | {key for key, row in held.items() if not row.confirmed}
        sent = self._send((key, data) for key, data in blobs_of(manifest, self._read) if key in missing)
        self.counters["bundle_bytes_published"] += sent
        return sent

    def _send(self, blobs: Iterable[tuple[str, bytes]]) -> int:
        """Sends retained blobs, few at a time and no faster than the rate; confirms what the broker has taken."""
        flying: deque[tuple[str, Any]] = deque()
        done: list[str] = []
        sent = 0
        for digest, data in blobs:
            while not self._bucket.take(len(data)):
                self._pause(self._bucket.wait_s)
            while len(flying) >= _IN_FLIGHT:
                self._land(flying, done)
            flying.append((digest, self._connection.publish(blob_topic(digest), data, qos=1, retain=True)))
            sent += len(data)
        while flying:
            self._land(flying, done)
        self._confirm(done)
        return sent

    def _land(self, flying: deque[tuple[str, Any]], done: list[str]) -> None:
        digest, info = flying[0]
        self._await(info)
        flying.popleft()
        done.append(digest)
        if len(done) >= _CONFIRM_AT_ONCE:
            self._confirm(done)

    def _await(self, info: Any) -> None:
        """Waits until the broker has acknowledged; what was handed over without a connection is given up."""
        try:
            while not info.is_published():
                self._pause(0.002)
        except (RuntimeError, ValueError) as error:
            raise UnavailableError(
                "delivery.no_broker", "The broker is away; publishing goes on after it is back.", got=error
            ) from error

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(min(seconds, 0.5)):
            raise UnavailableError("delivery.stopped", "The control plane stops; it goes on after its next start.")

    def _confirm(self, done: list[str]) -> None:
        with writing(self._engine) as session:
            for row in session.exec(select(RetainedBlob).where(_among(done))):
                row.confirmed = True
                session.add(row)
            session.commit()
        self.counters["blobs_published"] += len(done)
        done.clear()

    def _read(self, entry: FileEntry) -> bytes:
        return self._store.get(entry.sha256)

    # -- what is missed ---------------------------------------------------------------------------------------

    def answer(self, agent_id: str, request: Request) -> None:
        """Publishes what an agent misses once more, or sends it directly."""
        wanted = set(request.digests)
        with reading(self._engine) as session:
            bundles = _named_bundles(session)
            held = {row.digest: row.confirmed for row in session.exec(select(RetainedBlob).where(_among(wanted)))}
        now = self._clock()
        for bundle, manifest in self._manifests(bundles):
            here = wanted & set(_sizes(manifest))
            if not here:
                continue
            wanted -= here
            if self._config.retained_max_bytes and not all(held.get(key) for key in here):
                self.want(bundle)  # it is on its way, or was forgotten
                continue
            for digest, data in blobs_of(manifest, self._read):
                if digest in here:
                    self._answer(agent_id, digest, data, now)
        self.counters["blobs_unknown"] += len(wanted)

    def _answer(self, agent_id: str, digest: str, data: bytes, now: float) -> None:
        again = now - self._asked.get((agent_id, digest), -_ASKED_AGAIN_S) < _ASKED_AGAIN_S
        if len(self._asked) > 100_000:
            self._asked.clear()
        self._asked[agent_id, digest] = now
        while not self._bucket.take(len(data)):
            self._pause(self._bucket.wait_s)
        if self._config.retained_max_bytes and now - self._repaired.get(digest, -_REPAIR_AGAIN_S) >= _REPAIR_AGAIN_S:
            self._repaired[digest] = now
            self._connection.publish(blob_topic(digest), data, qos=1, retain=True)
            self.counters["blobs_repaired"] += 1
            self.counters["blob_bytes_repaired"] += len(data)
        if again or not self._config.retained_max_bytes:
            self._connection.publish(agent_topic(agent_id, Channel.BLOB), data, qos=1, retain=False)
            self.counters["blobs_sent_directly"] += 1
            self.counters["blob_bytes_sent_directly"] += len(data)

    # -- what is not needed ------------------------------------------------------------------------------------

    def collect(self) -> int:
        """Removes from the broker what no agent runs, ran before or shall run; returns the blobs removed."""
        with reading(self._engine) as session:
            named = self._named_blobs(_named_bundles(session))
            waste = [digest for digest in session.exec(select(RetainedBlob.digest)) if digest not in named]
        for digest in waste:
            self._await(self._connection.publish(blob_topic(digest), b"", qos=1, retain=True))
        with writing(self._engine) as session:
            for start in range(0, len(waste), 500):
                session.exec(delete(RetainedBlob).where(_among(waste[start : start + 500])))
            session.commit()
        self.counters["blobs_removed"] += len(waste)
        return len(waste)

    def _named_blobs(self, bundles: Iterable[str]) -> set[str]:
        return {digest for _, manifest in self._manifests(bundles) for digest in _sizes(manifest)}

    def _manifests(self, bundles: Iterable[str]) -> Iterable[tuple[str, Manifest]]:
        for bundle in bundles:
            try:
                yield bundle, self._store.manifest(bundle)
            except InputError:  # an agent may run what was never pushed here
                continue


def _named_bundles(session: Any) -> list[str]:
    """Returns the bundles that some agent runs, ran before, shall run or will go back to."""
    found: set[str] = set()
    for agent in session.exec(select(Agent)):
        found.add(agent.desired_bundle)
        reported = report_of(agent)
        found |= {reported.active, reported.previous, reported.target, reported.shadow}
    over = [RolloutState.COMPLETED, RolloutState.ABORTED, RolloutState.ROLLED_BACK]
    for rollout in session.exec(select(Rollout).where(col(Rollout.state).not_in(over))):
        found.add(rollout.bundle)
        members = select(RolloutAgent).where(RolloutAgent.rollout_id == rollout.id)
        found |= {part.previous_bundle for part in session.exec(members)}
    return sorted(found - {""})


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Returns the size of every blob of a bundle by digest."""
    data = manifest.encoded()
    own = {chunk.sha256: chunk.size_bytes for entry in manifest.files for chunk in entry.chunks}
    return {sha256(data): len(data)} | own


def _among(digests: Iterable[str]) -> Any:
    return col(RetainedBlob.digest).in_(list(digests))
