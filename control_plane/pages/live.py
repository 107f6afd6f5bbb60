"""The fleet's rows, live: one look, one rendering and one compression a tick, however many people watch.

A row is cut into parts, and a tick carries the parts that changed. Every part has the version in which it changed
last, so a page that was away gets what it missed and nothing else. A client that takes slowly misses ticks and catches
up: nothing is queued for it.
"""

import asyncio
import json
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final

import anyio.to_thread
from fastapi import Request
from fastapi.responses import StreamingResponse

from control_plane.data.class_order import in_class_order
from control_plane.monitoring.figures import DRIFT_LIMIT, LATENCY_BUDGET_MS, Drift, Figures
from control_plane.monitoring.status import ORDER, AgentStatus, State
from control_plane.pages.rendering import WORDS, environment
from control_plane.services import Services

_TICK_S: Final = 1.0
_BY_ALARM: Final = {"critical": State.OUT_OF_SPEC, "warning": State.MAINTENANCE}
"""A line whose agent is well but that has an alarm is in this state (NAMUR NE 107); information changes none."""
_BEHIND_S: Final = 5.0
"""From this age of the oldest message that is not stored yet the page says that the control plane is behind."""
# An endless gzip stream is a header, then blocks: one that was compressed by itself and ends on a byte fits any client.
_GZIP_HEADER: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no", "vary": "accept-encoding"}


@dataclass(slots=True)
class Row:
    """One agent's row, in parts that change by themselves."""

    id: str
    state: State
    order: str
    who: str
    """Cells from the state to the model."""
    rate: str
    """Items per second."""
    figures: str
    """Cells from the verdicts to the dropped frames."""
    times: tuple[int, int]
    """When the newest window and the last sign of life came, milliseconds since 1970; 0 = never."""
    versions: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """In which version each part changed last."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """The parts in the order of `versions`."""
        return (f"{self.order}{self.who}", self.rate, self.figures, self.times)

    @property
    def html(self) -> str:
        """The whole row."""
        window_ms, seen_ms = self.times
        return (
            f'<tr data-agent="{self.id}" data-state="{self.state}" data-order="{self.order}">{self.who}'
            f'<td class="n">{self.rate}</td>{self.figures}'
            f'<td class="n" data-at="{window_ms}"></td><td class="n" data-at="{seen_ms}"></td></tr>'
        )

    def since(self, version: int) -> dict[str, Any] | None:
        """Returns the parts that changed after this version; None where nothing did."""
        changed = [at > version for at in self.versions]
        if not any(changed):
            return None
        found: dict[str, Any] = {"id": self.id}
        if changed[0]:
            found |= {"state": self.state, "order": self.order, "who": self.who}
        if changed[1]:
            found["rate"] = self.rate
        if changed[2]:
            found["figures"] = self.figures
        if changed[3]:
            found["times"] = self.times
        return found


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page shows: its rows, worst first, and their version."""

    version: str
    rows: list[Row]
    classes: list[str]


class RowFeed:
    """Rows as HTML, worked out once per look at the fleet.

    Args:
        services: Of the application.
        root: Prefix of links.
    """

    def __init__(self, services: Services, root: str) -> None:
        self._services, self._root = services, root
        self._cells: Any = environment.get_template("_row.html").module
        self._lock = Lock()
        self._statuses: Sequence[AgentStatus] | None = None
        self._alarms: Mapping[str, tuple[int, str, str]] = {}
        """Line -> number, severity and cause of its worst alarm."""
        self._rows: dict[str, Row] = {}
        self._kept: dict[str, tuple[Any, str, Figures, Drift, str]] = {}
        """Agent -> what the parts were made of, and the parts: what did not change is not rendered again."""
        self._gone: dict[str, int] = {}
        """Agent that was forgotten -> version in which it went."""
        self._version = 0
        self._epoch = secrets.token_hex(4)
        """A version is one of this process: after a restart every page gets everything."""
        self._chunks: dict[tuple[str, bool], bytes] = {}
        """What clients of the same version get now, by version and whether compressed."""
        self._tick_at = -1e9

    # -- rows -------------------------------------------------------------------------------------------------

    def shown(self) -> Shown:
        """Returns the rows as of now. Blocks: not for the event loop."""
        self._services.live.watch()
        with self._lock:
            self._look()
            rows = sorted(self._rows.values(), key=lambda row: row.order)
            names = {name for status in self._statuses or () for name in status.figures.classes}
            good = [s.figures.class_order[0] for s in self._statuses or () if s.figures.class_order]
            return Shown(self.version, rows, in_class_order(names, max(set(good), key=good.count, default="")))

    @property
    def version(self) -> str:
        """The newest version, as a page names it."""
        return f"{self._epoch}.{self._version}"

    def _look(self) -> None:
        statuses = self._services.board.snapshot(_TICK_S / 2)
        if statuses is self._statuses:
            return
        self._statuses, self._alarms = statuses, self._services.alarms.worst()
        number = self._version + 1
        rows: dict[str, Row] = {}
        changed = False
        for status in statuses:
            row, before = self._row(status), self._rows.get(status.id)
            if before is None:
                row.versions = [number] * 4
                self._gone.pop(status.id, None)
            else:
                row.versions = [
                    number if new != old else at
                    for new, old, at in zip(row.parts, before.parts, before.versions, strict=True)
                ]
            changed = changed or number in row.versions
            rows[status.id] = row
        for agent_id in self._rows.keys() - rows.keys():
            self._gone[agent_id] = number
            self._kept.pop(agent_id, None)
            changed = True
        self._rows = rows
        if changed:
            self._version = number
        self._chunks = {}

    def _row(self, status: AgentStatus) -> Row:
        runs, link = status.runs, status.link
        alarm = self._alarms.get(status.id)
        state = _BY_ALARM.get(alarm[1], State.GOOD) if alarm and status.state is State.GOOD else status.state
        key = (
            alarm,
            *(status.state, status.reason, status.labels, runs.model, runs.active, runs.desired, runs.in_sync),
            *(runs.released, runs.shadow, runs.shadow_phase, round(runs.progress, 2), runs.phase),
        )
        kept = self._kept.get(status.id)
        if kept is not None and kept[0] == key:
            who = kept[1]
        else:
            who = str(self._cells.who(status, state, WORDS[state], self._root, alarm)).strip()
        if kept is not None and kept[2] is status.figures and kept[3] is status.drift:
            figures = kept[4]
        else:
            figures = str(self._cells.figures(status, LATENCY_BUDGET_MS, DRIFT_LIMIT)).strip()
        self._kept[status.id] = key, who, status.figures, status.drift, figures
        rate = status.live.items_per_s if status.live is not None else 0.0

        def at(age_s: float | None) -> int:
            return 0 if age_s is None else round(status.at_ms - age_s * 1000)

        return Row(
            id=status.id,
            state=state,
            order=f"{ORDER[state]}-{status.id}",
            who=who,
            rate=f"{rate:.1f}",
            figures=figures,
            times=(at(link.window_age_s), at(link.seen_age_s)),
        )

    # -- what is sent -----------------------------------------------------------------------------------------

    def news(self, since: str, zipped: bool) -> tuple[bytes, str]:
        """Returns what a page of this version must get now, and the version it has then. Blocks."""
        self._services.live.watch()
        with self._lock:
            self._look()
            key = since, zipped
            if key not in self._chunks:
                text = self._events(since).encode()
                self._chunks[key] = _block(text) if zipped else text
            return self._chunks[key], self.version

    def _events(self, since: str) -> str:
        epoch, _, number = since.partition(".")
        known = int(number) if epoch == self._epoch and number.isdecimal() else -1
        text = ""
        if known < self._version:
            rows = [found for row in self._rows.values() if (found := row.since(known)) is not None]
            body: dict[str, Any] = {"rows": rows, "gone": [i for i, at in self._gone.items() if at > known]}
            if known < 0:
                body["all"] = True
            text = f"id: {self.version}\nevent: rows\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"
        return text + f"event: tick\ndata: {json.dumps(self._state())}\n\n"

    def _state(self) -> dict[str, Any]:
        backlog = self._services.intake.backlog()
        behind = backlog.oldest_s >= _BEHIND_S or backlog.shed_lately > 0
        return {"now": time.time_ns() // 1_000_000} | (
            {"waiting": backlog.waiting, "delay_s": round(backlog.oldest_s), "shed": backlog.shed_lately}
            if behind
            else {}
        )


def _block(text: bytes) -> bytes:
    """Returns the text as deflate blocks that end on a byte and refer to nothing before them."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)


def stream(request: Request, feed: RowFeed, since: str) -> StreamingResponse:
    """Returns an endless answer with what changes, once a second."""
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    headers = _HEADERS | ({"content-encoding": "gzip"} if zipped else {})
    return StreamingResponse(
        _news(request, feed, since, zipped=zipped), media_type="text/event-stream", headers=headers
    )


async def _news(request: Request, feed: RowFeed, since: str, *, zipped: bool) -> AsyncIterator[bytes]:
    if zipped:
        yield _GZIP_HEADER
    while not await request.is_disconnected():
        chunk, since = await anyio.to_thread.run_sync(feed.news, since, zipped)
        yield chunk
        # All clients look in the same moment, so they share what is worked out and compressed.
        await asyncio.sleep(_TICK_S - time.monotonic() % _TICK_S)
