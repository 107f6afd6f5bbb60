"""The page of one agent: latency, verdict mix, drift by feature, events, labels, and the form that names a lot."""

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from control_plane.database.engine import reading
from control_plane.database.lookup import events_of, unknown_agent
from control_plane.database.tables.columns import utc_now
from control_plane.monitoring.fidelity import fidelity_between
from control_plane.monitoring.figures import DRIFT_LIMIT, LATENCY_BUDGET_MS
from control_plane.monitoring.windows import windows_of
from control_plane.pages.charts import Mark, lines, shares
from control_plane.pages.rendering import WORDS, page
from control_plane.services import services_of
from models.windows import Window

router = APIRouter(include_in_schema=False)
_WINDOWS: Final = 360
"""One hour of windows of ten seconds."""
_EVENTS: Final = 30
_FIDELITY_OF: Final = timedelta(days=1)
_SEEN: Final = ("fired", "confirmed", "missed", "double", "unexpected")
"""What is known of an ejector, in the order in which a person asks."""


@router.get("/agents/{agent_id}", response_class=HTMLResponse)
def agent(agent_id: str, request: Request) -> HTMLResponse:
    """Shows one agent."""
    services = services_of(request)
    services.live.watch()
    status = services.board.one(agent_id)
    if status is None:
        raise unknown_agent(agent_id)
    with reading(services.engine) as session:
        found = windows_of(session, agent_id=agent_id, usable=True, limit=_WINDOWS)
        events = events_of(session, agent_id, _EVENTS)
        now = utc_now()
        fidelity = fidelity_between(session, agent_id, now - _FIDELITY_OF, now)
    windows = [(stored.received_at, stored.window) for stored in reversed(found) if stored.window is not None]
    latency = lines(
        [
            ("p50", [(at, w.latency_ms.quantile(0.5)) for at, w in windows]),
            ("p99", [(at, w.latency_ms.quantile(0.99)) for at, w in windows]),
        ],
        budget=LATENCY_BUDGET_MS,
        marks=(marks := _changes(windows)),
    )
    known = status.figures.class_order
    classes = [*known, *sorted({name for _, w in windows for name in w.classes} - set(known))]
    return page(
        request,
        "agent.html",
        "Fleet",
        status=status,
        word=WORDS[status.state],
        latency=latency,
        verdicts=shares([(at, w.classes) for at, w in windows], classes, marks=marks),
        classes=classes,
        drift=sorted(status.drift.drift_by_feature.items(), key=lambda pair: -pair[1]),
        drift_limit=DRIFT_LIMIT,
        events=events,
        fidelity=fidelity,
        policy=services.upkeep.policy,
        usage=services.upkeep.usage,
        ejectors=_ejectors(status.figures.ejectors, status.figures.lead_ms),
        labels=_labels(status.labels_reported, status.labels_assigned),
    )


def _labels(reported: dict[str, str], assigned: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns (name, value that holds, where it comes from) of every label, by name."""
    found = []
    for name in sorted({*reported, *assigned}):
        if name not in assigned:
            found.append((name, reported[name], "reported"))
        elif name not in reported or reported[name] == assigned[name]:
            found.append((name, assigned[name], "assigned"))
        else:
            found.append((name, assigned[name], f"assigned; the agent reports {reported[name]}"))
    return found


def _ejectors(counts: dict[str, int], lead_ms: dict[str, float]) -> list[str]:
    """Returns `lane 0, reject: 41 fired, 40 confirmed, 1 missed, lead 32 ms`, one line per ejector."""
    found: dict[str, list[str]] = {}
    for word in _SEEN:
        for name, count in counts.items():
            ejector, _, what = name.rpartition("/")
            if what == word:
                found.setdefault(ejector, []).append(f"{count} {word}")
    for ejector, lead in lead_ms.items():
        found.setdefault(ejector, []).append(f"lead {lead:.0f} ms")
    return [f"lane {key.replace('/', ', ')}: {', '.join(words)}" for key, words in sorted(found.items())]


def _changes(windows: list[tuple[datetime, Window]]) -> list[Mark]:
    """Returns where the bundle, the lot or the variety changed."""
    found: list[Mark] = []
    for (_, before), (at, window) in pairwise(windows):
        words = [word for word in ("bundle", "lot", "variety") if getattr(before, word) != getattr(window, word)]
        if words:
            found.append((at, " ".join(words)))
    return found
