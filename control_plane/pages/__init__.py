"""The pages: Jinja2 on the server, one stream of changed rows, small modules of plain JavaScript, a strict CSP.

A page shows what the API tells and does nothing the API cannot. Charts are SVG drawn here. Nothing is loaded from
elsewhere.
"""

import hashlib
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from sqlmodel import desc, select

from control_plane.data.class_order import in_class_order
from control_plane.database.engine import reading
from control_plane.database.lookup import unknown_agent
from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.database.tables.jobs import Job
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.monitoring.status import LATENCY_BUDGET_MS, State
from control_plane.pages import live, rollouts
from control_plane.pages.charts import Mark, lines, meter, mix, shares
from control_plane.pages.cost_chart import cost_chart
from control_plane.pages.rendering import environment, page, unavailable_page
from control_plane.registry.recipes import changed, described, parse_change, registered
from control_plane.services import services_of
from models.errors import InputError
from models.messages import decode_packed
from models.windows import Window

_HERE = Path(__file__).parent
__all__ = ["mount_pages", "unavailable_page"]
router = APIRouter(include_in_schema=False)


def counts(table: dict[str, object]) -> str:
    """`sound 428, rot 66`: a table in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in table.items())


def age(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `2 d`: as the scripts say it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(seconds // 86_400)} d"


environment.globals.update(age=age, meter=meter, mix=mix, words=live.WORDS, class_order=in_class_order, counts=counts)


def mount_pages(app: FastAPI) -> None:
    """Adds pages and their static files."""
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
    app.include_router(router)
    app.include_router(live.router)
    app.include_router(rollouts.router)
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((_HERE / "static").iterdir()))).hexdigest()
    environment.globals["version"] = digest[:8]


@router.get("/", response_class=HTMLResponse)
def fleet(request: Request) -> HTMLResponse:
    """Fleet: worst first, live."""
    rows = live.fleet_rows(services_of(request))
    counts = {state: sum(row["status"].state is state for row in rows) for state in State}
    classes = in_class_order({name: 1 for row in rows for name in row["status"].classes})
    return page(request, "fleet.html", "Fleet", rows=rows, counts=counts, classes=classes)


_SEEN = ("fired", "confirmed", "missed", "double", "unexpected")
"""What is known of an ejector, in the order a person asks."""


@router.get("/agents/{agent_id}", response_class=HTMLResponse)
def agent(agent_id: str, request: Request) -> HTMLResponse:
    """One agent: latency, verdict mix, drift by feature, events."""
    services = services_of(request)
    status = services.statuses.one(agent_id)
    if status is None:
        raise unknown_agent(agent_id)
    with reading(services.engine) as session:
        query = select(WindowRow).where(WindowRow.agent_id == agent_id, WindowRow.refused == "")
        rows = session.exec(query.order_by(desc(WindowRow.received_at), desc(WindowRow.seq)).limit(360)).all()
        happened = session.exec(
            select(EventRow).where(EventRow.agent_id == agent_id).order_by(desc(EventRow.received_at)).limit(30)
        ).all()
    windows = [(row.received_at, decode_packed(row.payload, Window)) for row in reversed(rows)]
    latency = lines(
        [
            ("p50", [(at, w.latency_ms.quantile(0.5)) for at, w in windows]),
            ("p99", [(at, w.latency_ms.quantile(0.99)) for at, w in windows]),
        ],
        budget=LATENCY_BUDGET_MS,
        marks=(marks := _changes(windows)),
    )
    classes = in_class_order({name: 1 for _, w in windows for name in w.classes})
    verdicts = shares([(at, w.classes) for at, w in windows], classes, marks=marks)
    row = live.fleet_row(status)
    drift = sorted(status.drift_by_feature.items(), key=lambda pair: -pair[1])
    return page(
        request,
        "agent.html",
        "Fleet",
        row=row,
        status=status,
        latency=latency,
        verdicts=verdicts,
        classes=classes,
        drift=drift,
        events=happened,
        ejectors=_ejectors(status.ejectors, status.lead_ms),
    )


def _ejectors(counts: dict[str, int], lead_ms: dict[str, float]) -> list[str]:
    """`lane 0, reject: 41 fired, 40 confirmed, 1 missed, lead 32 ms`, one line per ejector."""
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
    """Where the bundle, the lot or the variety changed."""
    found: list[Mark] = []
    for (_, before), (at, window) in pairwise(windows):
        words = [word for word in ("bundle", "lot", "variety") if getattr(before, word) != getattr(window, word)]
        if words:
            found.append((at, " ".join(words)))
    return found


@router.get("/models", response_class=HTMLResponse)
def models(request: Request) -> HTMLResponse:
    """Models and their versions."""
    with reading(services_of(request).engine) as session:
        names = {model.id: model.name for model in session.exec(select(Model))}
        versions = session.exec(select(ModelVersion).order_by(desc(ModelVersion.id)).limit(200)).all()
    return page(request, "models.html", "Models", versions=versions, names=names)


_FIELDS = (
    ("escaped", "Escaped defect"),
    ("wasted", "Wasted good item"),
    ("recirculated", "Recirculation"),
    ("defect_share", "Expected share of defects"),
    ("abstain_budget", "Abstain budget"),
)


@router.get("/models/{reference}", response_class=HTMLResponse)
def version(reference: str, request: Request, variety: str = "") -> HTMLResponse:
    """One version: its recipe, what it costs on held-out items, and what other terms would cost."""
    services = services_of(request)
    name, found, recipe, held = registered(services, reference)
    shown, refused, asked = described(recipe, held, variety=variety), "", {}
    try:
        asked = _asked(request, shown["terms"])
        if asked:
            change = parse_change({"terms": asked} | ({"variety": variety} if variety else {}))
            shown = described(changed(recipe, change, held), held, variety=variety)
    except InputError as error:
        refused = str(error)
    shown |= {"version": name, "bundle": found.bundle}
    facts = {"version": found, "chart": cost_chart(shown), "fields": _FIELDS, "asked": asked, "refused": refused}
    return page(request, "version.html", "Models", shown=shown, command=_command(name, variety, asked), **facts)


def _asked(request: Request, terms: dict[str, Any]) -> dict[str, Any]:
    """The terms of the form that differ from those in force."""
    asked: dict[str, Any] = {}
    prices: dict[str, float] = {}
    for key, text in request.query_params.items():
        known = terms.get(key) if key in dict(_FIELDS) else terms.get("prices", {}).get(key.removeprefix("price."), 0.0)
        if (key not in dict(_FIELDS) and not key.startswith("price.")) or not text.strip():
            continue
        try:
            value = float(text.replace(",", "."))
        except ValueError as error:
            raise InputError("recipe.bad_change", "Terms are numbers.", expected="a number", got=text[:40]) from error
        if known is not None and abs(value - known) <= 1e-6 * max(1.0, abs(known)):
            continue
        if key.startswith("price."):
            prices[key.removeprefix("price.")] = value
        else:
            asked[key] = value
    return asked | ({"prices": prices} if prices else {})


def _command(name: str, variety: str, asked: dict[str, Any]) -> str:
    """What makes the terms that were asked for a version."""
    options = {
        "escaped": "--escape-cost",
        "wasted": "--waste-cost",
        "recirculated": "--recirculation-cost",
        "defect_share": "--defect-share",
        "abstain_budget": "--abstain-budget",
    }
    words = [f"sortline recipe set {name}", *([f"--variety {variety}"] if variety else [])]
    words += [f"{options[key]} {value:g}" for key, value in asked.items() if key in options]
    words += [f"--price {grade}={price:g}" for grade, price in asked.get("prices", {}).items()]
    return " \\\n  ".join([*words, '--reason "..."'])


@router.get("/training", response_class=HTMLResponse)
def training(request: Request) -> HTMLResponse:
    """Training runs."""
    with reading(services_of(request).engine) as session:
        jobs = session.exec(select(Job).order_by(desc(Job.id)).limit(50)).all()
    return page(request, "training.html", "Training", jobs=jobs)


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """The API by tag, from its own OpenAPI document: no third-party viewer."""
    return page(request, "docs.html", "API", document=request.app.openapi())
