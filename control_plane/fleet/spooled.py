"""Turns spooled records into rows. Whatever a record holds, it becomes a row: a bad one is kept as refused.

A record that made no row would never be acknowledged, so its agent would send it, and everything after it, again and
again. Rules: a record is never refused for its neighbour's sake; text that the database cannot hold is made fit for
it; counts contradicting each other are kept with the code of the refusal and used for nothing; a record is placed in
time by the clock of its agent where that is plausible, and by its arrival where it is not: a box whose clock stands at
1970 or runs ahead must not write into another year.
"""

import logging
import time
from collections import Counter as CounterOf
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, NamedTuple, Protocol

import msgspec
from sqlmodel import Session

from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.fleet.twins import Twins
from control_plane.fleet.window_payload import pack_window
from models.bundle import sha256
from models.errors import MessageError
from models.messages import (
    CLOCK_SLACK_MS,
    MAX_BATCH_RECORDS,
    BootId,
    Counter,
    Event,
    Evidence,
    Gap,
    Record,
    RecordKind,
    decode_packed,
    unpack_batch,
)
from models.messages import Batch as _Batch
from models.token_bucket import TokenBucket
from models.windows import Window

log = logging.getLogger("sortline.fleet")
MAX_FACTS: Final = 64
MAX_FACT_CHARACTERS: Final = 600
PICTURE: Final = "camera.evidence"
"""Code of the event that names a stored picture: `sha256`, `quantity`, `side` (`both`: before and now), `about`."""
_JPEG: Final = b"\xff\xd8\xff"
_PICTURES_PER_S, _PICTURES_AT_ONCE = 1.0 / 60.0, 30.0
"""Pictures of one agent that are kept: a season of one a minute is more than any line has to show."""
_MOST_BUCKETS: Final = 20_000
_LATEST_MS: Final = 4_102_444_800_000
"""The year 2100: a clock further ahead cannot be stored everywhere."""

AHEAD: Final = timedelta(milliseconds=CLOCK_SLACK_MS)
"""A record that claims to be newer than its arrival by more than this has an implausible clock."""
OLDEST: Final = timedelta(days=31)
"""A record that claims to be older than this has an implausible clock: no spool lasts that long."""
Table = type[WindowRow] | type[EventRow]
Key = tuple[str, str, int]
"""Agent, boot and number of a record."""


class Row(NamedTuple):
    """One row to store."""

    table: Table
    boot_id: str
    seq: int
    values: dict[str, Any]
    refused: str
    """Error code of a record that is kept and not used; empty = it is good."""
    window: Window | None = None
    """The window, where it is a good one."""
    picture: bytes = b""
    """A JPEG that belongs to the row, which names its digest; empty = none."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One record of a transaction.

    Attributes:
        agent_id: Who sent it.
        boot_id: Of which start.
        seq: Its number in this start.
        at: Its place in time: when the window began or the event happened.
        by_arrival: Whether `at` is derived from the arrival because the agent's clock is implausible.
        arrived_at: When its message arrived here.
        is_window: Whether it is a window; False = an event.
        window: The window; None for an event, and for a window that contradicts itself.
        refused: Error code of a window that contradicts itself; empty = it is good, or an event.
        new: Whether it was stored just now; False = it had been stored before.
    """

    agent_id: str
    boot_id: str
    seq: int
    at: datetime
    by_arrival: bool
    arrived_at: datetime
    is_window: bool
    window: Window | None
    refused: str
    new: bool


@dataclass(frozen=True, slots=True)
class ReportArrival:
    """A report that was not a retained one.

    Attributes:
        agent_id: Who sent it.
        boot_id: Of which start.
        made_at: When, by the agent's clock.
        arrived_at: When it arrived, by this one.
    """

    agent_id: str
    boot_id: str
    made_at: datetime
    arrived_at: datetime


class Ledger(Protocol):
    """Counts what was stored."""

    def record(self, session: Session, arrivals: Sequence[Arrival], reports: Sequence[ReportArrival]) -> None:
        """Counts these in the caller's transaction; what is not new is counted as a duplicate and nowhere else."""


class _Keyed(msgspec.Struct):
    boot_id: BootId
    seq: Counter


class _Loose(msgspec.Struct):
    records: Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=MAX_BATCH_RECORDS)]


def rows_of(payload: bytes) -> list[Row]:
    """Returns a row for every record of a batch that names its boot and number.

    Raises:
        MessageError: The batch itself is no batch: `message.oversize`, `message.malformed`, `message.wrong_version`.
    """
    data = unpack_batch(payload)
    try:
        return [_row_of(record) for record in decode_packed(data, _Batch).records]
    except MessageError as error:
        if error.code != "message.malformed":
            raise
        return _rows_one_by_one(data, error)


def _rows_one_by_one(data: bytes, error: MessageError) -> list[Row]:
    """Some record is malformed: each is read by itself."""
    try:
        loose = msgspec.msgpack.decode(data, type=_Loose)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise error from None
    rows = []
    for raw in loose.records:
        try:
            rows.append(_row_of(decode_packed(bytes(raw), Record)))
        except MessageError as bad:
            key = _key_of(bytes(raw))
            if key is not None:
                rows.append(refused_row(key.boot_id, key.seq, bad.code, str(bad)))
    if not rows:
        raise error
    return rows


def _key_of(raw: bytes) -> _Keyed | None:
    try:
        return msgspec.msgpack.decode(raw, type=_Keyed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def refused_row(boot_id: str, seq: int, code: str, message: str) -> Row:
    """Returns an event that says why the record of this key is not used."""
    return Row(EventRow, boot_id, seq, _event(time.time_ns() // 1_000_000, code, message[:600], {}), code)


def _row_of(record: Record) -> Row:
    try:
        match record.kind:
            case RecordKind.EVENT:
                event = decode_packed(record.payload, Event)
                values = _event(event.at_ms, event.code, event.message, event.facts)
                return Row(EventRow, record.boot_id, record.seq, values, "")
            case RecordKind.EVIDENCE:
                return _picture(record, decode_packed(record.payload, Evidence))
            case RecordKind.GAP:
                return Row(EventRow, record.boot_id, record.seq, _gap(decode_packed(record.payload, Gap)), "")
        window = decode_packed(record.payload, Window)
    except MessageError as error:
        return refused_row(record.boot_id, record.seq, error.code, str(error))
    refused = ""
    try:
        window.check()
    except MessageError as error:
        refused = error.code
    values = {
        "started_at": time_of(window.started_ms),
        "bundle": storable(window.bundle),
        "items": window.items,
        "refused": refused,
        "payload": pack_window(record.payload),
    }
    return Row(WindowRow, record.boot_id, record.seq, values, refused, None if refused else window)


def _picture(record: Record, evidence: Evidence) -> Row:
    if not evidence.jpeg.startswith(_JPEG):
        return refused_row(record.boot_id, record.seq, "evidence.no_jpeg", "A picture of the camera is no JPEG.")
    facts = {"sha256": sha256(evidence.jpeg), "quantity": evidence.quantity, "side": "both", "about": evidence.code}
    values = _event(evidence.at_ms, PICTURE, "The belt before and when this was noticed.", facts)
    return Row(EventRow, record.boot_id, record.seq, values, "", picture=evidence.jpeg)


class PictureShelf:
    """Keeps the pictures of agents, by content and within a rate: an agent gone wild must not fill the disk.

    Args:
        put: Keeps bytes durably under their digest.
        counters: Counts what was not kept.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        put: Callable[[bytes], str],
        counters: CounterOf[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._put, self._counters, self._clock = put, counters, clock
        self._buckets: dict[str, TokenBucket] = {}

    def keep(self, agent_id: str, row: Row) -> None:
        """Keeps the picture of a row before the row is stored; one that is not kept is no longer named by it."""
        if not row.picture:
            return
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.clear()
        bucket = self._buckets.setdefault(agent_id, TokenBucket(_PICTURES_PER_S, _PICTURES_AT_ONCE, self._clock))
        if not bucket.take(1.0):
            self._counters["pictures_too_many"] += 1
        else:
            try:
                self._put(row.picture)
            except OSError as error:
                self._counters["pictures_not_kept"] += 1
                log.warning("a picture of %s is not kept: %s", agent_id, error)
            else:
                return
        row.values["facts"].pop("sha256", None)


def _gap(gap: Gap) -> dict[str, Any]:
    facts = {"boot_id": gap.boot_id, "ranges": ",".join(f"{r.first}-{r.last}" for r in gap.ranges)}
    facts |= {f"{kind}s": str(count) for kind, count in gap.records.items()}
    return _event(gap.at_ms, "spool.gap", "Records were dropped for lack of room.", facts, longest=16_000)


def _event(
    at_ms: int, code: str, message: str, facts: dict[str, str], *, longest: int = MAX_FACT_CHARACTERS
) -> dict[str, Any]:
    kept = dict(_first(facts.items(), MAX_FACTS))
    return {
        "at": time_of(at_ms),
        "code": storable(code),
        "message": storable(message),
        "facts": {storable(key[:80]): storable(value[:longest]) for key, value in kept.items()},
    }


def twins_event(twins: Twins) -> dict[str, Any]:
    """Returns the event of the control plane that names both boxes under one identity; the same case has one key.

    Boot ids of agents are hexadecimal, so that the key of this one is never an agent's.
    """
    at_ms = round(twins.began.timestamp() * 1000)
    facts = {f"boot_{n}": f"{boot['boot_id']} {boot['box']}".strip() for n, boot in enumerate(twins.boots, 1)}
    message = f"Two boxes use this identity in turn: {twins}."
    return {"boot_id": f"cp-{at_ms}", "seq": 0} | _event(at_ms, "identity.twins", message[:600], facts)


def _first(pairs: Iterable[tuple[str, str]], most: int) -> Iterable[tuple[str, str]]:
    return (pair for _, pair in zip(range(most), pairs, strict=False))


def storable(text: str) -> str:
    """Returns the text with NUL shown as U+2400: PostgreSQL holds no NUL in text."""
    return text.replace("\x00", "\u2400")


def storable_document(value: Any) -> Any:
    """Returns a JSON document whose every text is fit for the database."""
    match value:
        case str():
            return storable(value)
        case dict():
            return {storable(key): storable_document(part) for key, part in value.items()}
        case list() | tuple():
            return [storable_document(part) for part in value]
        case _:
            return value


def time_of(at_ms: int) -> datetime:
    """Returns a time of an agent's clock: it may be wrong, but not so wrong that it cannot be stored."""
    return datetime.fromtimestamp(min(max(at_ms, 0), _LATEST_MS) / 1000.0, UTC)


def place_in_time(claimed: datetime, arrived_at: datetime, length: timedelta) -> tuple[datetime, bool]:
    """Returns when a record began, and whether that had to be derived from its arrival.

    Args:
        claimed: When it began, by the agent's clock.
        arrived_at: When it arrived, by this clock.
        length: How long it lasts; zero for an event.
    """
    if arrived_at - OLDEST <= claimed <= arrived_at + AHEAD:
        return claimed, False
    return arrived_at - min(length, timedelta(minutes=1)), True


def arrivals_of(records: Sequence[tuple[Row, str, datetime]], new: Mapping[Table, set[Key]]) -> list[Arrival]:
    """Returns the records of a transaction in the order in which they came; of equal ones, the first is new.

    Args:
        records: Row, agent, and when its message arrived.
        new: Keys of the rows that were not there before.
    """
    left = {table: set(keys) for table, keys in new.items()}
    found = []
    for row, agent_id, arrived_at in records:
        length = timedelta(milliseconds=row.window.duration_ms if row.window else 0)
        claimed = row.values["started_at" if row.table is WindowRow else "at"]
        at, by_arrival = place_in_time(claimed, arrived_at, length)
        key, fresh = (agent_id, row.boot_id, row.seq), left.get(row.table, set())
        is_new = key in fresh
        fresh.discard(key)
        is_window = row.table is WindowRow
        found.append(Arrival(*key, at, by_arrival, arrived_at, is_window, row.window, row.refused, is_new))
    return found
