"""Commands that learn and judge: train, evaluate, import."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import AsJson, Server, progress_bar, say, table_of
from control_plane.client import Client
from models.errors import ConflictError


def train(
    data: Annotated[Path, typer.Option(help="Folder with labels.csv, or one folder per class.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    output: Annotated[Path | None, typer.Option(help="Write the bundle here, without a control plane.")] = None,
    effort: Annotated[str, typer.Option(help="quick or standard.")] = "standard",
    folds: Annotated[int, typer.Option(min=2, max=50, help="Of the cross-validation by item.")] = 5,
    seed: Annotated[int, typer.Option()] = 1,
    good_class: Annotated[str, typer.Option(help="Empty = sound, good or ok.")] = "",
    abstain_budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of items the line may be unsure of.")
    ] = 0.0,
    precision: Annotated[str, typer.Option("--precision", help="float32 or int8.")] = "float32",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Train a model from labelled photographs: cross-validate by item, convert, check parity, make a bundle.

    Example: `sortline train --data photos --name apples --output apples-bundle`
    """
    options: dict[str, Any] = {"name": name, "effort": effort, "folds": folds, "seed": seed, "good_class": good_class}
    options |= {"abstain_budget": abstain_budget, "precision": precision}
    if output is not None:
        summary = _train_alone(data, output, **options)
    else:
        client = Client(server)
        client.post("/api/v1/datasets", {"name": name, "root": str(data.resolve()), "actor": "cli"})
        job = client.post("/api/v1/training-runs", options | {"dataset": name, "actor": "cli"})
        summary = follow(client, job["id"])
    say(summary, as_json=as_json, table=metrics_table)


def _train_alone(data: Path, output: Path, **options: Any) -> dict[str, Any]:
    from control_plane.training import pipeline  # noqa: PLC0415

    with progress_bar() as bar:
        task = bar.add_task("starting", total=1.0)
        trained = pipeline.train(
            data,
            pipeline.TrainSettings(**options),
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
            client.post(f"/api/v1/jobs/{job_id}/cancel", {"actor": "cli"})
            raise
    if job["state"] != "succeeded":
        error = job["error"] or {"code": f"job.{job['state']}", "message": f"The job was {job['state']}."}
        raise ConflictError(error["code"], error["message"], expected=error.get("expected"), got=error.get("got"))
    return dict(job["result"])


def metrics_table(summary: dict[str, Any]) -> Table:
    """View and item figures with their intervals."""
    rows = []
    for level in ("view", "item"):
        for metric, value in summary.get("metrics", {}).get(level, {}).items():
            if isinstance(value, dict) and value.get("value") is not None:
                low, high = value.get("low"), value.get("high")
                interval = f"{low:.3f} to {high:.3f}" if low is not None else value.get("reason", "")
                rows.append([level, metric.replace("_", " "), f"{value['value']:.3f}", interval])
    table = table_of(["level", "metric", "value", "95 % interval over items"], rows)
    table.caption = f"bundle {summary.get('bundle', '')}"
    return table


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle.")],
    data: Annotated[Path, typer.Option(help="Labelled folder, as for training.")],
    exclude_doubt: Annotated[bool, typer.Option(help="Leave out views whose label is in doubt.")] = False,
    good_class: Annotated[str, typer.Option()] = "",
    as_json: AsJson = False,
) -> None:
    """Judge a labelled folder with a bundle exactly as an agent would; metrics per view and per item."""
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
    data: Annotated[Path, typer.Option(help="Labelled folder; best of items the model never saw.")],
    output: Annotated[Path, typer.Option(help="New directory.")],
    good_class: Annotated[str, typer.Option()] = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle's model int8, and tell what that gains in speed and costs in accuracy; refused where it costs much.

    Example: `sortline quantise --bundle apples-bundle --data other-photos --output apples-int8`
    """
    from control_plane.data.photo_folder import load_dataset  # noqa: PLC0415
    from control_plane.training import quantise as logic  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    spec = read_bundle(bundle).preprocess
    with progress_bar() as bar:
        task = bar.add_task("reading photographs", total=1.0)
        dataset = load_dataset(data, spec, good_class=good_class, progress=lambda s: bar.update(task, completed=s))
    made = logic.quantised(bundle, output, dataset.views, dataset.labels, dataset.items)
    say({"bundle": made.bundle.digest, **made.report}, as_json=as_json, table=_eight_bits)


def _eight_bits(found: dict[str, Any]) -> Table:
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
    table.caption, table.caption_justify = f"{found['views']} views of {found['items']} items", "left"
    return table


def import_onnx(
    model: Annotated[Path, typer.Argument(help="An .onnx file, for example exported from PyTorch.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    classes: Annotated[str, typer.Option(help="Class names in the model's order, comma separated.")],
    data: Annotated[Path, typer.Option(help="Labelled folder: golden views, reference and metrics come from it.")],
    inputs: Annotated[
        str, typer.Option(help="layout,channels of the image input: nchw,rgb · nchw,bgr · nhwc,rgb · nhwc,bgr")
    ] = "nchw,rgb",
    mean: Annotated[str, typer.Option(help="Subtracted after scaling, per channel.")] = "0,0,0",
    std: Annotated[str, typer.Option(help="Divided by, per channel.")] = "1,1,1",
    scale: Annotated[float, typer.Option(help="Pixels are multiplied by this first; 1/255 = 0.00392157.")] = 1 / 255,
    view_px: Annotated[int, typer.Option(help="Side of the model's input.")] = 64,
    logits: Annotated[bool, typer.Option(help="The output is logits, not probabilities.")] = True,
    good_class: Annotated[str, typer.Option()] = "",
    unseen: Annotated[
        bool, typer.Option("--unseen", help="The model never saw these items: learn fusion and costs from them.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the bundle here, without a control plane.")] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle from a model trained elsewhere, with the same checks and golden views."""
    layout, _, channels = inputs.partition(",")
    options: dict[str, Any] = {
        "name": name,
        "classes": [c.strip() for c in classes.split(",")],
        "good_class": good_class,
        "view_px": view_px,
        "layout": layout,
        "channels": channels or "rgb",
        "scale": scale,
        "mean": [float(v) for v in mean.split(",")],
        "std": [float(v) for v in std.split(",")],
        "logits": logits,
        "unseen": unseen,
        "data": str(data.resolve()),
    }
    if output is None:
        client = Client(server)
        body = {"path": str(model.resolve()), "settings": options, "actor": "cli"}
        say(follow(client, client.post("/api/v1/imports", body)["id"]), as_json=as_json)
        return
    from control_plane.training import onnx_import as importing  # noqa: PLC0415

    bundle = importing.import_onnx(model, importing.ImportSettings(**options), output)
    say({"bundle": bundle.digest, "directory": str(output)}, as_json=as_json)
