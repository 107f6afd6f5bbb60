"""From windows to figures with an age. Pure functions: what they need comes in, also the time.

Four independent axes (connection, health, model in sync, drift) and one derived worst state in the words of NAMUR
NE 107. Nothing is called good without a fresh heartbeat, and every figure says how old it is.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import msgspec
import numpy as np

from models.errors import MessageError
from models.messages import KEEP_ALIVE_S, Live, Phase
from models.profile import Profile, stability_index
from models.recipe import UNSURE
from models.windows import Window, merge

LATE_S: Final = 2.0 * KEEP_ALIVE_S
SILENT_S: Final = 3.0 * KEEP_ALIVE_S
DRIFT_LIMIT: Final = 0.25
"""Noise-corrected stability index from which a feature is shown as drifting. An effect size for the eye: lots differ
from each other by as much, so it does not change an agent's state until false alarms are controlled."""
DRIFT_MIN_ITEMS: Final = 200
LATENCY_BUDGET_MS: Final = 50.0
SLOW_SHARE: Final = 0.02
"""Share of verdicts beyond the budget from which a line is out of specification. About one item in a hundred loses its
last view (it touches another) and is judged when it leaves the picture, some 0.1 s later: p99 would alarm by chance."""


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


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One agent as people and programs see it."""

    id: str
    at_ms: int
    """When this was so, milliseconds since 1970: ages are of then."""
    labels: dict[str, Any]
    state: State
    reason: str
    """Why it is in this state; empty when good."""
    connection: str
    """live, late, silent, offline, never."""
    health: str
    """good, or the code of what is wrong."""
    in_sync: bool
    """Runs what it shall run."""
    released: bool
    """What it runs is released; a withdrawn bundle goes on judging until the agent gets another."""
    drift: str
    """calm, drifting, learning (too few items), unknown."""
    phase: str
    progress: float
    active: str
    model: str
    """Name and number of the active bundle where it is registered, such as `apples:3`."""
    desired: str
    generation: int
    fault: dict[str, Any] | None
    lot: dict[str, Any]
    """Which lot it reports to run: `models.messages.RunningLot`, and `age_s`."""
    lot_asked: dict[str, Any]
    """Which was named to it last, and `state`: waiting, accepted, refused, unanswered; see `fleet.lot_commands`."""
    seen_age_s: float | None
    reported_age_s: float | None
    window_age_s: float | None
    items: int
    """In the windows that were merged."""
    items_per_s: float
    views: int
    p50_ms: float | None
    p99_ms: float | None
    classes: dict[str, int]
    outlets: dict[str, int]
    grades: dict[str, int]
    """As the recipe graded them, `unsure` among them."""
    unsure_share: float | None
    """Items on which the line abstained / items."""
    ejections: dict[str, int]
    shots: dict[str, int]
    """What became of the shots; see `models.windows.Window`."""
    ejectors: dict[str, int]
    """`lane/outlet/what`: fired, and with a photo-eye confirmed, missed, double, unexpected."""
    lead_ms: dict[str, float]
    """Learnt lead per ejector."""
    jitter_p99_ms: float | None
    camera: dict[str, int]
    """Faults named, and what went by while the camera was blind."""
    truth: dict[str, int]
    escape_rate: float | None
    """Where the truth is known: defective items that were let through / defective items."""
    false_reject_rate: float | None
    frames_dropped: int
    items_unjudged: int
    verdicts_late: int
    drift_value: float | None
    drift_feature: str
    drift_by_feature: dict[str, float]
    spool_records: int
    rss_mb: float
    live: dict[str, Any] | None
    completeness: float | None
    """Windows received / windows the agent numbered."""


def merged_window(windows: Sequence[Window], bundle: str) -> Window | None:
    """All windows of one bundle as one; None when there is none."""
    whole: Window | None = None
    for window in windows:
        if window.bundle != bundle:
            continue
        try:
            whole = window if whole is None else merge(whole, window)
        except MessageError:
            continue
    return whole


def drift_of(window: Window | None, profile: Profile | None) -> dict[str, float]:
    """Stability index per monitored feature; empty when nothing can be said."""
    if window is None or profile is None or window.items == 0:
        return {}
    counts = window.feature_counts()
    reference = profile.count_array()
    if counts.shape != reference.shape:
        return {}
    values = stability_index(reference, counts)
    return {
        name: round(float(value), 4)
        for name, value in zip(profile.features, values, strict=True)
        if math.isfinite(value)
    }


def rates(truth: dict[str, int], *, good: str = "sound") -> tuple[float | None, float | None]:
    """(escape rate, false-reject rate) from `kind>outlet` counts; None where there is no such item."""
    bad = escaped = fine = wasted = 0
    for key, count in truth.items():
        kind, _, outlet = key.partition(">")
        if kind == good:
            fine, wasted = fine + count, wasted + (count if outlet != "pass" else 0)
        else:
            bad, escaped = bad + count, escaped + (count if outlet == "pass" else 0)
    return (escaped / bad if bad else None, wasted / fine if fine else None)


def completeness_of(sequence: Sequence[tuple[str, int]]) -> float | None:
    """Share of (boot, seq) numbers that arrived between the lowest and the highest of each boot."""
    expected = received = 0
    for boot in {b for b, _ in sequence}:
        numbers = [n for b, n in sequence if b == boot]
        expected, received = expected + max(numbers) - min(numbers) + 1, received + len(numbers)
    return received / expected if expected else None


def age_s(at: datetime | None, now: datetime) -> float | None:
    """Seconds since then, not negative."""
    return None if at is None else max(0.0, (now - at).total_seconds())


def connection_of(seen_s: float | None, *, online: bool) -> str:
    """What can be said of the connection by the age of the last sign of life."""
    if seen_s is None:
        return "never"
    if not online or seen_s > SILENT_S * 4:
        return "offline"
    if seen_s > SILENT_S:
        return "silent"
    return "late" if seen_s > LATE_S else "live"


def judge_state(
    *, connection: str, reported: dict[str, Any], in_sync: bool, released: bool, slow: float, late: int
) -> tuple[State, str]:
    """The worst of connection, health and sync, and why. Drift is shown beside it: see `DRIFT_LIMIT`."""
    fault = reported.get("fault") or {}
    phase = reported.get("phase", Phase.IDLE)
    rules: list[tuple[State, bool, str]] = [
        (State.OFFLINE, connection in {"offline", "never", "silent"}, f"no sign of life ({connection})"),
        (State.FAILURE, bool(reported.get("camera_fault")), str(reported.get("camera_fault"))),
        (State.FAILURE, not reported.get("line_running"), "the line process does not run"),
    ]
    checks = (
        (phase == Phase.ROLLED_BACK, f"rolled back: {fault.get('code', 'unknown')}"),
        (not reported.get("active"), "no bundle: items pass unjudged"),
        (not released, "its bundle is not released: give it another"),
        (phase in {Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST, Phase.TRIAL}, f"updating: {phase}"),
        (bool(fault), str(fault.get("code", ""))),
        (not in_sync, "does not run what it shall run"),
    )
    rules += [(State.CHECK, wrong, reason) for wrong, reason in checks]
    rules += [
        (State.OUT_OF_SPEC, slow > SLOW_SHARE, f"{slow:.1%} of verdicts take longer than {LATENCY_BUDGET_MS:g} ms"),
        (State.OUT_OF_SPEC, late > 0, "late verdicts"),
        (State.MAINTENANCE, connection == "late", "heartbeat is late"),
        (State.MAINTENANCE, reported.get("spool_records", 0) > 50, "spool is filling"),
    ]
    return next(((state, reason) for state, wrong, reason in rules if wrong), (State.GOOD, ""))


def agent_status(
    *,
    agent_id: str,
    labels: dict[str, Any],
    online: bool,
    seen_at: datetime | None,
    reported: dict[str, Any],
    reported_at: datetime | None,
    desired_bundle: str,
    generation: int,
    window: Window | None,
    last_window_at: datetime | None,
    sequence: Sequence[tuple[str, int]],
    profile: Profile | None,
    live: Live | None,
    model: str = "",
    lot_asked: dict[str, Any] | None = None,
    released: frozenset[str] | None = None,
    now: datetime,
) -> AgentStatus:
    """Everything about one agent.

    Args (the rest are the fields of its row):
        window: The recent windows of its active bundle as one (`merged_window`).
        sequence: Keys (boot, number) of the records that came recently.
        released: The bundles a release key lists; None where nothing is signed.
    """
    active = str(reported.get("active", ""))
    drift = drift_of(window, profile)
    feature = max(drift, key=lambda name: drift[name], default="")
    enough = window is not None and window.items >= DRIFT_MIN_ITEMS
    drifting = enough and bool(drift) and drift[feature] > DRIFT_LIMIT
    seen = age_s(seen_at, now)
    connection = connection_of(seen, online=online)
    in_sync = not desired_bundle or (active == desired_bundle and int(reported.get("generation", 0)) >= generation)
    allowed = released is None or not active or active in released
    p99 = _quantile(window, 0.99)
    state, reason = judge_state(
        connection=connection,
        reported=reported,
        in_sync=in_sync,
        released=allowed,
        slow=window.latency_ms.share_above(LATENCY_BUDGET_MS) if window else 0.0,
        late=window.verdicts_late if window else 0,
    )
    escape, waste = rates(window.truth) if window else (None, None)
    seconds = (window.duration_ms / 1000.0) if window else 0.0
    return AgentStatus(
        id=agent_id,
        at_ms=round(now.timestamp() * 1000),
        labels=labels,
        state=state,
        reason=reason,
        connection=connection,
        health=str((reported.get("fault") or {}).get("code", "")) or reported.get("camera_fault") or "good",
        in_sync=in_sync,
        released=allowed,
        drift="unknown" if not drift else ("learning" if not enough else ("drifting" if drifting else "calm")),
        phase=str(reported.get("phase", "")),
        progress=float(reported.get("progress", 0.0)),
        active=active,
        model=model,
        desired=desired_bundle,
        generation=generation,
        fault=reported.get("fault"),
        lot=_lot(reported, reported_at, now),
        lot_asked=lot_asked or {},
        seen_age_s=seen,
        reported_age_s=age_s(reported_at, now),
        window_age_s=age_s(last_window_at, now),
        items=window.items if window else 0,
        items_per_s=round(window.items / seconds, 2) if window and seconds else 0.0,
        views=window.views if window else 0,
        p50_ms=_quantile(window, 0.5),
        p99_ms=p99,
        classes=window.classes if window else {},
        outlets=window.outlets if window else {},
        grades=window.grades if window else {},
        unsure_share=round(window.grades.get(UNSURE, 0) / window.items, 5) if window and window.items else None,
        ejections=window.ejections if window else {},
        shots=window.shots if window else {},
        ejectors=window.ejectors if window else {},
        lead_ms=window.lead_ms if window else {},
        jitter_p99_ms=_jitter(window),
        camera=window.camera if window else {},
        truth=window.truth if window else {},
        escape_rate=escape,
        false_reject_rate=waste,
        frames_dropped=window.frames_dropped if window else 0,
        items_unjudged=window.items_unjudged if window else 0,
        verdicts_late=window.verdicts_late if window else 0,
        drift_value=drift[feature] if feature else None,
        drift_feature=feature,
        drift_by_feature=drift,
        spool_records=int(reported.get("spool_records", 0)),
        rss_mb=float(reported.get("rss_mb", 0.0)),
        live=msgspec.to_builtins(live) if live else None,
        completeness=completeness_of(sequence),
    )


def _lot(reported: dict[str, Any], reported_at: datetime | None, now: datetime) -> dict[str, Any]:
    """The age is the agent's own, however wrong its clock, and what has passed here since it said so."""
    lot: dict[str, Any] = reported.get("lot") or {}
    if not lot:
        return {}
    told_s, since_ms = age_s(reported_at, now), int(lot.get("since_ms", 0))
    ran_s = max(0.0, (int(reported.get("at_ms", 0)) - since_ms) / 1000.0)
    return {**lot, "age_s": ran_s + told_s if since_ms and told_s is not None else None}


def _jitter(window: Window | None) -> float | None:
    return round(window.jitter_ms.quantile(0.99), 3) if window and window.jitter_ms.count else None


def _quantile(window: Window | None, q: float) -> float | None:
    if window is None or window.latency_ms.count == 0:
        return None
    value = window.latency_ms.quantile(q)
    return round(float(np.round(value, 2)), 2)
