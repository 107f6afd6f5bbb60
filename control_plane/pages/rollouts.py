"""The page of rollouts: every wave with its agents, rates and limits, live; its buttons are calls of the API."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from markupsafe import Markup
from sqlmodel import desc, select

from control_plane.database.engine import reading
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.database.tables.rollouts import Rollout, RolloutState
from control_plane.pages.rendering import environment, page
from control_plane.rollouts.description import describe
from control_plane.rollouts.planner import TRANSITIONS
from control_plane.rollouts.policy import Outcome
from control_plane.services import Services, services_of

router = APIRouter(include_in_schema=False)
_TICK_S: Final = 1.0
_SHOWN: Final = 30
_ENDED: Final = frozenset({RolloutState.COMPLETED, RolloutState.ABORTED, RolloutState.ROLLED_BACK})
_CHIPS: Final = 36
"""A wave of more agents than this shows marks without names, except where something went wrong."""
# Best first; the class gives the colour, the letter and the word say the same without it.
_LOOK: Final = {
    Outcome.SUCCEEDED: ("ok", "", "runs it"),
    Outcome.IN_PROGRESS: ("busy", "", "working on it"),
    Outcome.QUEUED: ("wait", "", "waiting"),
    Outcome.CANCELED: ("gone", "", "cancelled"),
    Outcome.REMOVED: ("gone", "L", "left by rule"),
    Outcome.TIMED_OUT: ("late", "T", "timed out"),
    Outcome.REJECTED: ("refused", "R", "rejected"),
    Outcome.FAILED: ("broken", "F", "failed"),
}
_ACTIONS: Final = {
    "approve": "Approve",
    "resume": "Resume",
    "pause": "Pause",
    "finish": "Finish here",
    "abort": "Abort",
    "rollback": "Roll back",
}


def wave_bar(counts: dict[str, int], size: int) -> Markup:
    """A bar of one wave, divided by outcome."""
    parts, at = [], 0.0
    for outcome, (look, _, _) in _LOOK.items():
        width = 600.0 * counts.get(str(outcome), 0) / max(size, 1)
        parts.append(Markup('<rect class="o-{}" x="{:.1f}" width="{:.1f}" height="8"/>').format(look, at, width))
        at += width
    text = ", ".join(f"{counts[str(o)]} {words}" for o, (_, _, words) in _LOOK.items() if counts.get(str(o)))
    return Markup(
        '<svg class="wavebar" viewBox="0 0 600 8" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(text, Markup("").join(parts))


def limit_bar(value: float, limit: float, full: float) -> Markup:
    """A bar of `value` on a scale to `full`, with a mark where `limit` is."""
    width, mark = 200.0 * min(value / full, 1.0), 200.0 * min(limit / full, 1.0)
    return Markup(
        '<svg class="limitbar{}" viewBox="0 0 200 12" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="ground" y="3" width="200" height="6"/><rect class="value" y="3"'
        ' width="{:.1f}" height="6"/><rect class="mark" x="{:.1f}" width="2"'
        ' height="12"/></svg>'
    ).format(" over" if value >= limit else "", width, min(mark, 198.0))


def _milliseconds(text: str | None) -> int:
    return 0 if not text else int(datetime.fromisoformat(text).timestamp() * 1000)


environment.globals.update(wave_bar=wave_bar, limit_bar=limit_bar, at_ms=_milliseconds, looks=_LOOK, chips=_CHIPS)


def _card(facts: dict[str, Any]) -> dict[str, Any]:
    """What a card shows beside the facts of the API."""
    state = RolloutState(facts["state"])
    allowed = [action for action in _ACTIONS if (state, action) in TRANSITIONS]
    return {
        "r": facts,
        "buttons": [(action, _ACTIONS[action]) for action in allowed],
        "waves": [
            wave | {"members": [a for a in facts["agents"] if a["wave"] == wave["wave"]]}
            for wave in facts["wave_progress"]
        ],
        "by_outcome": {str(o): look for o, look in _LOOK.items()},
    }


_Kept = dict[int, tuple[datetime, str]]


def _cards(services: Services, root: str, kept: _Kept) -> dict[int, str]:
    """The newest rollouts as HTML, newest first; what has ended is rendered again only when it was written to."""
    template, now = environment.get_template("_rollout.html"), utc_now()
    cards: dict[int, str] = {}
    with reading(services.engine) as session:
        for r in session.exec(select(Rollout).order_by(desc(Rollout.id)).limit(_SHOWN)):
            key = r.id or 0
            before = kept.get(key)
            if before is not None and before[0] == r.updated_at and r.state in _ENDED:
                cards[key] = before[1]
                continue
            cards[key] = template.render(root=root, **_card(describe(session, r, now))).strip()
            kept[key] = (r.updated_at, cards[key])
    return cards


@router.get("/rollouts", response_class=HTMLResponse)
def rollouts(request: Request) -> HTMLResponse:
    """Rollouts, newest first, and the form that makes one."""
    services = services_of(request)
    with reading(services.engine) as session:
        names = {model.id: model.name for model in session.exec(select(Model))}
        versions = session.exec(select(ModelVersion).order_by(desc(ModelVersion.id)).limit(50)).all()
    cards = _cards(services, request.scope.get("root_path", ""), {})
    return page(request, "rollouts.html", "Rollouts", cards=cards, names=names, versions=versions)


@router.get("/rollouts/events")
def events(request: Request) -> StreamingResponse:
    """Changed cards, once a second."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(request), media_type="text/event-stream", headers=headers)


async def _stream(request: Request) -> AsyncIterator[str]:
    services, root = services_of(request), request.scope.get("root_path", "")
    sent: dict[int, str] | None = None
    kept: _Kept = {}
    while not await request.is_disconnected():
        cards = await anyio.to_thread.run_sync(_cards, services, root, kept)
        changed = [{"id": k, "html": html} for k, html in cards.items() if sent is None or sent.get(k) != html]
        sent = cards
        if changed:
            yield f"event: cards\ndata: {json.dumps(changed)}\n\n"
        yield f"event: tick\ndata: {time.time_ns() // 1_000_000}\n\n"
        await asyncio.sleep(_TICK_S)
