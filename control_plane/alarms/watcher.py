"""The loop that raises alarms: one of all replicas, under a lease, every few seconds.

Each look reads what was stored since the last one, hands it to the watches, and applies their findings in one
transaction that first proves, by the fencing number, that this process still leads. The state of the watches and how
far each line was read are kept together once a minute: after a crash the windows since then are read again, and since a
finding has a key, nothing is raised twice. A sum that a watch cannot take is counted and left out; the others go on.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import msgspec
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from control_plane.alarms.costs import Prices, Traffic, cost_of_waiting
from control_plane.alarms.policies import decide
from control_plane.alarms.raising import Announce, Look, Register, active_alarms, forget_old
from control_plane.config import AlarmsConfig
from control_plane.database.engine import reading, writing
from control_plane.database.leases import holds_lease, take_lease
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.alarms import AlarmWatch
from control_plane.database.tables.columns import utc_now
from control_plane.detection.finding import Finding, LineSum
from control_plane.monitoring.sorting import Sorting, sorting_of
from control_plane.monitoring.windows import StoredWindow, arrived
from models.errors import SortlineError
from models.recipe import Recipe

log = logging.getLogger("sortline.alarms")
LEASE: Final = "alarms"
_READER: Final = "reader"
_SAVE_S: Final = 60.0
_FIRST_LOOK: Final = timedelta(minutes=5)
"""How far back the first look at a line reads."""
_KEYS_KEPT: Final = timedelta(seconds=30)
"""Rows are read again for some seconds before the newest known one: their keys are remembered for longer than that."""
_CLEAN_S: Final = 3600.0


class Watch(Protocol):
    """Turns sums of windows into findings."""

    def step(self, now_s: float, sums: Sequence[LineSum]) -> list[Finding]:
        """Takes new sums, each once, oldest first per line; returns everything that is present now."""

    def dump(self) -> bytes:
        """Returns the state."""


class Check(Protocol):
    """Finds what the database shows besides the sums."""

    def look(self, session: Session, sites: Mapping[str, str], now: datetime) -> list[Finding]:
        """Returns everything that is present, given the site of each line of which something was stored lately."""


class _Read(msgspec.Struct):
    """How far a line was read."""

    at_us: int
    """`received_at` of its newest row, microseconds since 1970."""
    keys: dict[str, int] = {}
    """Rows of the last seconds that are read already, `boot.number`, and when they were received."""


class Watcher:
    """Looks for findings while it holds the lease.

    Args:
        engine: Database.
        holder: This process's name in the lease; two processes must never share it.
        config: Period, lease, hold time, escalation, policies.
        watches: Name of its state -> makes a watch from that state; an empty one or one that raises begins afresh.
        checks: Find what is present in the database besides, such as missing data.
        recipe: Returns the recipe of a bundle; None where it is not known.
        announce: Stores messages to receivers.
        levels: Highest `after_escalations` of the receivers.
        counters: Counts what happened.
    """

    def __init__(
        self,
        engine: Engine,
        holder: str,
        config: AlarmsConfig,
        watches: Mapping[str, Callable[[bytes], Watch]],
        *,
        checks: Sequence[Check] = (),
        recipe: Callable[[str], Recipe | None],
        announce: Announce,
        levels: int,
        counters: Counter[str],
    ) -> None:
        self._engine, self._holder, self._config, self._counters = engine, holder, config, counters
        self._makers, self._checks, self._recipe = watches, checks, recipe
        self.register = Register(config, announce=announce, cost=self._cost, levels=levels)
        self._watches: dict[str, Watch] = {}
        self._read: dict[str, _Read] = {}
        self._traffic: dict[str, Traffic] = {}
        self._last: dict[str, LineSum] = {}
        self._troubled: frozenset[str] = frozenset()
        """Lines with an alarm that is not over: what they reject now is not what they usually do."""
        self._fence: int | None = None
        self._sound = False
        """Whether the last look was applied: what is remembered then matches the database."""
        self._saved_at = self._cleaned_at = datetime.min.replace(tzinfo=UTC)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)
        self.failures = 0
        """Looks that failed, mostly because the database was away."""

    @property
    def leading(self) -> bool:
        """Whether the last look held the lease."""
        return self._fence is not None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within a few seconds and keeps the state of the watches."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(3.0)

    def wake(self) -> None:
        """Takes the next look now."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._config.period_s)
            self._wake.clear()
            if self._stop.is_set():
                break
            try:
                self.look(utc_now())
            except Exception:
                self.failures += 1
                log.exception("a look for alarms failed; it is tried again")
        if self._fence is not None and self._sound:
            try:
                self._save(self._fence, utc_now())
            except Exception:
                log.exception("the state of the watches was not kept; the next process reads a minute again")

    def look(self, now: datetime) -> int:
        """One look; returns the number of findings that are present."""
        with writing(self._engine) as session:
            fence = take_lease(session, LEASE, self._holder, seconds=self._config.lease_s, now=now)
            session.commit()
        taken_over, self._fence = fence != self._fence, fence
        if fence is None:
            return 0
        if taken_over:
            log.info("%s raises alarms with fence %s", self._holder, fence)
        if taken_over or not self._sound:
            # What was read and not applied is read again from the kept state.
            self._load()
        self._sound = False
        sums, heard = self._news(now)
        self._count_traffic(sums)
        findings = [f for name in self._watches for f in self._step(name, now, sums)] + self._checked(now)
        if not self._apply(Look(findings, heard, now), fence):
            return 0
        self._sound = True
        if (now - self._saved_at).total_seconds() >= _SAVE_S:
            self._save(fence, now)
        if (now - self._cleaned_at).total_seconds() >= _CLEAN_S:
            self._clean(now)
        return len(findings)

    # -- what is read ------------------------------------------------------------------------------------------

    def _news(self, now: datetime) -> tuple[list[LineSum], frozenset[str]]:
        """Returns the sums that were stored since the last look, oldest first per line, and who was heard."""
        with reading(self._engine) as session:
            sites = _sites(session, now - _FIRST_LOOK)
            horizon = now - _FIRST_LOOK
            watermarks = {
                line: max(horizon, _time(self._read[line].at_us)) if line in self._read else horizon for line in sites
            }
            windows, events = arrived(session, watermarks) if watermarks else ([], [])
        new = [
            stored
            for stored in windows
            if self._is_new(stored.agent_id, (stored.boot_id, stored.seq), stored.received_at)
        ]
        spoke = {line for line, key, at in events if self._is_new(line, key, at)}
        heard = frozenset({stored.agent_id for stored in new} | spoke)
        self._counters["alarm_windows_refused"] += sum(stored.window is None for stored in new)
        for line in heard:
            self._forget_keys(self._read[line])
        return [
            LineSum(site=sites[stored.agent_id], line=stored.agent_id, window=stored.window)
            for stored in sorted(new, key=_order)
            if stored.window is not None
        ], heard

    def _is_new(self, line: str, key: tuple[str, int], at: datetime) -> bool:
        at_us = _microseconds(at)
        read, name = self._read.setdefault(line, _Read(0)), f"{key[0]}.{key[1]}"
        if name in read.keys or at_us < read.at_us - _KEYS_KEPT / timedelta(microseconds=1):
            return False
        read.keys[name] = at_us
        read.at_us = max(read.at_us, at_us)
        return True

    def _forget_keys(self, read: _Read) -> None:
        oldest = read.at_us - int(_KEYS_KEPT / timedelta(microseconds=1))
        read.keys = {name: at_us for name, at_us in read.keys.items() if at_us >= oldest}

    def _count_traffic(self, sums: Iterable[LineSum]) -> None:
        for one in sums:
            sorting = self._sorting(one.window.bundle)
            if sorting is not None:
                traffic = self._traffic.setdefault(one.line, Traffic())
                traffic.add(one.window, sorting.accepted, usual=one.line not in self._troubled)
            self._last[one.line] = one

    def _sorting(self, bundle: str) -> Sorting | None:
        recipe = self._recipe(bundle)
        return sorting_of(recipe) if recipe is not None else None

    # -- what is found -----------------------------------------------------------------------------------------

    def _step(self, name: str, now: datetime, sums: Sequence[LineSum]) -> list[Finding]:
        """Steps one watch; where it fails, line by line, so that one line's data never hide the others'."""
        watch, now_s = self._watches[name], now.timestamp()
        try:
            return watch.step(now_s, sums)
        except Exception:
            self._counters["alarm_watch_failed"] += 1
            log.exception("the watch %s did not take %s sums; each line is tried alone", name, len(sums))
        found: dict[str, Finding] = {}
        for line in sorted({one.line for one in sums}):
            try:
                found |= {f.key: f for f in watch.step(now_s, [one for one in sums if one.line == line])}
            except Exception:
                self._counters["alarm_sums_refused"] += 1
                log.exception("the watch %s takes nothing of %s", name, line)
        return list(found.values())

    def _checked(self, now: datetime) -> list[Finding]:
        with reading(self._engine) as session:
            sites = _sites(session, now - _FIRST_LOOK)
            return [finding for check in self._checks for finding in check.look(session, sites, now)]

    def _cost(self, finding: Finding) -> dict[str, object]:
        last = self._last.get(finding.line)
        if last is None:
            return {}
        recipe = self._recipe(last.window.bundle)
        prices = Prices.of(recipe, last.window.variety, last.window.lot) if recipe is not None else None
        return cost_of_waiting(finding, prices, self._traffic.get(finding.line))

    def _apply(self, look: Look, fence: int) -> bool:
        """Writes what was found; False where another process leads by now."""
        with writing(self._engine) as session:
            if not holds_lease(session, LEASE, self._holder, fence):
                log.warning("fence %s is no longer ours; nothing was written", fence)
                self._fence = None
                return False
            changed = self.register.apply(session, look)
            for alarm in changed:
                self._counters["alarms_raised"] += 1
                log.info("alarm %s: %s %s", alarm.id, alarm.severity, alarm.key)
                decide(session, alarm, self._config.policies, look.now)
            self._troubled = frozenset(alarm.line for alarm in active_alarms(session).values() if alarm.line)
            session.commit()
        return True

    # -- what is kept ------------------------------------------------------------------------------------------

    def _load(self) -> None:
        with reading(self._engine) as session:
            kept = {row.name: row.state for row in session.exec(select(AlarmWatch))}
        self._watches = {name: self._made(name, kept.get(name, b"")) for name in self._makers}
        try:
            self._read = msgspec.msgpack.decode(kept.get(_READER, b"\x80"), type=dict[str, _Read])
        except msgspec.MsgspecError:
            self._counters["alarm_state_refused"] += 1
            self._read = {}

    def _made(self, name: str, state: bytes) -> Watch:
        if state:
            try:
                return self._makers[name](state)
            except SortlineError as error:
                self._counters["alarm_state_refused"] += 1
                log.warning("the watch %s begins afresh: %s", name, error)
        return self._makers[name](b"")

    def _save(self, fence: int, now: datetime) -> None:
        """Keeps how far each line was read and the states of the watches, all in one transaction."""
        states = {name: watch.dump() for name, watch in self._watches.items()}
        states[_READER] = msgspec.msgpack.encode(self._read)
        with writing(self._engine) as session:
            if not holds_lease(session, LEASE, self._holder, fence):
                return
            for name, state in states.items():
                row = session.get(AlarmWatch, name) or AlarmWatch(name=name, updated_at=now)
                row.state, row.updated_at = state, now
                session.add(row)
            session.commit()
        self._saved_at = now

    def _clean(self, now: datetime) -> None:
        """Deletes what was over long ago."""
        with writing(self._engine) as session:
            forgotten = forget_old(session, now - timedelta(days=self._config.keep_days))
            session.commit()
        self._cleaned_at = now
        oldest_us = _microseconds(now - timedelta(days=1))
        self._read = {line: read for line, read in self._read.items() if read.at_us >= oldest_us}
        self._traffic = {line: traffic for line, traffic in self._traffic.items() if line in self._read}
        self._last = {line: last for line, last in self._last.items() if line in self._read}
        self._counters["alarms_forgotten"] += forgotten


def _order(stored: StoredWindow) -> tuple[datetime, int]:
    return stored.received_at, stored.seq


def _sites(session: Session, since: datetime) -> dict[str, str]:
    """Returns the site of each line of which something was stored since then."""
    query = select(Agent.id, Agent.labels).where(col(Agent.stored_at) > since)
    return {agent_id: str(labels.get("site", "")) for agent_id, labels in session.exec(query)}


def _microseconds(at: datetime) -> int:
    return round(at.timestamp() * 1_000_000)


def _time(at_us: int) -> datetime:
    return datetime.fromtimestamp(at_us / 1_000_000, UTC)
