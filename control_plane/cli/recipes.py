"""Commands on recipes: print the one in force, see what other terms would cost, make them a version.

`show` and `tune` look at a registered version (NAME, NAME:NUMBER, digest) or, with `--bundle`, at a directory; `set`
makes a new version of the one or, with `--output`, a new directory from the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.table import Table

from control_plane.cli.output import (
    Actor,
    AsJson,
    Server,
    acting,
    new_directory,
    new_file,
    note,
    say,
    table_of,
    with_options,
)
from control_plane.client import Client
from models.errors import InputError
from models.text import counted

recipes = typer.Typer(no_args_is_help=True, help="Grades, prices and thresholds: what the line does with a verdict.")

Reference = Annotated[
    str, typer.Argument(help="NAME (its newest version), NAME:NUMBER or a bundle digest; leave it out with --bundle.")
]
InBundle = Annotated[
    Path | None,
    typer.Option(
        "--bundle", help="Directory of a bundle. Without it, a version that the control plane has registered."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Labelled folder to count costs on, with --bundle. Without it, the bundle's held-out items."
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", help="File for the cost curve, as SVG.")]
Variety = Annotated[str, typer.Option(help="Variety whose terms are meant. Without it, those of all varieties.")]
Lot = Annotated[str, typer.Option(help="Lot whose terms are meant. Without it, those of all lots.")]


@dataclass(frozen=True, slots=True)
class TermOptions:
    """What grades pay and what mistakes cost, in the plant's currency per item; terms that are not given stay."""

    price: Annotated[
        list[str] | None, typer.Option("--price", help="GRADE=MONEY that an item of the grade is paid; once per grade.")
    ] = None
    escape_cost: Annotated[
        list[str] | None,
        typer.Option(
            "--escape-cost", help="Cost of a defective item among the good ones: MONEY, or CLASS=MONEY for one defect."
        ),
    ] = None
    waste_cost: Annotated[
        float | None, typer.Option("--waste-cost", help="Cost of a good item thrown away, beyond the price it loses.")
    ] = None
    misgrade_cost: Annotated[
        float | None, typer.Option("--misgrade-cost", help="Cost of a defective item in the grade of another defect.")
    ] = None
    recirculation_cost: Annotated[
        float | None, typer.Option("--recirculation-cost", help="Cost of one more pass, or of one look of a person.")
    ] = None
    defect_share: Annotated[
        float | None, typer.Option("--defect-share", help="Expected share of defective items, 0 to 1.")
    ] = None
    abstain_budget: Annotated[
        float | None,
        typer.Option("--abstain-budget", help="Largest share of items that may take the unsure outlet, 0 to 1."),
    ] = None
    variety: Variety = ""
    lot: Lot = ""

    def change(self) -> dict[str, Any]:
        """Returns what is asked for, as the API takes it.

        Raises:
            InputError: `recipe.bad_option`.
        """
        costs = {
            "wasted": self.waste_cost,
            "misgraded": self.misgrade_cost,
            "recirculated": self.recirculation_cost,
            "defect_share": self.defect_share,
            "abstain_budget": self.abstain_budget,
        }
        terms: dict[str, Any] = {name: value for name, value in costs.items() if value is not None}
        escapes = self.escape_cost or []
        everywhere, by_class = [v for v in escapes if "=" not in v], [v for v in escapes if "=" in v]
        if everywhere:
            terms["escaped"] = _money({"": everywhere[-1]}, "--escape-cost")[""]
        terms["prices"] = _money(_pairs(self.price, "--price"), "--price")
        terms["escaped_by_class"] = _money(_pairs(by_class, "--escape-cost"), "--escape-cost")
        return {"terms": terms} | {key: value for key, value in (("variety", self.variety), ("lot", self.lot)) if value}


@dataclass(frozen=True, slots=True)
class GradeOptions:
    """Which grades there are, and which outlet each takes."""

    grade: Annotated[
        list[str] | None,
        typer.Option("--grade", help="NAME=OUTLET:CLASS,CLASS; once per grade. Together they replace all grades."),
    ] = None
    outlet: Annotated[
        list[str] | None,
        typer.Option("--outlet", help="GRADE=OUTLET; `unsure` and `late` take the place of a grade as well."),
    ] = None
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop the terms that this variety or lot has of its own.")
    ] = False

    def change(self) -> dict[str, Any]:
        """Returns what is asked for, as the API takes it.

        Raises:
            InputError: `recipe.bad_option`.
        """
        grades = {}
        for name, text in _pairs(self.grade, "--grade").items():
            to, _, classes = text.partition(":")
            grades[name] = {"outlet": to, "classes": [c.strip() for c in classes.split(",") if c.strip()]}
        outlets = _pairs(self.outlet, "--outlet")
        found: dict[str, Any] = {"grades": grades, "forget": self.forget}
        for name in ("unsure", "late"):
            if name in outlets:
                found[f"{name}_outlet"] = outlets.pop(name)
        return found | {"outlets": outlets}


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


@recipes.command("show")
def recipe_show(
    reference: Reference = "",
    bundle: InBundle = None,
    variety: Variety = "",
    lot: Lot = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Print grades, the terms in force, the thresholds that follow, and what they cost on held-out items."""
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
@with_options
def recipe_tune(
    terms: TermOptions,
    reference: Reference = "",
    bundle: InBundle = None,
    data: Data = None,
    plot: Plot = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Print what terms would cost: the threshold they give, its cost, and the cheapest threshold. Changes nothing.

    Example: `sortline recipe tune apples --price sound=0.35 --escape-cost 2 --defect-share 0.08 --plot cost.svg`
    """
    change = terms.change()
    if plot is not None:
        new_file(plot)
    if bundle is None and data is not None:
        raise InputError("recipe.bad_option", "--data goes with --bundle.", expected="--bundle DIR", got="a version")
    if bundle is None:
        shown = Client(server).post(f"{_path(reference)}/preview", change)
    else:
        shown = _tuned(bundle, data, change, terms.variety, terms.lot)
    if plot is not None:
        _plot(shown, plot)
    _show(shown, as_json=as_json)


def _tuned(bundle: Path, data: Path | None, change: dict[str, Any], variety: str, lot: str) -> dict[str, Any]:
    """Returns the description of a bundle's recipe after a change, on its held-out items or on a labelled folder."""
    from control_plane.registry import recipes as logic  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    found = read_bundle(bundle)
    if data is None:
        held = logic.held_out_in(found.lineage, found.recipe)
    else:
        from control_plane.evaluation.evaluate import judged_items  # noqa: PLC0415

        held = judged_items(bundle, data)
    recipe = logic.changed(found.recipe, logic.parse_change(change), held)
    return {"bundle": found.digest} | logic.described(recipe, held, variety=variety, lot=lot)


@recipes.command("set")
@with_options
def recipe_set(
    reason: Annotated[str, typer.Option(help="Why; kept in the recipe and in the audit trail.")],
    terms: TermOptions,
    grades: GradeOptions,
    reference: Reference = "",
    bundle: InBundle = None,
    output: Annotated[Path | None, typer.Option(help="New directory for the changed bundle, with --bundle.")] = None,
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Change the recipe: makes a new version that shares everything else, to be rolled out like a model.

    Example: `sortline recipe set apples --variety russet --price sound=0.25 --reason "russet pays less"`
    """
    change = terms.change() | grades.change()
    if bundle is not None:
        if output is None:
            raise InputError("recipe.bad_option", "--bundle needs --output.", expected="--output DIR", got="nothing")
        _show(_rewritten(bundle, new_directory(output), change, terms.variety, terms.lot, reason), as_json=as_json)
        return
    client = Client(server)
    made = client.post(_path(reference), change | {"reason": reason, "actor": acting(actor)})
    note(f"version {made['number']} has the new recipe; release it and roll it out like a model")
    if as_json:
        say(made, as_json=True)
    else:
        _show(_of_version(client, made["bundle"], terms.variety, terms.lot), as_json=False)


def _rewritten(
    bundle: Path, output: Path, change: dict[str, Any], variety: str, lot: str, reason: str
) -> dict[str, Any]:
    """Writes the bundle with a changed recipe; returns the description of the new one."""
    from control_plane.registry import recipes as logic  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    found = read_bundle(bundle)
    held = logic.held_out_in(found.lineage, found.recipe)
    recipe = logic.changed(found.recipe, logic.parse_change(change), held)
    written = logic.with_recipe(bundle, output, recipe, reason=reason)
    return {"bundle": written.digest} | logic.described(recipe, held, variety=variety, lot=lot)


def _of_version(client: Client, reference: str, variety: str, lot: str) -> dict[str, Any]:
    query = urlencode({"variety": variety, "lot": lot})
    return dict(client.get(f"{_path(reference)}?{query}"))


def _path(reference: str) -> str:
    if not reference:
        raise InputError(
            "recipe.bad_option",
            "The command needs a version or a bundle.",
            expected="NAME, NAME:NUMBER or --bundle DIR",
            got="nothing",
        )
    return f"/api/v1/versions/{quote(reference, safe='')}/recipe"


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
    def tables(found: dict[str, Any]) -> list[Table | str]:
        title = f"recipe of {found.get('version') or found['bundle'][:12]}"
        return [title, _grades(found), "", _terms(found), "", *_costs(found)]

    say(shown, as_json=as_json, table=tables)


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
    return table_of(["grade", "classes", "outlet", "price"], rows)


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


def _costs(shown: dict[str, Any]) -> list[Table | str]:
    costs = shown["costs"]
    if costs is None:
        return ["costs are unknown: this bundle brings no held-out items"]
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
    return [table, costs["note"] or counted(costs["items"], "held-out item")]
