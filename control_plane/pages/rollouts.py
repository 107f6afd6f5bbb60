"""The page of rollouts: every wave with its agents, rates and limits, live; its buttons are calls of the API."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from markupsafe import Markup

from control_plane.database.engine import reading
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import Rollout, RolloutState
from control_plane.pages.rendering import environment, page
from control_plane.registry.versions import newest_versions
from control_plane.rollouts.description import describe, outline
from control_plane.rollouts.planner import TRANSITIONS
from control_plane.rollouts.policy import Outcome
from control_plane.rollouts.records import newest_rollouts
from control_plane.services import Services, services_of

router = APIRouter(include_in_schema=False)
_TICK_S: Final = 1.0
_SHOWN: Final = 30
_ENDED: Final = frozenset({RolloutState.COMPLETED, RolloutState.ABORTED, RolloutState.ROLLED_BACK})
_CHIPS: Final = 36
"""A wave of more agents than this shows single marks only where something went wrong; the bar shows the rest."""
_ROWS: Final = 200
"""So many agents are listed in a card; the API has all of them."""
_WRONG: Final = frozenset({Outcome.FAILED, Outcome.REJECTED, Outcome.TIMED_OUT})
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
    """Returns a bar of one wave, divided by outcome."""
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
    """Returns a bar of `value` on a scale to `full`, with a mark where `limit` is."""
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
    """Returns what a card shows beside the facts of the API."""
    state = RolloutState(facts["state"])
    by_wave: dict[int, list[dict[str, Any]]] = {}
    for agent in facts["agents"]:
        by_wave.setdefault(agent["wave"], []).append(agent)
    allowed = [action for action in _ACTIONS if (state, action) in TRANSITIONS]
    return {
        "r": facts,
        "buttons": [(action, _ACTIONS[action]) for action in allowed],
        "waves": [
            wave
            | {
                "members": [
                    a for a in by_wave.get(wave["wave"], ()) if wave["size"] <= _CHIPS or a["outcome"] in _WRONG
                ]
            }
            for wave in facts["wave_progress"]
        ],
        "total": sum(wave["size"] for wave in facts["wave_progress"]),
        "rows": sorted(facts["agents"], key=lambda a: a["outcome"] not in _WRONG)[:_ROWS],
        "by_outcome": {str(o): look for o, look in _LOOK.items()},
    }


class RolloutCards:
    """The newest rollouts as HTML, rendered once for all who look: once a second while they move, else when changed.

    Args:
        services: Of the application.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[datetime, float, str]] = {}
        """By prefix and rollout: its `updated_at`, when it was rendered (monotonic), and the card."""

    def render(self, root: str) -> dict[int, str]:
        """Returns the cards by rollout, newest first, for pages under this prefix."""
        with self._lock, reading(self._services.engine) as session:
            found = newest_rollouts(session, _SHOWN)
            stale = [r for r in found if not self._fresh(root, r)]
            ended = [r for r in stale if r.state in _ENDED]
            facts = {f["id"]: f for f in outline(session, ended)} if ended else {}
            facts |= {r.id: describe(session, r, utc_now()) for r in stale if r.state not in _ENDED}
            template = environment.get_template("_rollout.html")
            for r in stale:
                html = template.render(root=root, **_card(facts[r.id])).strip()
                self._kept[root, r.id or 0] = (r.updated_at, time.monotonic(), html)
            shown = {(root, r.id or 0) for r in found}
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] != root or key in shown}
            return {r.id or 0: self._kept[root, r.id or 0][2] for r in found}

    def _fresh(self, root: str, rollout: Rollout) -> bool:
        updated_at, rendered_s, _ = self._kept.get((root, rollout.id or 0), (None, 0.0, ""))
        young = rollout.state in _ENDED or time.monotonic() - rendered_s < _TICK_S / 2.0
        return updated_at == rollout.updated_at and young


def _cards_of(request: Request) -> RolloutCards:
    """Returns the cards of this application, made at the first look."""
    state = request.app.state
    if not hasattr(state, "rollout_cards"):
        state.rollout_cards = RolloutCards(services_of(request))
    found: RolloutCards = state.rollout_cards
    return found


@router.get("/rollouts", response_class=HTMLResponse)
def rollouts(request: Request) -> HTMLResponse:
    """Shows rollouts, newest first, and the form that makes one."""
    services = services_of(request)
    with reading(services.engine) as session:
        versions, names = newest_versions(session, 50)
    cards = _cards_of(request).render(request.scope.get("root_path", ""))
    return page(request, "rollouts.html", "Rollouts", cards=cards, names=names, versions=versions)


@router.get("/rollouts/events")
def events(request: Request) -> StreamingResponse:
    """Streams changed cards, once a second."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(request), media_type="text/event-stream", headers=headers)


async def _stream(request: Request) -> AsyncIterator[str]:
    cards_of, root = _cards_of(request), request.scope.get("root_path", "")
    sent: dict[int, str] | None = None
    while not await request.is_disconnected():
        cards = await anyio.to_thread.run_sync(cards_of.render, root)
        changed = [{"id": k, "html": html} for k, html in cards.items() if sent is None or sent.get(k) != html]
        sent = cards
        if changed:
            yield f"event: cards\ndata: {json.dumps(changed)}\n\n"
        yield f"event: tick\ndata: {time.time_ns() // 1_000_000}\n\n"
        await asyncio.sleep(_TICK_S)
