"""Routes of recipes: look at one, see what a change would cost, make the change a version."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends

from control_plane.api.actor import Acting
from control_plane.api.schemas import NewRecipe, RecipeChange
from control_plane.database.audit import audit
from control_plane.database.engine import writing
from control_plane.database.tables.columns import utc_now
from control_plane.registry.recipes import (
    Change,
    changed,
    described,
    parse_change,
    registered,
    with_recipe,
)
from control_plane.registry.versions import register
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1/versions/{reference}/recipe", tags=["recipes"])
Given = Annotated[Services, Depends(services_of)]


@router.get("")
def show_recipe(reference: str, services: Given, variety: str = "", lot: str = "") -> dict[str, Any]:
    """Grades, terms in force for a variety and lot, thresholds that follow, and their cost on held-out items."""
    name, version, recipe, held = registered(services.engine, services.store, reference)
    found = described(recipe, held, variety=variety, lot=lot)
    return {"version": name, "bundle": version.bundle} | found


def _change(body: RecipeChange) -> Change:
    values = body.model_dump(exclude_unset=True, exclude={"reason", "actor"})
    return parse_change(values)


@router.post("/preview")
def preview_recipe(reference: str, body: RecipeChange, services: Given) -> dict[str, Any]:
    """What a change would do, without making it: the same answer as for the recipe itself."""
    name, version, recipe, held = registered(services.engine, services.store, reference)
    change = _change(body)
    found = described(changed(recipe, change, held), held, variety=change.variety or "", lot=change.lot or "")
    return {"version": name, "bundle": version.bundle} | found


@router.post("", status_code=201)
def change_recipe(reference: str, body: NewRecipe, services: Given, actor: Acting) -> dict[str, Any]:
    """Makes a new version: the same bundle with another recipe, to be rolled out like any model."""
    name, version, recipe, held = registered(services.engine, services.store, reference)
    change, now = _change(body), utc_now()
    wanted = changed(recipe, change, held)
    with tempfile.TemporaryDirectory(dir=services.config.root) as scratch:
        before = services.store.write_directory(version.bundle, Path(scratch) / "before")
        with_recipe(before, Path(scratch) / "after", wanted, reason=body.reason)
        costs = described(wanted, held)["costs"]
        origin = {"recipe_of": name, "recipe_reason": body.reason}
        with writing(services.engine) as session:
            made = register(session, services.store, Path(scratch) / "after", actor=actor, now=now, origin=origin)
            if costs is not None:
                made.metrics = made.metrics | {"costs": costs["recipe"]}
                session.add(made)
            details = {"from": name, "reason": body.reason, "change": msgspec.to_builtins(change)}
            audit(session, actor, "recipe.change", f"{name.rpartition(':')[0]}:{made.number}", details, now)
            session.commit()
            return made.model_dump(mode="json", exclude={"lineage"})
