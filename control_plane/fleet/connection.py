"""The control plane's MQTT side: takes in what agents say, publishes what they shall run.

Two connections, so that telemetry never delays control: *bulk* carries batches, live figures and blobs
(`publishing`), *control* carries presence, reports and desired states. Callbacks only enqueue into bounded queues;
one thread writes to the database and acknowledges a batch after its commit, never before.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy import Engine
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session, col, select

from control_plane.config import BrokerConfig
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.identities import Identity, IdentityState
from control_plane.fleet.blobs import Publisher
from control_plane.fleet.lot_commands import record_response
from control_plane.identity.tls import client_context, load_client
from control_plane.registry.store import Store
from control_plane.trust.online_signer import OnlineSigner
from models.errors import ConfigError, MessageError, UnavailableError
from models.messages import (
    KEEP_ALIVE_S,
    MAX_LIVE_BYTES,
    MAX_REPORTED_BYTES,
    Ack,
    Batch,
    Command,
    Event,
    Gap,
    Live,
    Presence,
    Record,
    RecordKind,
    Reported,
    Request,
    Response,
    decode,
    decode_batch,
    decode_packed,
    encode,
)
from models.topics import ROOT, SENTINEL_TOPIC, TRUST_TOPIC, Channel, agent_topic, parse_agent_topic
from models.windows import Window

log = logging.getLogger("sortline.fleet")
_MAX_WAITING: Final = 5000
_AT_A_TIME: Final = 256
_SENTINEL_WAIT_S: Final = 1.5


class FleetLink:
    """Speaks with all agents.

    Args:
        config: The broker.
        engine: Database.
        store: Where bundles are.
        assignments: Signs what agents shall run.
        client_id: Prefix of the two MQTT client ids.
        certificates: Folder with `ca.pem`, `control.pem`, `bulk.pem`; None = password, no TLS.

    Raises:
        ConfigError: `site.bad_certificate`, `broker.no_password`.
    """

    def __init__(
        self,
        config: BrokerConfig,
        engine: Engine,
        store: Store,
        assignments: OnlineSigner,
        *,
        client_id: str = "control-plane",
        certificates: Path | None = None,
    ) -> None:
        self._certificates = certificates
        self._config, self._engine = config, engine
        self.assignments = assignments
        self._trust_published: dict[str, int] = {}
        """Version by topic."""
        self._trust_order = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.live: dict[str, tuple[float, Live]] = {}
        """Last live figures per agent with their monotonic time: lossy by contract, so they may stay in memory."""
        self._incoming: queue.Queue[tuple[str, bytes]] = queue.Queue(_MAX_WAITING)
        self._stopping = threading.Event()
        self._sentinel_seen = threading.Event()
        self._missed = threading.Event()
        self._control = self._client("control", client_id, ("presence", "reported", "response"), sentinel=True)
        self._bulk = self._client("bulk", client_id, ("batch", "live", "request"), sentinel=False)
        self.publisher = Publisher(config, engine, store, self._bulk, self.counters)
        self._threads: list[threading.Thread] = []
        self._republish_due = threading.Event()

    # -- connections ------------------------------------------------------------------------------------------

    def _client(self, stem: str, client_id: str, channels: tuple[str, ...], *, sentinel: bool) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"{client_id}-{stem}", clean_session=True, protocol=mqtt.MQTTv311
        )
        if self._certificates is None:
            client.username_pw_set(self._config.username, _password(self._config))
        else:
            own = f"{stem}-{self._config.replica}" if self._config.replica else stem
            context, pair = client_context(self._certificates, own), self._certificates / f"{own}.pem"
            client.tls_set_context(context)
            # Renewed certificates, and a new root beside the old one, are used from the next connection on.
            client.on_pre_connect = self._guarded(lambda *_: load_client(context, pair))
        client.max_queued_messages_set(0)  # bounded by the number of agents: blobs are sent a few at a time
        client.max_inflight_messages_set(64)
        client.reconnect_delay_set(1, 15)
        topics = _topics(*channels)

        def connected(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            if reason.is_failure:
                self.counters["refused"] += 1
                log.warning("the broker refused the control plane: %s", reason)
                return
            self.counters["connected"] += 1
            client.subscribe(topics)
            if sentinel:
                self._sentinel_seen.clear()
                client.subscribe(SENTINEL_TOPIC, 1)
                self._republish_due.set()

        client.on_connect = self._guarded(connected)
        client.on_message = self._guarded(self._receive)
        return client

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """An exception in a callback would end paho's thread without a word."""

        def guarded(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception:
                self.counters["callback_failed"] += 1
                log.exception("an MQTT callback failed")

        return guarded

    def start(self) -> None:
        """Connects in the background and starts taking in."""
        for client in (self._control, self._bulk):
            client.connect_async(self._config.host, self._config.port, keepalive=KEEP_ALIVE_S)
            client.loop_start()
        for body, name in ((self._ingest, "ingest"), (self._publish_after_connects, "publisher")):
            thread = threading.Thread(target=body, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self.publisher.start()

    def stop(self) -> None:
        """Disconnects and ends the threads within a few seconds."""
        self._stopping.set()
        self.publisher.stop()
        for client in (self._bulk, self._control):
            client.disconnect()
            client.loop_stop()
        for thread in self._threads:
            thread.join(3.0)

    @property
    def connected(self) -> bool:
        """Whether both connections stand."""
        return bool(self._control.is_connected() and self._bulk.is_connected())

    def _receive(self, _client: Any, _data: Any, message: Any) -> None:
        if message.topic == SENTINEL_TOPIC:
            self._sentinel_seen.set()
            return
        try:
            self._incoming.put_nowait((message.topic, bytes(message.payload)))
        except queue.Full:
            # A dropped batch was not acknowledged, so its agent sends it again; the rest is asked for again.
            self.counters["incoming_dropped"] += 1
            self._missed.set()

    # -- taking in --------------------------------------------------------------------------------------------

    def _ingest(self) -> None:
        while not self._stopping.is_set():
            try:
                waiting = [self._incoming.get(timeout=0.5)]
            except queue.Empty:
                continue
            while len(waiting) < _AT_A_TIME and not self._incoming.empty():
                waiting.append(self._incoming.get_nowait())
            for topic, payload in _newest_reports(waiting):
                self._ingest_with_retry(topic, payload)
            if self._missed.is_set() and self._control.is_connected():
                # Presence and reports are retained: asking again brings back what was dropped while we waited.
                self._missed.clear()
                self._control.subscribe(_topics("presence", "reported"))

    def _ingest_with_retry(self, topic: str, payload: bytes) -> None:
        """Takes a message in; while the database is away, again and again: nothing was acknowledged meanwhile."""
        while not self._stopping.is_set():
            try:
                self.take(topic, payload)
            except MessageError as error:
                self.counters[f"refused_{error.code}"] += 1
                log.warning("message on %s refused: %s", topic, error)
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                self.counters["database_away"] += 1
                log.warning("message on %s waits for the database: %s", topic, error)
                self._stopping.wait(0.5)
                continue
            except Exception:
                self.counters["ingest_failed"] += 1
                log.exception("message on %s not taken in", topic)
            return

    def take(self, topic: str, payload: bytes) -> None:
        """Takes in one message.

        Raises:
            MessageError: It is not acceptable; count it and go on.
        """
        agent_id, channel = parse_agent_topic(topic)
        self.counters[f"received_{channel}"] += 1
        match channel:
            case Channel.LIVE:
                self.live[agent_id] = (time.monotonic(), decode(payload, Live, limit=MAX_LIVE_BYTES))
            case Channel.PRESENCE:
                if payload:
                    self._take_presence(agent_id, decode(payload, Presence))
            case Channel.REPORTED:
                if payload:
                    self._take_report(agent_id, decode(payload, Reported, limit=MAX_REPORTED_BYTES))
            case Channel.BATCH:
                self._take_batch(agent_id, decode_batch(payload))
            case Channel.REQUEST:
                self.publisher.requested(agent_id, decode(payload, Request))
            case Channel.RESPONSE:
                self._take_response(agent_id, decode(payload, Response))
            case _:
                raise MessageError("topic.unknown", "Agents do not speak here.", expected="batch, ...", got=topic)

    def _take_presence(self, agent_id: str, presence: Presence) -> None:
        with writing(self._engine) as session:
            agent = _agent(session, agent_id)
            # The will of an older boot must not put a newer one offline.
            if presence.online or presence.boot_id == agent.boot_id or not agent.boot_id:
                agent.online, agent.boot_id = presence.online, presence.boot_id
            if presence.online:
                agent.seen_at = utc_now()
            session.add(agent)
            session.commit()

    def _take_report(self, agent_id: str, reported: Reported) -> None:
        with writing(self._engine) as session:
            agent = _agent(session, agent_id)
            agent.reported = msgspec.to_builtins(reported)
            agent.reported_at = agent.seen_at = utc_now()
            if reported.labels:
                agent.labels = agent.labels | dict(reported.labels)
            behind = reported.generation < agent.generation
            session.add(agent)
            session.commit()
        if behind:
            # It has not heard: whatever went wrong between commit and broker is made good here.
            if agent.desired_bundle:
                self.publish_bundle(agent.desired_bundle)
            self.publish_desired(agent)

    def _take_response(self, agent_id: str, response: Response) -> None:
        with writing(self._engine) as session:
            # Locked as in `lots.ask`: an answer must not write over a newer question.
            agent = session.get(Agent, agent_id, with_for_update=True)
            known = agent is not None and record_response(agent, response, utc_now())
            if known:
                session.add(agent)
                session.commit()
        self.counters["responses" if known else "responses_unknown"] += 1

    def _take_batch(self, agent_id: str, batch: Batch) -> None:
        if not batch.records:
            return
        now = utc_now()
        with writing(self._engine) as session:
            agent = _agent(session, agent_id)
            agent.seen_at = now
            session.add(agent)
            session.flush()
            rows: dict[Any, list[dict[str, Any]]] = {}
            for record in batch.records:
                table, values = self._row_of(record)
                key = {"agent_id": agent_id, "boot_id": record.boot_id, "seq": record.seq, "received_at": now}
                rows.setdefault(table, []).append(key | values)
            for table, values_of_all in rows.items():
                self._insert(session, table, values_of_all)
            session.commit()
        for boot_id in dict.fromkeys(record.boot_id for record in batch.records):
            numbers = [record.seq for record in batch.records if record.boot_id == boot_id]
            ack = Ack(boot_id=boot_id, from_seq=min(numbers), through_seq=max(numbers))
            self._bulk.publish(agent_topic(agent_id, Channel.ACK), encode(ack), qos=1)

    def _row_of(self, record: Record) -> tuple[Any, dict[str, Any]]:
        """Where a record goes; one that is no good is kept as refused, so that it does not come again."""
        try:
            match record.kind:
                case RecordKind.EVENT:
                    event = decode_packed(record.payload, Event)
                    return EventRow, _event(event.at_ms, event.code, event.message, dict(event.facts))
                case RecordKind.GAP:
                    gap = decode_packed(record.payload, Gap)
                    facts = {"boot_id": gap.boot_id, "ranges": ",".join(f"{r.first}-{r.last}" for r in gap.ranges)}
                    facts |= {f"{kind}s": str(count) for kind, count in gap.records.items()}
                    return EventRow, _event(gap.at_ms, "spool.gap", "Records were dropped for lack of room.", facts)
            window = decode_packed(record.payload, Window)
        except MessageError as error:
            self.counters[f"refused_{error.code}"] += 1
            return EventRow, _event(time.time_ns() // 1_000_000, error.code, str(error)[:600], {})
        refused = ""
        try:
            window.check()
        except MessageError as error:
            self.counters[f"refused_{error.code}"] += 1
            refused = error.code
        return WindowRow, {
            "started_at": _time(window.started_ms),
            "bundle": window.bundle,
            "items": window.items,
            "refused": refused,
            "payload": record.payload,
        }

    def _insert(self, session: Session, table: Any, rows: list[dict[str, Any]]) -> None:
        """Inserts what is not there yet: a repeated record changes nothing."""
        insert: Any = postgresql_insert if self._engine.dialect.name == "postgresql" else sqlite_insert
        statement = insert(table.__table__).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        new = session.connection().execute(statement, rows).rowcount
        self.counters["stored"] += new
        self.counters["duplicates"] += len(rows) - new

    # -- giving out -------------------------------------------------------------------------------------------

    def _publish_after_connects(self) -> None:
        """After every connect: when the broker has lost its store, everything is published again."""
        while not self._stopping.is_set():
            if not self._republish_due.wait(0.5):
                continue
            self._republish_due.clear()
            try:
                if not self._sentinel_seen.wait(_SENTINEL_WAIT_S):
                    self.republish()
                self._republish_missing()
            except Exception:  # whatever the database raises while it is away: without this thread nobody republishes
                log.exception("republishing failed; it is tried again")
                self.counters["republish_failed"] += 1
                self._republish_due.set()
                self._stopping.wait(2.0)

    def republish(self) -> None:
        """After the broker lost its store: every bundle an agent shall run, every desired state, then the sentinel.

        A broker that has the sentinel has the rest: whatever interrupts this begins it anew.
        """
        with self._trust_order:
            self._trust_published = {}
        self.publisher.store_lost()
        self.publish_trust()
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.generation) > 0)).all()
        self.publish_desired(*agents)
        self._control.publish(SENTINEL_TOPIC, b"1", qos=1, retain=True)
        self.counters["republished"] += 1
        log.info("published %s desired states to a broker without store", len(agents))

    def _republish_missing(self) -> None:
        """Whatever an interrupted publication left out is made good."""
        with reading(self._engine) as session:
            desired = session.exec(select(Agent.desired_bundle).where(col(Agent.desired_bundle) != "").distinct()).all()
        for digest in sorted(desired):
            self.publish_bundle(digest)

    def publish_bundle(self, digest: str) -> None:
        """Has the blobs of a bundle published in the background, as far as the broker does not hold them.

        Raises:
            CapacityError: `delivery.retained_full`: nothing was sent.
        """
        self.publisher.want(digest)

    def check_connected(self) -> None:
        """Refuses what would only wait for the broker.

        Raises:
            UnavailableError: `broker.not_connected`.
        """
        if not self._control.is_connected():
            raise UnavailableError("broker.not_connected", "The broker is not connected; try again.")

    def command(self, agent_id: str, command: Command) -> None:
        """Publishes a command, once and for now."""
        self._control.publish(agent_topic(agent_id, Channel.COMMAND), encode(command), qos=1)
        self.counters["commands"] += 1

    def publish_trust(self) -> None:
        """Publishes the signed metadata (retained) as far as it is newer than what was published last.

        One thread at a time: an older bin must not come after a newer set.
        """
        with self._trust_order:
            with reading(self._engine) as session:
                news = self.assignments.news(session, self._trust_published)
            for topic, version, data in news:
                self._control.publish(topic, data, qos=1, retain=True)
                self._trust_published[topic] = version
                self.counters["trust_published"] += topic == TRUST_TOPIC
                self.counters["trust_bins_published"] += topic != TRUST_TOPIC

    def publish_desired(self, *agents: Agent) -> None:
        """Publishes what agents shall run (retained), exactly as it was signed, after the metadata that proves it.

        Where nothing is desired any more, the message is cleared.
        """
        with reading(self._engine) as session:
            sealed = all(self.assignments.is_sealed(session, agent) for agent in agents)
            documents = [(agent, self.assignments.document(session, agent.id)) for agent in agents]
        if not sealed:
            # Whoever changed the rows has left the signing to us.
            with writing(self._engine) as session:
                if self.assignments.sign_changes(session, utc_now()):
                    session.commit()
                documents = [(agent, self.assignments.document(session, agent.id)) for agent in agents]
        self.publish_trust()
        for agent, document in documents:
            if document or not agent.generation:
                topic = agent_topic(agent.id, Channel.DESIRED)
                self._control.publish(topic, document, qos=1, retain=True)


def _newest_reports(messages: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Leaves out reports that a later one of the same agent replaces: where many wait, only the last word counts."""
    last = {topic: at for at, (topic, _) in enumerate(messages) if topic.endswith(f"/{Channel.REPORTED}")}
    return [message for at, message in enumerate(messages) if last.get(message[0], at) == at]


def _topics(*channels: str) -> list[tuple[str, int]]:
    return [(f"{ROOT}/agents/+/{channel}", 1) for channel in channels]


def _agent(session: Session, agent_id: str) -> Agent:
    """The agent's row; a new agent is known from its first word (the broker has checked who it is).

    Raises:
        MessageError: `identity.revoked`: a broker that was not told yet let it speak.
    """
    identity = session.get(Identity, agent_id)
    if identity is not None and identity.state is IdentityState.REVOKED:
        raise MessageError("identity.revoked", "The agent's identity was revoked.", expected="enrolled", got=agent_id)
    agent = session.get(Agent, agent_id)
    if agent is None:
        # Two replicas hear the first word at once.
        insert: Any = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
        session.execute(insert(Agent).values(**Agent(id=agent_id).model_dump()).on_conflict_do_nothing())
        agent = session.get_one(Agent, agent_id)
    return agent


def _event(at_ms: int, code: str, message: str, facts: dict[str, str]) -> dict[str, Any]:
    return {"at": _time(at_ms), "code": code, "message": message, "facts": facts}


def _time(at_ms: int) -> datetime:
    """An agent's clock may be wrong, but not so wrong that it cannot be stored."""
    return datetime.fromtimestamp(min(max(at_ms, 0), 4_102_444_800_000) / 1000.0, UTC)


def _password(config: BrokerConfig) -> str | None:
    if not config.password_file:
        return None
    try:
        return Path(config.password_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError("broker.no_password", f"{config.password_file} cannot be read.", got=error) from error
