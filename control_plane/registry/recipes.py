"""Changes of recipe: a new bundle that differs from the old one in `recipe.json` and manifest alone.

What sorts fruit on Monday is another thing than what did on Sunday when the juice price moved, so it has a version,
a digest, an author and a reason like a model, and is rolled out like one. Model, golden views, reference and lineage
stay byte for byte: nothing is trained, nothing can drift from what was proven.
"""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Engine

from control_plane.database.engine import reading
from control_plane.database.tables.registry import ModelVersion
from control_plane.evaluation.operating_point import HeldOut, cost_report, held_out_of, tuned
from control_plane.registry.store import Store
from control_plane.registry.versions import find_version
from models.bundle import LINEAGE, PARTS, RECIPE, Bundle, read_bundle, write_bundle
from models.errors import BundleError, InputError
from models.recipe import Grade, Name, Recipe, Terms, layered, parse_recipe


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The requested changes of a recipe; a field that is not given stays."""

    terms: Terms = Terms()
    variety: Name | None = None
    """The terms are those of this variety; None (and no lot) = the recipe's own."""
    lot: Name | None = None
    """The terms are those of this lot."""
    forget: bool = False
    """The variety or lot shall have no terms of its own any more."""
    grades: dict[Name, Grade] = {}
    """Replace all grades; empty = they stay."""
    outlets: dict[Name, Name] = {}
    """Grade -> outlet."""
    unsure_outlet: Name | None = None
    late_outlet: Name | None = None


def parse_change(values: dict[str, Any]) -> Change:
    """Returns a change from plain values.

    Raises:
        InputError: `recipe.bad_change`.
    """
    try:
        change = msgspec.convert(values, Change)
    except msgspec.ValidationError as error:
        raise InputError(
            "recipe.bad_change", "This is no change of a recipe.", expected="terms, grades or outlets", got=str(error)
        ) from error
    if change.terms.abstain_above is not None:
        raise InputError(
            "recipe.bad_change",
            "The abstain band is learnt from the budget; it is not set.",
            expected="abstain_budget",
            got="abstain_above",
        )
    if (change.variety and change.lot) or (change.forget and not (change.variety or change.lot)):
        raise InputError(
            "recipe.bad_change",
            "Terms belong to a variety, to a lot, or to the recipe.",
            expected="one of them",
            got="both" if change.variety else "forget of the recipe's own",
        )
    return change


def changed(recipe: Recipe, change: Change, held: HeldOut | None) -> Recipe:
    """Returns the recipe after a change, every abstain band learnt again.

    Args:
        recipe: As it is.
        change: What shall be otherwise.
        held: Held-out items; needed where there is an abstain budget.

    Raises:
        InputError: `recipe.bad_change`, `recipe.no_held_out`, `recipe.one_kind`.
    """
    grades = dict(change.grades or (recipe.graded if change.outlets else recipe.grades))
    for name, outlet in change.outlets.items():
        if name not in grades:
            raise InputError("recipe.bad_change", "There is no such grade.", expected=sorted(grades), got=name)
        grades[name] = msgspec.structs.replace(grades[name], outlet=outlet)
    layers = {"varieties": dict(recipe.varieties), "lots": dict(recipe.lots)}
    terms = recipe.terms
    for layer, own in (("varieties", change.variety), ("lots", change.lot)):
        if own and change.forget:
            layers[layer].pop(own, None)
        elif own:
            layers[layer][own] = layered((layers[layer].get(own, Terms()), change.terms))
    if not change.variety and not change.lot:
        terms = layered((terms, change.terms))
    found = msgspec.structs.replace(
        recipe,
        terms=terms,
        grades=grades,
        unsure_outlet=change.unsure_outlet or recipe.unsure_outlet,
        late_outlet=change.late_outlet or recipe.late_outlet,
        **layers,
    )
    try:
        found.check()
    except BundleError as error:
        raise InputError("recipe.bad_change", str(error), expected=error.expected, got=error.got) from error
    if held is not None:
        return tuned(found, held)
    budgets = [t.abstain_budget for t in (found.terms, *found.varieties.values(), *found.lots.values())]
    if any(budgets):
        raise InputError(
            "recipe.no_held_out",
            "This bundle brings no held-out items; give a labelled folder.",
            expected="held-out items for the abstain budget",
            got="none",
        )
    return found


def held_out_in(lineage: dict[str, Any], recipe: Recipe) -> HeldOut | None:
    """Returns the held-out items of a lineage, or None where it brings none.

    Raises:
        InputError: `recipe.bad_held_out`.
    """
    return held_out_of(lineage, recipe) if "held_out" in lineage else None


def described(recipe: Recipe, held: HeldOut | None, *, variety: str = "", lot: str = "") -> dict[str, Any]:
    """A recipe as a person wants to see it: terms in force, thresholds that follow, what they cost.

    Raises:
        InputError: `recipe.one_kind`.
    """
    cuts = recipe.cuts(variety, lot)
    return {
        "recipe": msgspec.to_builtins(recipe),
        "variety": variety,
        "lot": lot,
        "grades": msgspec.to_builtins(recipe.graded),
        "terms": msgspec.to_builtins(recipe.terms_of(variety, lot)),
        "thresholds": {name: {"threshold": cut.threshold, "unsure": cut.unsure} for name, cut in cuts.items()},
        "costs": cost_report(held, recipe, variety=variety, lot=lot) if held is not None else None,
    }


def with_recipe(directory: Path, output: Path, recipe: Recipe, *, reason: str) -> Bundle:
    """Writes the bundle in `directory` with another recipe.

    Args:
        directory: Of the bundle; verified.
        output: New directory.
        recipe: For the same classes, with the same fusion.
        reason: Why; kept in the recipe.

    Raises:
        InputError: `recipe.unchanged`.
        BundleError: The bundle is not whole, or the recipe does not fit it.
    """
    bundle = read_bundle(directory)
    here = msgspec.structs.replace(bundle.recipe, replaces=recipe.replaces, reason=recipe.reason)
    if here == recipe:
        raise InputError("recipe.unchanged", "The recipe would stay as it is.", expected="a change", got="none")
    recipe = msgspec.structs.replace(recipe, replaces=bundle.digest, reason=reason)
    files = {part: (directory / part).read_bytes() for part in PARTS}
    return write_bundle(output, bundle.manifest.name, files | {RECIPE: msgspec.json.encode(recipe)})


class Registered(NamedTuple):
    """What is registered under a reference, as recipes need it."""

    name: str
    version: ModelVersion
    recipe: Recipe
    held: HeldOut | None


def registered(engine: Engine, store: Store, reference: str) -> Registered:
    """Name, version, recipe and held-out items of what is registered under this reference."""
    with reading(engine) as session:
        model, version = find_version(session, reference)
    recipe = parse_recipe(store.part(version.bundle, RECIPE))
    lineage = msgspec.json.decode(store.part(version.bundle, LINEAGE), type=dict[str, Any])
    return Registered(f"{model.name}:{version.number}", version, recipe, held_out_in(lineage, recipe))
