"""What held on a line at a moment: bundle, recipe, terms, camera, lot, who approved it, and what the line saw.

The answer is put together from what is kept for long: set-ups of agents (`fleet.history`), rollouts and the audit
trail, the registry, the bundle's recipe, and windows or, where they were deleted, the shortest sum that is left. What
is not known is missing in the answer; nothing is taken from the present.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from sqlmodel import Session, col, desc, or_, select

from control_plane.database.lookup import unknown_agent
from control_plane.database.tables.agents import Agent, EventRow
from control_plane.database.tables.audit import Audit
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.database.tables.rollouts import Rollout, RolloutAgent
from control_plane.fleet.history import SetUp, next_change, set_up_at
from control_plane.monitoring.figures import figures_of, flat
from control_plane.monitoring.sorting import sorting_of
from control_plane.monitoring.windows import SPANS, spans_of, windows_around
from control_plane.registry.store import Store
from models.bundle import RECIPE
from models.errors import InputError, SortlineError
from models.recipe import Recipe, parse_recipe
from models.windows import Window

_EVENTS_AROUND: Final = timedelta(minutes=10)
_MOST_EVENTS: Final = 50
_APPROVALS: Final = ("rollout.create", "rollout.approve", "rollout.resume", "rollout.assign", "rollout.wave")
_VERSION_ACTIONS: Final = ("version.register", "version.stage", "recipe.change")


class AsOf(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one line at one moment. Empty texts and None stand for what is not known."""

    agent: str
    at: datetime
    known_since: datetime | None = None
    """When the set-up was reported first; None = nothing had been reported by then."""
    known_until: datetime | None = None
    """When it changed; None = it still holds."""
    bundle: str = ""
    model: str = ""
    """`name:number` of the versions that the bundle is registered as."""
    phase: str = ""
    safe_state: str = ""
    challenger: str = ""
    line_running: bool | None = None
    camera: str = ""
    """Description of the frame source."""
    camera_fault: str = ""
    hardware: dict[str, str] = {}
    labels: dict[str, str] = {}
    lot: str = ""
    variety: str = ""
    lot_source: str = ""
    lot_since: datetime | None = None
    """By the agent's clock."""
    lot_named_by: str = ""
    terms_of: str = ""
    """Whose terms held: lot, variety or recipe."""
    terms: dict[str, Any] = {}
    """The terms in force, names and prices as in `recipe.json`."""
    recipe: dict[str, Any] = {}
    """Good class, classes, and the outlets of the grades."""
    rollout: int | None = None
    """The rollout that brought the bundle to this agent."""
    ordered_by: str = ""
    approved_by: str = ""
    approvals: tuple[dict[str, Any], ...] = ()
    """Entries of the audit trail that led to it, oldest first."""
    seen_in: str = ""
    """Where the figures come from: window, minute, hour or day; empty = the line sent none for that time."""
    seen_from: datetime | None = None
    seen: dict[str, Any] = {}
    lane: int | None = None
    lane_seen: dict[str, Any] = {}
    """Counts of the lane asked for."""
    events: tuple[dict[str, Any], ...] = ()
    """Events of the agent from ten minutes before to ten minutes after."""


def as_of(session: Session, store: Store, agent_id: str, at: datetime, lane: int | None = None) -> AsOf:
    """Returns what held on a line at a moment.

    Args:
        session: Reads.
        store: Where recipes of bundles are.
        agent_id: Which line.
        at: When, aware.
        lane: Whose counts to show beside those of the line, from 0.

    Raises:
        InputError: `agent.unknown`; `agent.no_lane` for a lane the line did not have.
    """
    found = set_up_at(session, agent_id, at)
    if found is None and session.get(Agent, agent_id) is None:
        raise unknown_agent(agent_id)
    set_up = found[0] if found else SetUp()
    facts: dict[str, Any] = _set_up_facts(set_up) if found else {}
    if found:
        facts |= {"known_since": found[1].at, "known_until": next_change(session, agent_id, at)}
    source, start, window = _seen(session, agent_id, at)
    bundle = window.bundle if window is not None and source == "window" else set_up.active
    recipe = _recipe(store, bundle)
    if window is not None and source == "window":
        facts |= {"bundle": bundle, "lot": window.lot, "variety": window.variety}
    if recipe is not None:
        lot, variety = facts.get("lot", ""), facts.get("variety", "")
        facts |= {"terms_of": recipe.terms_source(variety, lot), "recipe": _described(recipe)}
        facts["terms"] = msgspec.to_builtins(recipe.terms_of(variety, lot))
    if window is not None:
        seen = flat(figures_of(window, sorting_of(recipe) if recipe else None))
        seen |= {"camera_health": msgspec.to_builtins(window.camera_health)} if window.camera_health else {}
        facts |= {"seen_in": source, "seen_from": start, "seen": seen}
        if lane is not None:
            facts["lane_seen"] = _lane(window, lane)
    return AsOf(
        agent=agent_id,
        at=at,
        model=", ".join(_versions(session, bundle)),
        lane=lane,
        lot_named_by=_named_by(session, agent_id, at, facts.get("lot", "")),
        events=_events(session, agent_id, at),
        **_approval(session, agent_id, bundle, at),
        **facts,
    )


def _set_up_facts(set_up: SetUp) -> dict[str, Any]:
    since_ms = set_up.lot.since_ms
    return {
        "bundle": set_up.active,
        "phase": str(set_up.phase),
        "safe_state": str(set_up.safe_state),
        "challenger": set_up.shadow,
        "line_running": set_up.line_running,
        "camera": set_up.camera,
        "camera_fault": set_up.camera_fault,
        "hardware": set_up.hardware,
        "labels": set_up.labels,
        "lot": set_up.lot.lot,
        "variety": set_up.lot.variety,
        "lot_source": str(set_up.lot.source),
        "lot_since": datetime.fromtimestamp(since_ms / 1000.0, UTC) if 0 < since_ms < 4e12 else None,
    }


def _seen(session: Session, agent_id: str, at: datetime) -> tuple[str, datetime | None, Window | None]:
    """Returns the shortest record that holds this moment: its kind, its start, and what it counted."""
    for stored in windows_around(session, agent_id, at):
        return "window", stored.started_at, stored.window
    for name, span_s in SPANS.items():
        sums = spans_of(session, agent_id, span_s, at, at + timedelta(microseconds=1))
        holding = [one for one in sums if one.first_at <= at <= one.last_at and one.window is not None]
        if holding:
            return name, holding[-1].start, holding[-1].window
    return "", None, None


def _recipe(store: Store, bundle: str) -> Recipe | None:
    try:
        return parse_recipe(store.part(bundle, RECIPE)) if bundle else None
    except SortlineError:
        return None


def _described(recipe: Recipe) -> dict[str, Any]:
    outlets = {name: grade.outlet for name, grade in recipe.graded.items()}
    return {"good_class": recipe.good_class, "classes": list(recipe.classes), "outlets": outlets}


def _lane(window: Window, lane: int) -> dict[str, Any]:
    if lane >= len(window.lanes):
        raise InputError(
            "agent.no_lane",
            "The line had no such lane at that time.",
            expected=f"0 to {len(window.lanes) - 1}" if window.lanes else "a line with lanes",
            got=lane,
        )
    counts: dict[str, Any] = {"items": window.lanes[lane]}
    if lane < len(window.by_lane):
        one = window.by_lane[lane]
        counts |= {"classes": one.classes, "grades": one.grades, "outlets": one.outlets}
    return counts


def _named_by(session: Session, agent_id: str, at: datetime, lot: str) -> str:
    """Returns who named this lot by the control plane; empty where the line or nobody did."""
    query = select(Audit).where(Audit.action == "agent.lot", Audit.object == agent_id, col(Audit.at) <= at)
    entry = session.exec(query.order_by(desc(Audit.id)).limit(1)).first()
    return entry.actor if entry is not None and lot and entry.details.get("lot") == lot else ""


def _approval(session: Session, agent_id: str, bundle: str, at: datetime) -> dict[str, Any]:
    """Returns the rollout that brought the bundle here last before that time, and the entries that led to it."""
    if not bundle:
        return {}
    query = select(Rollout, RolloutAgent).join(RolloutAgent, col(RolloutAgent.rollout_id) == col(Rollout.id))
    query = query.where(
        RolloutAgent.agent_id == agent_id, Rollout.bundle == bundle, col(RolloutAgent.assigned_at) <= at
    )
    row = session.exec(query.order_by(desc(RolloutAgent.assigned_at)).limit(1)).first()
    versions = _versions(session, bundle)
    objects = [_acted_on(versions, _VERSION_ACTIONS)] if versions else []
    facts: dict[str, Any] = {}
    if row is not None:
        rollout, _part = row
        facts = {"rollout": rollout.id, "ordered_by": rollout.created_by, "approved_by": rollout.approved_by}
        objects.append(_acted_on([str(rollout.id)], _APPROVALS))
    if not objects:
        return facts
    entries = session.exec(select(Audit).where(or_(*objects), col(Audit.at) <= at).order_by(col(Audit.id)))
    facts["approvals"] = tuple(
        {"at": entry.at, "actor": entry.actor, "action": entry.action, "object": entry.object, "details": entry.details}
        for entry in entries
    )
    return facts


def _acted_on(objects: Sequence[str], actions: Sequence[str]) -> Any:
    """Returns the condition for entries of these actions on these objects."""
    return col(Audit.object).in_(objects) & col(Audit.action).in_(actions)


def _versions(session: Session, bundle: str) -> list[str]:
    """Returns the versions that this bundle is registered as, the first one first."""
    query = select(Model.name, ModelVersion.number).join(Model, col(Model.id) == col(ModelVersion.model_id))
    rows = session.exec(query.where(ModelVersion.bundle == bundle).order_by(col(ModelVersion.id)))
    return [f"{name}:{number}" for name, number in rows]


def _events(session: Session, agent_id: str, at: datetime) -> tuple[dict[str, Any], ...]:
    query = select(EventRow).where(
        EventRow.agent_id == agent_id,
        col(EventRow.received_at) >= at - _EVENTS_AROUND,
        col(EventRow.received_at) <= at + _EVENTS_AROUND,
    )
    rows = session.exec(query.order_by(col(EventRow.received_at)).limit(_MOST_EVENTS))
    return tuple({"at": row.at, "code": row.code, "message": row.message, "facts": row.facts} for row in rows)
