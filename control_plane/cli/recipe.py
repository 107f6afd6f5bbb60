"""Commands on recipes: show the one in force, see what other terms would cost, make them a version.

`show` and `tune` look at a registered version (NAME, NAME:NUMBER, digest) or, with `--bundle`, at a directory; `set`
makes a new version of the one or, with `--output`, a new directory from the other.
"""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.console import Group
from rich.table import Table

from control_plane.cli.output import AsJson, Server, err, out, say, table_of
from control_plane.client import Client
from models.errors import InputError

recipes = typer.Typer(no_args_is_help=True, help="Grades, prices, thresholds: what the line does with a verdict.")

Reference = Annotated[str, typer.Argument(help="NAME, NAME:NUMBER or a bundle digest; empty with --bundle.")]
InBundle = Annotated[Path | None, typer.Option("--bundle", help="A bundle's directory instead of a version.")]
Variety = Annotated[str, typer.Option(help="Terms of this variety.")]
Lot = Annotated[str, typer.Option(help="Terms of this lot.")]
Prices = Annotated[list[str] | None, typer.Option("--price", help="GRADE=MONEY an item is paid for; again for more.")]
Escape = Annotated[
    list[str] | None, typer.Option("--escape-cost", help="Of a defective item let through: MONEY, or CLASS=MONEY.")
]
Waste = Annotated[float | None, typer.Option("--waste-cost", help="Of a good item thrown away, beyond its price.")]
Misgrade = Annotated[float | None, typer.Option("--misgrade-cost", help="Of a defect in another defect's grade.")]
Recirculate = Annotated[float | None, typer.Option("--recirculation-cost", help="Of one more pass or look.")]
DefectShare = Annotated[float | None, typer.Option("--defect-share", help="Share of defective items you expect, 0..1.")]
Budget = Annotated[float | None, typer.Option("--abstain-budget", help="Share of items the line may be unsure of.")]
Grades = Annotated[
    list[str] | None, typer.Option("--grade", help="NAME=OUTLET:CLASS,CLASS; together they replace all grades.")
]
Outlets = Annotated[list[str] | None, typer.Option("--outlet", help="GRADE=OUTLET; `unsure` and `late` as well.")]
Data = Annotated[Path | None, typer.Option("--data", help="Labelled folder to count costs on, with --bundle.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write the cost curve as SVG.")]


def _pairs(values: list[str] | None, what: str) -> dict[str, str]:
    found = {}
    for value in values or []:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise InputError("recipe.bad_option", f"{what} is written NAME=VALUE.", expected="NAME=VALUE", got=value)
        found[name.strip()] = rest.strip()
    return found


def _money(values: dict[str, str], what: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in values.items()}
    except ValueError as error:
        raise InputError("recipe.bad_option", f"{what} is a number.", expected="a number", got=str(error)) from error


def change_of(
    *,
    price: list[str] | None,
    escape: list[str] | None,
    grade: list[str] | None,
    outlet: list[str] | None,
    variety: str,
    lot: str,
    forget: bool,
    **costs: float | None,
) -> dict[str, Any]:
    """What the options ask for, as the API takes it.

    Raises:
        InputError: `recipe.bad_option`.
    """
    everywhere = [value for value in escape or [] if "=" not in value]
    terms: dict[str, Any] = {name: value for name, value in costs.items() if value is not None}
    if everywhere:
        terms["escaped"] = _money({"": everywhere[-1]}, "--escape-cost")[""]
    terms["prices"] = _money(_pairs(price, "--price"), "--price")
    terms["escaped_by_class"] = _money(_pairs([v for v in escape or [] if "=" in v], "--escape-cost"), "--escape-cost")
    grades = {}
    for name, text in _pairs(grade, "--grade").items():
        to, _, classes = text.partition(":")
        grades[name] = {"outlet": to, "classes": [c.strip() for c in classes.split(",") if c.strip()]}
    outlets = _pairs(outlet, "--outlet")
    found: dict[str, Any] = {"terms": terms, "grades": grades, "forget": forget}
    for name in ("unsure", "late"):
        if name in outlets:
            found[f"{name}_outlet"] = outlets.pop(name)
    found["outlets"] = outlets
    return found | {key: value for key, value in (("variety", variety), ("lot", lot)) if value}


@recipes.command("show")
def recipe_show(
    reference: Reference = "",
    bundle: InBundle = None,
    variety: Variety = "",
    lot: Lot = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Grades, terms in force, the thresholds that follow, and what they cost on held-out items."""
    if bundle is not None:
        from control_plane.registry import recipes as logic  # noqa: PLC0415
        from models.bundle import read_bundle  # noqa: PLC0415

        found = read_bundle(bundle)
        held = logic.held_out_in(found.lineage, found.recipe)
        shown = {"bundle": found.digest} | logic.described(found.recipe, held, variety=variety, lot=lot)
    else:
        shown = _of_version(Client(server), reference, variety, lot)
    _show(shown, as_json=as_json)


@recipes.command("tune")
def recipe_tune(
    reference: Reference = "",
    bundle: InBundle = None,
    data: Data = None,
    price: Prices = None,
    escape: Escape = None,
    waste: Waste = None,
    misgrade: Misgrade = None,
    recirculate: Recirculate = None,
    defect_share: DefectShare = None,
    abstain_budget: Budget = None,
    variety: Variety = "",
    lot: Lot = "",
    plot: Plot = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """What terms cost: the curve over the threshold, where the threshold sits, where the minimum lies. Changes nothing.

    Example: `sortline recipe tune apples --price sound=0.35 --escape-cost 2 --defect-share 0.08 --plot cost.svg`
    """
    change = change_of(
        price=price, escape=escape, grade=None, outlet=None, variety=variety, lot=lot, forget=False,
        wasted=waste, misgraded=misgrade, recirculated=recirculate, defect_share=defect_share,
        abstain_budget=abstain_budget,
    )  # fmt: skip
    if bundle is None and data is not None:
        raise InputError("recipe.bad_option", "--data goes with --bundle.", expected="--bundle DIR", got="a version")
    if bundle is not None:
        from control_plane.registry import recipes as logic  # noqa: PLC0415
        from models.bundle import read_bundle  # noqa: PLC0415

        found = read_bundle(bundle)
        held = None
        if data is not None:
            from control_plane.evaluation.evaluate import judged_items  # noqa: PLC0415

            held = judged_items(bundle, data)
        else:
            held = logic.held_out_in(found.lineage, found.recipe)
        recipe = logic.changed(found.recipe, logic.parse_change(change), held)
        shown = {"bundle": found.digest} | logic.described(recipe, held, variety=variety, lot=lot)
    else:
        shown = Client(server).post(f"/api/v1/versions/{quote(_named(reference), safe='')}/recipe/preview", change)
    if plot is not None:
        _plot(shown, plot)
    _show(shown, as_json=as_json)


@recipes.command("set")
def recipe_set(
    reason: Annotated[str, typer.Option(help="Why; kept in the recipe and in the audit trail.")],
    reference: Reference = "",
    bundle: InBundle = None,
    output: Annotated[Path | None, typer.Option(help="New directory, with --bundle.")] = None,
    price: Prices = None,
    escape: Escape = None,
    waste: Waste = None,
    misgrade: Misgrade = None,
    recirculate: Recirculate = None,
    defect_share: DefectShare = None,
    abstain_budget: Budget = None,
    grade: Grades = None,
    outlet: Outlets = None,
    variety: Variety = "",
    lot: Lot = "",
    forget: Annotated[bool, typer.Option("--forget", help="Drop the terms of this variety or lot.")] = False,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Change the recipe: makes a new version that shares everything else, to be rolled out like a model.

    Example: `sortline recipe set apples --variety russet --price sound=0.25 --reason "russet pays less"`
    """
    change = change_of(
        price=price, escape=escape, grade=grade, outlet=outlet, variety=variety, lot=lot, forget=forget,
        wasted=waste, misgraded=misgrade, recirculated=recirculate, defect_share=defect_share,
        abstain_budget=abstain_budget,
    )  # fmt: skip
    if bundle is None:
        body = change | {"reason": reason, "actor": "cli"}
        made = Client(server).post(f"/api/v1/versions/{quote(_named(reference), safe='')}/recipe", body)
        err.print(f"version {made['number']} has the new recipe; release it and roll it out like a model")
        if as_json:
            say(made, as_json=True)
        else:
            _show(_of_version(Client(server), made["bundle"], variety, lot), as_json=False)
        return
    if output is None:
        raise InputError("recipe.bad_option", "--bundle needs --output.", expected="--output DIR", got="nothing")
    from control_plane.registry import recipes as logic  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    found = read_bundle(bundle)
    held = logic.held_out_in(found.lineage, found.recipe)
    recipe = logic.changed(found.recipe, logic.parse_change(change), held)
    written = logic.with_recipe(bundle, output, recipe, reason=reason)
    _show({"bundle": written.digest} | logic.described(recipe, held, variety=variety, lot=lot), as_json=as_json)


def _of_version(client: Client, reference: str, variety: str, lot: str) -> dict[str, Any]:
    query = urlencode({"variety": variety, "lot": lot})
    return dict(client.get(f"/api/v1/versions/{quote(_named(reference), safe='')}/recipe?{query}"))


def _named(reference: str) -> str:
    if not reference:
        raise InputError(
            "recipe.bad_option", "Say whose recipe.", expected="NAME, NAME:NUMBER or --bundle DIR", got="nothing"
        )
    return reference


def _plot(shown: dict[str, Any], path: Path) -> None:
    from control_plane.pages.cost_chart import cost_chart  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415

    if shown["costs"] is None:
        raise InputError(
            "recipe.no_held_out",
            "This bundle brings no held-out items; give a labelled folder.",
            expected="--data DIR",
            got="nothing",
        )
    write_atomically(path, str(cost_chart(shown, alone=True)).encode())


def _show(shown: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        say(shown, as_json=True)
        return
    out.print(Group(_grades(shown), "", _terms(shown), "", _costs(shown)))


def _percent(value: float | None) -> str:
    return "never" if value is None else f"{value:.1%}"


def _grades(shown: dict[str, Any]) -> Table:
    prices = shown["terms"].get("prices", {})
    rows = [
        [name, ", ".join(grade["classes"]), grade["outlet"], f"{prices.get(name, 0.0):g}"]
        for name, grade in shown["grades"].items()
    ]
    recipe = shown["recipe"]
    rows.append(["unsure", "", recipe["unsure_outlet"], ""])
    rows.append(["late", "", recipe["late_outlet"], ""])
    table = table_of(["grade", "classes", "outlet", "price"], rows)
    table.title, table.title_justify = f"recipe of {shown.get('version') or shown['bundle'][:12]}", "left"
    return table


def _terms(shown: dict[str, Any]) -> Table:
    names = {
        "escaped": "escaped defect",
        "wasted": "wasted good item",
        "misgraded": "misgraded defect",
        "recirculated": "recirculation",
        "defect_share": "expected share of defects",
        "abstain_budget": "abstain budget",
    }
    terms = shown["terms"]
    rows = [[text, f"{terms[name]:g}"] for name, text in names.items() if name in terms]
    rows[1:1] = [[f"escaped {name}", f"{value:g}"] for name, value in terms.get("escaped_by_class", {}).items()]
    for name, cut in shown["thresholds"].items():
        rows.append([f"-> threshold for {name}", _percent(cut["threshold"])])
        if cut["unsure"]:
            rows.append([f"-> unsure about {name}", f"{cut['unsure'][0]:.1%} to {cut['unsure'][1]:.1%}"])
    where = " ".join(filter(None, (shown["variety"], shown["lot"]))) or "all varieties and lots"
    return table_of([f"terms ({where})", "per item"], rows)


def _costs(shown: dict[str, Any]) -> Table:
    costs = shown["costs"]
    if costs is None:
        return table_of(["costs"], [["unknown: this bundle brings no held-out items"]])
    own, best = costs["recipe"], costs["minimum"]

    def row(text: str, figure: dict[str, Any], unit: str = ".1%") -> list[Any]:
        return [text, format(figure["value"], unit), f"{figure['low']:{unit}} to {figure['high']:{unit}}"]

    rows = [
        row("cost of mistakes per 1000 items", own["cost"], ".2f"),
        row("defects that escape", own["escape_rate"]),
        row("good items thrown away", own["false_reject_rate"]),
        row("items unsure", own["abstain"]),
        ["threshold of the recipe", _percent(own["threshold"]), ""],
        ["cheapest threshold", _percent(best["threshold"]), f"{best['low']:.1%} to {best['high']:.1%}"],
        row("it would save per 1000 items", best["saves"], ".2f"),
    ]
    table = table_of(["on held-out items", "value", "95 % interval over items"], rows)
    table.caption, table.caption_justify = costs["note"] or f"{costs['items']} held-out items", "left"
    return table
