"""Commands that judge bundles on labelled photographs: evaluate, quantise."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import AsJson, new_directory, progress_bar, say, table_of
from control_plane.cli.train import GoodClass, metrics_table
from models.text import counted


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")],
    data: Annotated[Path, typer.Option(help="Labelled folder, as for training.")],
    exclude_doubt: Annotated[
        bool, typer.Option(help="Leave out views whose label is in doubt; by default they count.")
    ] = False,
    good_class: GoodClass = "",
    as_json: AsJson = False,
) -> None:
    """Judge a labelled folder with a bundle exactly as an agent would, and print metrics per view and per item."""
    from control_plane.evaluation.evaluate import evaluate as run  # noqa: PLC0415

    with progress_bar() as bar:
        task = bar.add_task("judging", total=1.0)
        report = run(
            bundle,
            data,
            exclude_doubt=exclude_doubt,
            good_class=good_class,
            progress=lambda share: bar.update(task, completed=share),
        )
    say(report, as_json=as_json, table=metrics_table)


def quantise(
    bundle: Annotated[Path, typer.Option(help="Directory of the float32 bundle.")],
    data: Annotated[Path, typer.Option(help="Labelled folder, best with items that the model never saw.")],
    output: Annotated[Path, typer.Option(help="New directory for the int8 bundle.")],
    good_class: GoodClass = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle's model int8 and print what that gains in speed and costs in accuracy; refused if it costs much.

    Example: `sortline quantise --bundle apples-bundle --data other-photos --output apples-int8`
    """
    new_directory(output)
    from control_plane.data.photo_folder import load_dataset  # noqa: PLC0415
    from control_plane.training import quantise as logic  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    spec = read_bundle(bundle).preprocess
    with progress_bar() as bar:
        task = bar.add_task("reading photographs", total=1.0)
        dataset = load_dataset(data, spec, good_class=good_class, progress=lambda s: bar.update(task, completed=s))
    made = logic.quantised(bundle, output, dataset.views, dataset.labels, dataset.items)
    say({"bundle": made.bundle.digest, **made.report}, as_json=as_json, table=_int8_table)


def _int8_table(found: dict[str, Any]) -> list[Table | str]:
    ms, size = found["ms_per_view"], found["model_bytes"]
    rows: list[list[Any]] = [
        ["ms per view, one thread", f"{ms['float32']:.3f}", f"{ms['int8']:.3f}", f"{ms['ratio']:.2f} of float32"],
        [
            "model, KB",
            size["float32"] // 1024,
            size["int8"] // 1024,
            f"{size['int8'] / size['float32']:.2f} of float32",
        ],
    ]
    for text, key in (("view AUC", "auc"), ("view balanced accuracy", "balanced_accuracy")):
        own = found[key]
        change = f"cost {own['cost']:+.4f} ({own['low']:+.4f} to {own['high']:+.4f})"
        rows.append([text, f"{own['float32']:.4f}", f"{own['int8']:.4f}", change])
    rows.append(["views that change sides", "", "", f"{found['flips']:.2%}"])
    table = table_of(["", "float32", "int8", "difference (95 % over items)"], rows)
    return [
        table,
        f"{counted(found['views'], 'view')} of {counted(found['items'], 'item')}",
        f"bundle {found['bundle']}",
    ]
