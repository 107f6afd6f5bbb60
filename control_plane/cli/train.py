"""Commands that make bundles: train a model from photographs, import one that was trained elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import (
    Actor,
    AsJson,
    Server,
    acting,
    new_directory,
    progress_bar,
    say,
    table_of,
    with_options,
)
from control_plane.client import Client
from control_plane.jobs.requests import check_import, check_training
from models.errors import ConflictError, InputError
from models.text import counted

GoodClass = Annotated[
    str,
    typer.Option(
        help="Name of the class of good items. Without it, the class called sound, good or ok.", show_default=False
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="New directory for the bundle; everything then happens in this process, without a control plane. Without "
        "it, the work goes to the control plane as a job, and the bundle is registered there.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What a training run can be asked for."""

    name: Annotated[str, typer.Option(help="Name of the model: letters, digits, `.`, `_`, `-`; at most 64.")]
    effort: Annotated[
        str,
        typer.Option(help="`standard`, or `quick` for a first look: about a fifth of the time, less accurate."),
    ] = "standard"
    folds: Annotated[int, typer.Option(min=2, max=50, help="Parts of the cross-validation, which splits by item.")] = 5
    seed: Annotated[int, typer.Option(help="Seed of everything random, 0 to 4294967295: same seed, same bundle.")] = 1
    good_class: GoodClass = ""
    abstain_budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Largest share of items that may take the unsure outlet, 0 to 1.")
    ] = 0.0
    scalar: Annotated[
        list[str] | None,
        typer.Option(
            help="Measured column of labels.csv to learn from, such as weight_g; may be given several times. Without "
            "it, weight_g and length_mm where they exist.",
            show_default=False,
        ),
    ] = None
    no_scalars: Annotated[bool, typer.Option("--no-scalars", help="Learn from the photographs alone.")] = False
    precision: Annotated[
        str, typer.Option(help="`float32`, or `int8`: smaller and faster, refused where it costs accuracy.")
    ] = "float32"

    def settings(self) -> dict[str, Any]:
        """Returns the options as training and the API take them.

        Raises:
            InputError: `training.bad_option`: scalars are named and refused at once.
        """
        if self.no_scalars and self.scalar:
            raise InputError(
                "training.bad_option",
                "The options `scalar` and `no-scalars` exclude each other.",
                expected="one of the two",
                got=", ".join(self.scalar)[:120],
            )
        return {
            "name": self.name,
            "effort": self.effort,
            "folds": self.folds,
            "seed": self.seed,
            "good_class": self.good_class,
            "abstain_budget": self.abstain_budget,
            "scalars": [] if self.no_scalars else self.scalar or None,
            "precision": self.precision,
        }


@with_options
def train(
    data: Annotated[Path, typer.Option(help="Folder with labels.csv, or with one folder of photographs per class.")],
    options: TrainOptions,
    output: Output = None,
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Train a model from labelled photographs: cross-validate by item, convert, check parity, make a bundle.

    With `--output` it works here; without it, the folder is registered with the control plane (`--server`), which must
    see it under the same path, and a worker process there trains. With 3,500 views expect two to three minutes on two
    cores, with `--effort quick` half a minute.

    Example: `sortline train --data photos --name apples --output apples-bundle`
    """
    settings = check_training(options.settings())
    if output is not None:
        summary = _train_alone(data, new_directory(output), settings)
    else:
        client, name = Client(server), options.name
        client.post("/api/v1/datasets", {"name": name, "root": str(data.resolve()), "actor": acting(actor)})
        body = settings | {"dataset": name, "actor": acting(actor)}
        summary = follow(client, client.post("/api/v1/training-runs", body)["id"])
    say(summary, as_json=as_json, table=metrics_table)


def _train_alone(data: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from control_plane.training import pipeline  # noqa: PLC0415

    with progress_bar() as bar:
        task = bar.add_task("starting", total=1.0)
        trained = pipeline.train(
            data,
            pipeline.TrainSettings(**settings),
            output,
            progress=lambda stage, share: bar.update(task, description=stage, completed=share),
        )
    return trained.summary()


def follow(client: Client, job_id: int) -> dict[str, Any]:
    """Shows a job until it ends; Ctrl-C asks the server to cancel it."""
    with progress_bar() as bar:
        task = bar.add_task("waiting", total=1.0)
        try:
            job = client.follow_job(
                job_id, lambda j: bar.update(task, description=j["stage"] or j["state"], completed=j["progress"])
            )
        except KeyboardInterrupt:
            client.post(f"/api/v1/jobs/{job_id}/cancel", {"actor": acting("")})
            raise
    if job["state"] != "succeeded":
        error = job["error"] or {"code": f"job.{job['state']}", "message": f"The job was {job['state']}."}
        raise ConflictError(error["code"], error["message"], expected=error.get("expected"), got=error.get("got"))
    return dict(job["result"])


def metrics_table(summary: dict[str, Any]) -> list[Table | str]:
    """Returns view and item figures with their intervals."""
    rows = []
    for level in ("view", "item", "item_without_scalars"):
        for metric, value in summary.get("metrics", {}).get(level, {}).items():
            if isinstance(value, dict) and value.get("value") is not None:
                low, high = value.get("low"), value.get("high")
                interval = f"{low:.3f} to {high:.3f}" if low is not None else value.get("reason", "")
                rows.append([level.replace("_", " "), metric.replace("_", " "), f"{value['value']:.3f}", interval])
    table = table_of(["level", "metric", "value", "95 % interval over items"], rows)
    taken = [f"output {summary['output']} of the model, input in {summary['precision']}"] if "output" in summary else []
    return [table, *_confusion(summary), f"bundle {summary.get('bundle', '')}", *taken, *_remarks(summary)]


def _confusion(summary: dict[str, Any]) -> list[Table | str]:
    """Returns the counts of items by class and verdict."""
    item = summary.get("metrics", {}).get("item", {})
    classes, counts = item.get("classes", []), item.get("confusion", [])
    rows = [[name, *(str(count) for count in row)] for name, row in zip(classes, counts, strict=False)]
    return [table_of(["items, truth", *(f"called {name}" for name in classes)], rows)] if rows else []


def _remarks(summary: dict[str, Any]) -> list[str]:
    """Returns what a person must know about the photographs: warnings, and what was left out, by reason."""
    dataset = summary.get("dataset")
    parts = [summary, *([dataset] if isinstance(dataset, dict) else [])]
    lines = [f"warning: {text}" for part in parts for text in part.get("warnings", [])]
    for part in parts:
        for reason, number in part.get("left_out", {}).items():
            names = part.get("left_out_examples", {}).get(reason, [])[:_NAMED]
            few = ", ".join([*names, "..."] if number > len(names) else names)
            lines.append(f"left out: {counted(number, 'file')}, {reason}: {few}")
    return lines


_NAMED = 3
"""Files that are named for each reason."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The input format of a foreign model, and the meaning of its outputs."""

    name: Annotated[str, typer.Option(help="Name of the model: letters, digits, `.`, `_`, `-`; at most 64.")]
    classes: Annotated[
        str,
        typer.Option(
            help="Class names in the order of the model's outputs, separated by commas. Without it, the names that the "
            "file itself has (Ultralytics, scikit-learn).",
            show_default=False,
        ),
    ] = ""
    inputs: Annotated[
        str,
        typer.Option(
            help="Layout and channel order of the image input: `nchw,rgb`, `nchw,bgr`, `nhwc,rgb`, `nhwc,bgr`."
        ),
    ] = "nchw,rgb"
    mean: Annotated[
        str, typer.Option(help="Three numbers subtracted after scaling, one per channel, separated by commas.")
    ] = "0,0,0"
    std: Annotated[
        str, typer.Option(help="Three numbers that the difference is divided by, one per channel, separated by commas.")
    ] = "1,1,1"
    scale: Annotated[
        float, typer.Option(help="Factor for pixel values (0 to 255) before anything else; the default is 1/255.")
    ] = 1 / 255
    view_px: Annotated[int, typer.Option(help="Side of the model's square input, in pixels.")] = 64
    logits: Annotated[
        bool, typer.Option(help="Whether the outputs are logits; with --no-logits they are probabilities.")
    ] = True
    scalars: Annotated[
        str,
        typer.Option(
            help="Measured columns of labels.csv that a second input [N, K] takes, such as weight_g.",
            show_default=False,
        ),
    ] = ""
    good_class: GoodClass = ""
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen",
            help="State that the model never saw these items, so that fusion and costs may be learnt from them.",
        ),
    ] = False

    def settings(self, data: Path) -> dict[str, Any]:
        """Returns the options as the import and the API take them."""
        layout, _, channels = self.inputs.partition(",")
        return {
            "name": self.name,
            "classes": [c.strip() for c in self.classes.split(",") if c.strip()],
            "good_class": self.good_class,
            "view_px": self.view_px,
            "layout": layout,
            "channels": channels or "rgb",
            "scale": self.scale,
            "mean": _numbers(self.mean, "mean"),
            "std": _numbers(self.std, "std"),
            "logits": self.logits,
            "scalars": [c.strip() for c in self.scalars.split(",") if c.strip()],
            "unseen": self.unseen,
            "data": str(data.resolve()),
        }


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            "import.bad_settings",
            f"The option `{option}` is not usable.",
            expected="three numbers separated by commas, such as 0.485,0.456,0.406",
            got=text[:80],
        ) from error


@with_options
def import_onnx(
    model: Annotated[Path, typer.Argument(help="An .onnx file, for example exported from PyTorch.")],
    options: ImportOptions,
    data: Annotated[
        Path, typer.Option(help="Labelled folder: golden views, the reference for drift, and metrics come from it.")
    ],
    output: Output = None,
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle from a model trained elsewhere, with the same checks and golden views.

    Example: `sortline import-onnx net.onnx --name apples --classes sound,defect --data photos --output apples-bundle`
    """
    settings = check_import(model, options.settings(data))
    if output is None:
        client = Client(server)
        body = {"path": str(model.resolve()), "settings": settings, "actor": acting(actor)}
        say(follow(client, client.post("/api/v1/imports", body)["id"]), as_json=as_json, table=metrics_table)
        return
    new_directory(output)
    from control_plane.training.foreign import onnx_import as importing  # noqa: PLC0415

    found = importing.import_onnx(model, importing.ImportSettings(**settings), output)
    say({**found.summary(), "directory": str(output)}, as_json=as_json, table=metrics_table)
