"""Derives the status of one agent, in parts, and its one worst state.

Pure functions: what they need comes in, also the time.

Four independent axes (connection, health, model in sync, drift) and one derived worst state in the words of NAMUR
NE 107. Nothing is called good without a fresh sign of life, and every figure says how old it is: an age grows, it
never turns into "never".
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import msgspec

from control_plane.fleet.reports import NO_REPORT, age_s, connection_of
from control_plane.fleet.twins import named
from control_plane.monitoring.figures import LATENCY_BUDGET_MS, NO_DRIFT, NO_FIGURES, Drift, Figures, flat
from models.messages import Live, Mode, Phase, Reported, ShadowPhase

SLOW_SHARE: Final = 0.02
"""Share of verdicts beyond the budget from which a line is out of specification. About one item in a hundred loses its
last view (it touches another) and is judged when it leaves the picture, some 0.1 s later: p99 would alarm by chance."""
_SPOOL_RECORDS: Final = 50
"""Records that wait on the agent: about four minutes of windows and events without acknowledgement."""


class State(StrEnum):
    """NAMUR NE 107, worst first."""

    FAILURE = "failure"
    CHECK = "check"
    OUT_OF_SPEC = "out-of-spec"
    MAINTENANCE = "maintenance"
    OFFLINE = "offline"
    GOOD = "good"


ORDER: Final = {
    State.FAILURE: 0,
    State.OFFLINE: 1,
    State.CHECK: 2,
    State.OUT_OF_SPEC: 3,
    State.MAINTENANCE: 4,
    State.GOOD: 5,
}


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """Connection, and the age of what was received."""

    connection: str
    """live, late, silent, offline, never."""
    seen_age_s: float | None
    """Age of the last message that was not a retained one; None = there was none."""
    reported_age_s: float | None
    window_age_s: float | None


class Runs(msgspec.Struct, frozen=True, kw_only=True):
    """Which bundle the agent runs, and which it shall run."""

    phase: str
    progress: float
    active: str
    model: str
    """Name and number of the active bundle where it is registered, such as `apples:3`."""
    desired: str
    mode: str
    """live, or shadow: the desired bundle judges beside the active one and moves nothing."""
    generation: int
    in_sync: bool
    """Runs what it shall run, as champion or as challenger."""
    released: bool
    """What it runs is released; a withdrawn bundle goes on judging until the agent gets another."""
    shadow: str
    """Digest of the challenger; empty = there is none."""
    shadow_phase: str


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One agent as people and programs see it."""

    id: str
    at_ms: int
    """When this was so, milliseconds since 1970: ages are of then."""
    state: State
    reason: str
    """Why it is in this state; empty when good."""
    health: str
    """good, or the code of what is wrong."""
    labels: dict[str, Any]
    """Those that hold: a person's label over the reported one of the same name."""
    labels_reported: dict[str, str]
    labels_assigned: dict[str, Any]
    twins: list[dict[str, str]]
    """Two boxes that speak under this identity in turn: `boot_id` and `box` of each; empty = one box."""
    fault: dict[str, Any] | None
    lot: dict[str, Any]
    """Which lot it reports to run: `models.messages.RunningLot`, and `age_s`."""
    lot_asked: dict[str, Any]
    """Which was named to it last, and `state`: waiting, accepted, refused, unanswered; see `fleet.lot_commands`."""
    spool_records: int
    rss_mb: float
    completeness: float | None
    """Records received / records the agent numbered, in the last minutes."""
    link: Link
    runs: Runs
    figures: Figures
    drift: Drift
    live: Live | None

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields of all parts in one flat table, as the API shows them."""
        found = flat(self)
        for part in ("link", "runs", "figures", "drift"):
            found |= found.pop(part)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one agent: its row, and what was made of its windows."""

    agent_id: str
    now: datetime
    reported: Reported = NO_REPORT
    reported_at: datetime | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    labels_assigned: dict[str, Any] = field(default_factory=dict)
    online: bool = False
    seen_at: datetime | None = None
    window_at: datetime | None = None
    desired_bundle: str = ""
    mode: str = Mode.LIVE
    generation: int = 0
    lot_asked: dict[str, Any] = field(default_factory=dict)
    twins: list[dict[str, str]] = field(default_factory=list)
    figures: Figures = NO_FIGURES
    drift: Drift = NO_DRIFT
    completeness: float | None = None
    live: Live | None = None
    model: str = ""
    released: frozenset[str] | None = None
    """The bundles a release key lists; None where nothing is signed."""


def link_of(
    now: datetime,
    *,
    online: bool,
    seen_at: datetime | None,
    reported_at: datetime | None,
    window_at: datetime | None,
) -> Link:
    """Returns the connection and the ages as of now."""
    seen_s = age_s(seen_at, now)
    return Link(
        connection=connection_of(seen_s, online=online),
        seen_age_s=seen_s,
        reported_age_s=age_s(reported_at, now),
        window_age_s=age_s(window_at, now),
    )


def grown_older(status: AgentStatus, link: Link, live: Live | None, now: datetime) -> AgentStatus:
    """Returns a status in which only time went by: the same connection, report, figures and orders as before.

    Law: it equals `agent_status` of the same facts at that time.
    """
    at_ms = round(now.timestamp() * 1000)
    lot = status.lot
    if lot.get("age_s") is not None:
        lot = lot | {"age_s": lot["age_s"] + (link.reported_age_s or 0.0) - (status.link.reported_age_s or 0.0)}
    shown = live if link.connection == "live" else None
    return msgspec.structs.replace(status, at_ms=at_ms, link=link, lot=lot, live=shown)


def agent_status(facts: Facts) -> AgentStatus:
    """Returns the status of one agent."""
    reported, now = facts.reported, facts.now
    link = link_of(
        now,
        online=facts.online,
        seen_at=facts.seen_at,
        reported_at=facts.reported_at,
        window_at=facts.window_at,
    )
    runs = _runs(facts)
    state, reason = next(_wrong(facts, link, runs), (State.GOOD, ""))
    fault = reported.fault
    return AgentStatus(
        id=facts.agent_id,
        at_ms=round(now.timestamp() * 1000),
        state=state,
        reason=reason,
        health=fault.code if fault else (reported.camera_fault or "good"),
        labels=facts.labels,
        labels_reported=reported.labels,
        labels_assigned=facts.labels_assigned,
        twins=facts.twins,
        fault=msgspec.to_builtins(fault) if fault else None,
        lot=_lot(reported, facts.reported_at, now),
        lot_asked=facts.lot_asked,
        spool_records=reported.spool_records,
        rss_mb=reported.rss_mb,
        completeness=facts.completeness,
        link=link,
        runs=runs,
        figures=facts.figures,
        drift=facts.drift,
        live=facts.live if link.connection == "live" else None,
    )


def _runs(facts: Facts) -> Runs:
    reported = facts.reported
    received = reported.generation >= facts.generation
    if facts.mode == Mode.SHADOW:
        # The champion stays: in sync is an agent whose challenger is the desired one and has not failed.
        failed = reported.shadow_phase is ShadowPhase.FAILED
        in_sync = received and reported.shadow == facts.desired_bundle and not failed
    else:
        in_sync = received and reported.active == facts.desired_bundle
    return Runs(
        phase=str(reported.phase) if reported is not NO_REPORT else "",
        progress=reported.progress,
        active=reported.active,
        model=facts.model,
        desired=facts.desired_bundle,
        mode=facts.mode,
        generation=facts.generation,
        in_sync=in_sync if facts.desired_bundle else received,
        released=facts.released is None or not reported.active or reported.active in facts.released,
        shadow=reported.shadow if reported.shadow_phase is not ShadowPhase.IDLE else "",
        shadow_phase=str(reported.shadow_phase),
    )


_UPDATING: Final = {Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST, Phase.TRIAL}


def _wrong(facts: Facts, link: Link, runs: Runs) -> Iterator[tuple[State, str]]:
    """Yields what is wrong, the most important first. Drift is shown beside it: see `DRIFT_LIMIT`."""
    rules = (*_failures(facts, link), *_checks(facts, runs), *_degraded(facts, link))
    return ((state, reason) for state, wrong, reason in rules if wrong)


_Rule = tuple[State, bool, str]


def _failures(facts: Facts, link: Link) -> list[_Rule]:
    reported = facts.reported
    lost = link.connection in {"offline", "never", "silent"}
    return [
        (
            State.FAILURE,
            bool(facts.twins),
            f"identity.twins: two boxes use this identity in turn: {named(facts.twins)}",
        ),
        (State.OFFLINE, lost, f"no sign of life ({link.connection})"),
        (State.FAILURE, bool(reported.camera_fault), reported.camera_fault),
        (State.CHECK, _starting(reported), "the line process is starting"),
        (State.FAILURE, not reported.line_running, "the line process does not run"),
    ]


def _starting(reported: Reported) -> bool:
    """Returns whether the first line process since the start of the agent has not begun to judge yet.

    A line that dies or hangs before that is started a second time, and counts as a failure.
    """
    return not reported.line_running and not reported.camera and reported.counters.get("line_starts", 0) <= 1


def _checks(facts: Facts, runs: Runs) -> list[_Rule]:
    reported = facts.reported
    fault = reported.fault.code if reported.fault else ""
    shadow = runs.mode == Mode.SHADOW
    failed = shadow and runs.shadow_phase == ShadowPhase.FAILED
    rules = [
        (reported.phase is Phase.ROLLED_BACK, f"rolled back: {fault or 'unknown'}"),
        (not reported.active, "no bundle: items pass unjudged"),
        (not runs.released, "its bundle is not released: give it another"),
        (reported.phase in _UPDATING, f"updating: {reported.phase}"),
        (bool(fault), fault),
        (failed, "the challenger failed"),
        # A challenger on its way, or beside the champion, is no fault of the line.
        (not runs.in_sync and not shadow, "does not run what it shall run"),
    ]
    return [(State.CHECK, wrong, reason) for wrong, reason in rules]


def _degraded(facts: Facts, link: Link) -> list[_Rule]:
    slow = facts.figures.slow_share
    return [
        (State.OUT_OF_SPEC, slow > SLOW_SHARE, f"{slow:.1%} of verdicts take longer than {LATENCY_BUDGET_MS:g} ms"),
        (State.OUT_OF_SPEC, facts.figures.verdicts_late > 0, "late verdicts"),
        (State.MAINTENANCE, link.connection == "late", "heartbeat is late"),
        (State.MAINTENANCE, facts.reported.spool_records > _SPOOL_RECORDS, "spool is filling"),
    ]


def _lot(reported: Reported, reported_at: datetime | None, now: datetime) -> dict[str, Any]:
    """The age is the agent's own, however wrong its clock, and what has passed here since it said so."""
    if reported is NO_REPORT:
        return {}
    lot: dict[str, Any] = msgspec.to_builtins(reported.lot)
    reported_s, since_ms = age_s(reported_at, now), reported.lot.since_ms
    ran_s = max(0.0, (reported.at_ms - since_ms) / 1000.0)
    return lot | {"age_s": ran_s + reported_s if since_ms and reported_s is not None else None}
