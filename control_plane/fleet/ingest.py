"""Stores what arrives from agents, many messages in one transaction, and then acknowledges it.

Rules: an acknowledgement follows the commit, never precedes it; a repeated record changes nothing; a message that
cannot be stored is counted and kept as refused where it has a key, and never holds up the others; a retained message
says what an agent said once and is no sign of life; while the database is away the messages wait, unacknowledged.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import msgspec
from sqlalchemy import Engine, insert
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session, SQLModel, col, select

from control_plane.database.agent_rows import KnownAgent, insert_new, known_agents, update_agents
from control_plane.database.engine import writing
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.windows import AgentHistory, WindowHorizon
from control_plane.fleet.history import digest_of, set_up_of
from control_plane.fleet.intake import Intake, Message
from control_plane.fleet.labels import bounded, effective
from control_plane.fleet.lot_commands import record_response
from control_plane.fleet.spooled import (
    Key,
    Ledger,
    PictureShelf,
    ReportArrival,
    Row,
    Table,
    arrivals_of,
    refused_row,
    rows_of,
    storable,
    storable_document,
    time_of,
    twins_event,
)
from control_plane.fleet.twins import TwinWatch
from models.errors import MessageError
from models.messages import MAX_REPORTED_BYTES, Ack, Presence, Reported, Request, Response, decode
from models.topics import Channel, parse_agent_topic

log = logging.getLogger("sortline.fleet")
_AWAY: Final = (OperationalError, InterfaceError, PoolTimeout)
_NUL: Final = b"u0000"
"""A report whose JSON holds no such escape has no NUL in any text."""
_GATHER_S: Final = 0.2
"""Between two transactions: what arrives meanwhile shares the next one, and an acknowledgement is late by as much."""
_IDLE_S: Final = 0.5
_LOG_AGAIN_S: Final = 60.0
_UNCHANGED: Final = timedelta(seconds=60)
"""A report that says what the last one said is stored again after this."""
_DESCRIBED_WITHIN: Final = timedelta(seconds=30)
"""The event of two boxes under one identity waits so long for the reports that say where they are."""
_TABLES: Final[dict[Any, Any]] = {
    WindowRow: SQLModel.metadata.tables["window"],
    EventRow: SQLModel.metadata.tables["event"],
}
_HISTORY: Final[Any] = SQLModel.metadata.tables[str(AgentHistory.__tablename__)]
_MAYBE_DELETED: Final = timedelta(days=1)
"""Retention keeps windows for a day at least: one that is younger was not deleted."""


class Acknowledger(Protocol):
    """The part of the outbox that is needed."""

    def acknowledge(self, agent_id: str, ack: Ack) -> None:
        """Says that these records are committed."""

    def repeat_desired(self, behind: Sequence[tuple[str, int]]) -> None:
        """Has desired states published again that agents have not taken up."""


@dataclass(slots=True)
class _Round:
    """What one transaction will write."""

    agents: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    """Agent -> columns that change."""
    rows: dict[Table, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    records: list[tuple[Row, str, datetime]] = field(default_factory=list)
    """Each row with its agent and when its message arrived."""
    history: list[dict[str, Any]] = field(default_factory=list)
    heard: list[ReportArrival] = field(default_factory=list)
    acks: list[tuple[str, Ack]] = field(default_factory=list)
    behind: list[tuple[str, int]] = field(default_factory=list)
    reports: dict[str, tuple[Reported, datetime]] = field(default_factory=dict)


class Ingest:
    """Stores what arrives.

    Args:
        engine: Database.
        intake: Where messages wait.
        outbox: Acknowledges and repeats desired states.
        requested: Takes an agent's request for blobs.
        counters: Counts what happened.
        ledger: Counts what was stored, in the transaction that stores it.
        pictures: Keeps the pictures of agents.
    """

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        outbox: Acknowledger,
        requested: Callable[[str, Request], None],
        counters: Counter[str],
        ledger: Ledger,
        pictures: PictureShelf,
    ) -> None:
        self._engine, self._intake, self._outbox = engine, intake, outbox
        self._requested, self._counters, self._ledger = requested, counters, ledger
        self._pictures, self._twins = pictures, TwinWatch()
        self._reports: dict[str, tuple[Reported, datetime]] = {}
        """Agent -> the report stored last and when, to leave out what says the same."""
        self._logged: dict[str, float] = {}
        self._away_since_s: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within a few seconds; what waits was not acknowledged and comes again."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(3.0)

    @property
    def stalled_s(self) -> float:
        """For how long the database has been away, in seconds; 0 when it is there."""
        since_s = self._away_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            messages = self._intake.take(_IDLE_S)
            if messages:
                try:
                    self.store_until_done(messages)
                except Exception:
                    # Without this thread nothing would be stored any more; what was not acknowledged comes again.
                    self._counters["ingest_failed"] += 1
                    log.exception("%s messages were not stored", len(messages))
                self._intake.done(messages)
                if not self._intake.full:  # behind, as after a stall, the next transaction need not gather
                    self._stopping.wait(_GATHER_S)

    def store_until_done(self, messages: Sequence[Message]) -> None:
        """Stores messages; while the database is away, again and again: nothing is acknowledged meanwhile."""
        while not self._stopping.is_set():
            try:
                self.store(messages)
            except _AWAY as error:
                self._counters["database_away"] += 1
                if self._away_since_s is None:
                    self._away_since_s = time.monotonic()
                    log.warning("the database is away; %s messages wait: %s", len(messages), error)
                self._stopping.wait(0.5)
                continue
            if self._away_since_s is not None:
                log.warning("the database is back after %.0f s; what waited is stored", self.stalled_s)
                self._away_since_s = None
            return

    def store(self, messages: Sequence[Message]) -> list[MessageError]:
        """Stores messages in one transaction, or one by one where that fails; acknowledges what was stored.

        Returns:
            Why messages were refused.

        Raises:
            SQLAlchemyError: The database is away; nothing was acknowledged.
        """
        try:
            return self._store(messages)
        except _AWAY:
            raise
        except Exception as error:
            log.debug("a transaction of %s messages failed", len(messages), exc_info=True)
            if len(messages) > 1:
                self._say("apart", "messages are stored one by one: %s", error)
                return [refusal for message in messages for refusal in self.store([message])]
            return self._store_apart(messages[0], error)

    def take(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        """Stores one message now.

        Raises:
            MessageError: It is not acceptable.
        """
        agent_id, channel = parse_agent_topic(topic)
        self._counters[f"received_{channel}"] += 1
        refusals = self.store([Message(0, utc_now(), agent_id, channel, payload, retained)]) if payload else []
        if refusals:
            raise refusals[0]

    # -- one transaction --------------------------------------------------------------------------------------

    def _store(self, messages: Sequence[Message], *, rows: list[Row] | None = None) -> list[MessageError]:
        refusals: list[MessageError] = []
        now, work = utc_now(), _Round()
        with writing(self._engine) as session:
            known = known_agents(session, sorted({message.agent_id for message in messages}))
            for message in messages:
                try:
                    self._read(session, message, known, work, now, rows)
                except MessageError as error:
                    self._refuse(message, error)
                    refusals.append(error)
            self._drop_deleted(session, work, now)
            new = {table: self._insert(session, table, values) for table, values in work.rows.items()}
            self._ledger.record(session, arrivals_of(work.records, new), work.heard)
            if work.history:
                session.connection().execute(insert(_HISTORY), work.history)
            update_agents(session, work.agents)
            session.commit()
        stored = sum(map(len, new.values()))
        self._counters["stored"] += stored
        self._counters["duplicates"] += sum(map(len, work.rows.values())) - stored
        self._reports |= work.reports
        for agent_id, ack in work.acks:
            self._outbox.acknowledge(agent_id, ack)
        if work.behind:
            self._outbox.repeat_desired(work.behind)
        return refusals

    def _store_apart(self, message: Message, error: Exception) -> list[MessageError]:
        """One message that cannot be stored: of a batch, each record by itself; one that fails is kept as refused."""
        self._counters["ingest_failed"] += 1
        self._say(f"failed {message.channel}", "a message of %s cannot be stored: %s", message.agent_id, error)
        if message.channel is not Channel.BATCH:
            return []
        for row in rows_of(message.payload):
            try:
                self._store([message], rows=[row])
            except _AWAY:
                raise
            except (SQLAlchemyError, ValueError, OverflowError, TypeError) as bad:
                self._counters["refused_record.unstorable"] += 1
                reason = storable(f"{type(bad).__name__}: {bad}")
                self._store([message], rows=[refused_row(row.boot_id, row.seq, "record.unstorable", reason)])
        return []

    def _read(
        self,
        session: Session,
        message: Message,
        known: dict[str, KnownAgent],
        work: _Round,
        now: datetime,
        rows: list[Row] | None,
    ) -> None:
        agent = known.get(message.agent_id)
        if agent is None:
            raise MessageError(
                "identity.revoked", "The agent's identity was revoked.", expected="enrolled", got=message.agent_id
            )
        match message.channel:
            case Channel.PRESENCE:
                self._read_presence(message, decode(message.payload, Presence), agent, work)
            case Channel.REPORTED:
                self._read_report(message, decode(message.payload, Reported, limit=MAX_REPORTED_BYTES), agent, work)
            case Channel.BATCH:
                self._read_batch(message, rows_of(message.payload) if rows is None else rows, work, now)
            case Channel.REQUEST:
                self._requested(message.agent_id, decode(message.payload, Request))
            case Channel.RESPONSE:
                self._read_response(session, message, decode(message.payload, Response))
            case _:
                raise MessageError(
                    "topic.unknown", "Agents send nothing here.", expected="batch, ...", got=message.channel
                )

    def _read_presence(self, message: Message, presence: Presence, agent: KnownAgent, work: _Round) -> None:
        # The will of an older boot must not put a newer one offline.
        if presence.online or presence.boot_id == agent.boot_id or not agent.boot_id:
            agent.online, agent.boot_id = presence.online, presence.boot_id
            work.agents[message.agent_id] |= {"online": presence.online, "boot_id": presence.boot_id}
        if presence.online and not message.retained:
            self._alive(message, presence.boot_id, "", work)

    def _read_report(self, message: Message, reported: Reported, agent: KnownAgent, work: _Round) -> None:
        if not message.retained:
            self._alive(message, reported.boot_id, _box(reported), work)
            made_at = time_of(reported.at_ms)
            work.heard.append(ReportArrival(message.agent_id, reported.boot_id, made_at, message.at))
        if reported.generation < agent.generation:
            # The agent has not received it: a loss between commit and broker is made good here.
            work.behind.append((message.agent_id, agent.generation))
        before, stored_at = self._reports.get(message.agent_id, (None, message.at))
        if (
            before is not None
            and message.retained
            and (reported.boot_id, reported.at_ms)
            == (
                before.boot_id,
                before.at_ms,
            )
        ):
            return
        same = before is not None and msgspec.structs.replace(reported, at_ms=before.at_ms) == before
        if same and message.at - stored_at < _UNCHANGED:
            self._counters["unchanged_reports"] += 1
            return
        labels = bounded(reported.labels)
        self._counters["labels_refused"] += len(reported.labels) - len(labels)
        values = msgspec.to_builtins(reported)
        # The broker had kept a retained one: it was made when the agent says, and certainly not later than now.
        made_at = min(message.at, time_of(reported.at_ms)) if message.retained else message.at
        work.agents[message.agent_id] |= {
            "reported": storable_document(values) if _NUL in message.payload else values,
            "reported_at": made_at,
            "labels": effective(labels, agent.assigned),
        }
        work.reports[message.agent_id] = (reported, message.at)
        set_up = set_up_of(reported)
        digest = digest_of(set_up)
        if digest != agent.setup_digest:
            agent.setup_digest = work.agents[message.agent_id]["setup_digest"] = digest
            facts = storable_document(msgspec.to_builtins(set_up))
            row = {"agent_id": message.agent_id, "at": made_at, "agent_at": time_of(reported.at_ms), "facts": facts}
            work.history.append(row)

    def _read_batch(self, message: Message, rows: list[Row], work: _Round, now: datetime) -> None:
        numbers: dict[str, list[int]] = {}
        for row in rows:
            if row.refused:
                self._counters[f"refused_{row.refused}"] += 1
            key = {"agent_id": message.agent_id, "boot_id": row.boot_id, "seq": row.seq, "received_at": now}
            work.rows[row.table].append(key | row.values)
            work.records.append((row, message.agent_id, message.at))
            numbers.setdefault(row.boot_id, []).append(row.seq)
            self._pictures.keep(message.agent_id, row)
        if not rows:
            return
        changes = work.agents[message.agent_id]
        changes["seen_at"] = max(message.at, changes.get("seen_at", message.at))
        changes["stored_at"] = now
        if any(row.table is WindowRow for row in rows):
            changes["window_at"] = now
        for boot_id, of_boot in numbers.items():
            ack = Ack(boot_id=boot_id, from_seq=min(of_boot), through_seq=max(of_boot))
            work.acks.append((message.agent_id, ack))

    def _read_response(self, session: Session, message: Message, response: Response) -> None:
        # Locked as in `lot_commands.ask`: an answer must not write over a newer question.
        agent = session.get(Agent, message.agent_id, with_for_update=True)
        found = agent is not None and record_response(agent, response, message.at)
        if found:
            session.add(agent)
            session.flush()
        self._counters["responses" if found else "responses_unknown"] += 1

    def _alive(self, message: Message, boot_id: str, box: str, work: _Round) -> None:
        changes = work.agents[message.agent_id]
        changes["seen_at"] = max(message.at, changes.get("seen_at", message.at))
        twins = self._twins.observe(message.agent_id, boot_id, message.at, box)
        if twins is not None:
            self._counters["identity_twins"] += 1
            self._say(f"twins {message.agent_id}", "two boxes speak as %s in turn: %s", message.agent_id, twins)
            changes["twins"] = storable_document(twins.stored())
            if twins.described or message.at - twins.began >= _DESCRIBED_WITHIN:
                work.rows[EventRow].append(
                    {"agent_id": message.agent_id, "received_at": message.at} | twins_event(twins)
                )

    def _drop_deleted(self, session: Session, work: _Round, now: datetime) -> None:
        """Leaves out windows that come again after retention had deleted them: they were counted once already."""
        windows = work.rows.get(WindowRow, [])
        old = {row["agent_id"] for row in windows if abs(now - row["started_at"]) > _MAYBE_DELETED}
        if not old:
            return
        found = session.exec(select(WindowHorizon).where(col(WindowHorizon.agent_id).in_(old)))
        horizons = {(row.agent_id, row.boot_id): row.through_seq for row in found}
        gone = {key for key in map(_key_of, windows) if key[2] <= horizons.get(key[:2], -1)}
        if gone:
            self._counters["windows_after_retention"] += len(gone)
            work.rows[WindowRow] = [row for row in windows if _key_of(row) not in gone]
            work.records = [r for r in work.records if (r[1], r[0].boot_id, r[0].seq) not in gone]

    def _insert(self, session: Session, table: Table, rows: list[dict[str, Any]]) -> set[Key]:
        """Inserts what is not there yet; returns the keys of the rows that were new."""
        if not rows:
            return set()
        statement = insert_new(self._engine.dialect.name, _TABLES[table])
        return {(agent_id, boot_id, seq) for agent_id, boot_id, seq in session.connection().execute(statement, rows)}

    def _refuse(self, message: Message, error: MessageError) -> None:
        self._counters[f"refused_{error.code}"] += 1
        key = f"{message.agent_id} {message.channel} {error.code}"
        self._say(key, "%s of %s refused: %s", message.channel, message.agent_id, error)

    def _say(self, key: str, text: str, *values: object) -> None:
        """Logs a warning; the same one at most once a minute, because what recurs is counted."""
        now = time.monotonic()
        if now - self._logged.get(key, -_LOG_AGAIN_S) < _LOG_AGAIN_S:
            return
        if len(self._logged) > 10_000:
            self._logged.clear()
        self._logged[key] = now
        log.warning(text, *values)


def _key_of(row: dict[str, Any]) -> Key:
    return row["agent_id"], row["boot_id"], row["seq"]


def _box(reported: Reported) -> str:
    """Returns what a report says about the box it comes from, for a person who looks for the second one."""
    facts = [f"{key} {value}" for key, value in sorted(reported.hardware.items()) if key in {"address", "host"}]
    return ", ".join([*facts, *([f"camera {reported.camera}"] if reported.camera else [])])[:200]
