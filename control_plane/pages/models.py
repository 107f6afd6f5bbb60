"""Pages of models: all versions, and one version with its recipe and what other terms would cost."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from control_plane.database.engine import reading
from control_plane.pages.cost_chart import cost_chart
from control_plane.pages.rendering import page
from control_plane.registry.recipes import changed, described, parse_change, registered
from control_plane.registry.versions import newest_versions
from control_plane.services import services_of
from models.errors import InputError

router = APIRouter(include_in_schema=False)


@router.get("/models", response_class=HTMLResponse)
def models(request: Request) -> HTMLResponse:
    """Shows models and their versions, newest first."""
    services = services_of(request)
    with reading(services.engine) as session:
        versions, names = newest_versions(session, 200)
        releases = services.signer.releases(session)
    return page(request, "models.html", "Models", versions=versions, names=names, releases=releases)


_FIELDS = (
    ("escaped", "Escaped defect"),
    ("wasted", "Wasted good item"),
    ("recirculated", "Recirculation"),
    ("defect_share", "Expected share of defects"),
    ("abstain_budget", "Abstain budget"),
)


@router.get("/models/{reference}", response_class=HTMLResponse)
def version(reference: str, request: Request, variety: str = "") -> HTMLResponse:
    """Shows one version: its recipe, what it costs on held-out items, and what other terms would cost."""
    services = services_of(request)
    name, found, recipe, held = registered(services.engine, services.store, reference)
    shown, refused, asked = described(recipe, held, variety=variety), "", {}
    try:
        asked = _asked(request, shown["terms"])
        if asked:
            change = parse_change({"terms": asked} | ({"variety": variety} if variety else {}))
            shown = described(changed(recipe, change, held), held, variety=variety)
    except InputError as error:
        refused = str(error)
    with reading(services.engine) as session:
        release = services.signer.releases(session).get(found.bundle, "not released")
    shown |= {"version": name, "bundle": found.bundle, "release": release}
    facts = {"version": found, "chart": cost_chart(shown), "fields": _FIELDS, "asked": asked, "refused": refused}
    return page(request, "version.html", "Models", shown=shown, command=_command(name, variety, asked), **facts)


def _asked(request: Request, terms: dict[str, Any]) -> dict[str, Any]:
    """Returns the terms of the form that differ from those in force."""
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
    """Returns the command that makes a version with the terms that were asked for."""
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
