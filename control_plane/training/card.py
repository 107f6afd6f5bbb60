"""Writes the model card, the document that a person reads before a bundle sorts anything.

It contains no times, so that equal content has equal bytes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from control_plane.training.onnx_graph import ParityReport
    from models.recipe import Recipe


def write_card(
    name: str,
    dataset: dict[str, Any],
    metrics: dict[str, Any],
    parity: "ParityReport",
    recipe: "Recipe",
    fusion: dict[str, Any] | None = None,
    votes: dict[str, float] | None = None,
) -> str:
    """Returns Markdown with a YAML head; `votes` holds the weight of each part of the model."""
    levels = [key for key in ("view", "view_without_doubt", "item", "item_without_scalars") if key in metrics]
    rows = [
        f"| {level.replace('_', ' ')} | {metric.replace('_', ' ')} | {_figure(metrics[level][metric])} |"
        for level in levels
        for metric in ("auc", "balanced_accuracy", "class_balanced_accuracy")
        if metric in metrics[level]
    ]
    warnings = [f"- {warning}" for warning in dataset.get("warnings", [])]
    lines = [
        "---",
        f"model_name: {name}",
        "library_name: sortline",
        "tags: [image-classification, onnx, visual-sorting]",
        f"dataset_digest: {dataset.get('digest', 'none')}",
        "---",
        f"# {name}",
        "",
        f"Tells {', '.join(recipe.classes)}; good is {recipe.good_class}.",
        "",
        "## Data",
        f"{dataset.get('views', 0)} views of {dataset.get('items', 0)} items: {dataset.get('classes', {})}.",
        *warnings,
        "",
        "## Figures on items the model never saw",
        metrics.get("protocol", ""),
        "",
        "| level | figure | value (95 % interval) |",
        "|---|---|---|",
        *rows,
        "",
        *(["## What votes", *_votes(votes), ""] if votes else []),
        "## From views to items",
        *_fusion(recipe, fusion or {}),
        "",
        "## Conversion",
        f"scikit-learn against ONNX on {parity.views} views:",
        f"largest difference {parity.max_difference:.2g}, {parity.flips} labels flipped.",
        "",
        "## Limits",
        "Figures hold for items like those in the data set, under its cameras and lamps. Few items make wide",
        "intervals: read the interval, not the value. Nothing here tells of a variety the model has not seen.",
        "",
    ]
    return "\n".join(lines)


def _votes(votes: dict[str, float]) -> list[str]:
    shown = {name: f"{vote:.2f}" if vote else "none, it does not help here" for name, vote in votes.items()}
    return ["Weights of the parts' log-probabilities:", "", *(f"- {name}: {vote}" for name, vote in shown.items())]


def _fusion(recipe: "Recipe", report: dict[str, Any]) -> list[str]:
    """Describes how views become items and how well the result is calibrated; thresholds belong to the recipe."""
    spec = recipe.fusion
    if not spec.calibration_items:
        return ["Fusion and calibration are not learnt: too few items."]
    losses = ", ".join(f"{k}: {loss:.3f}" for k, loss in report.get("log_loss", {}).items())
    brier, rows = report["brier"], report["reliability"]
    spread = [f"{row['observed']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows]
    return [
        f"The {spec.top_k} strongest views count, learnt on {spec.calibration_items} held-out items.",
        f"Held-out log loss by number of views: {losses}.",
        f"Brier score {brier['value']:.3f} ({brier['low']:.3f} to {brier['high']:.3f}), expected calibration error",
        f"{report['calibration_error']:.3f}, both at equal shares of good and defective items.",
        report.get("note", ""),
        "",
        "| items | predicted | observed (95 % interval) |",
        "|---|---|---|",
        *(f"| {row['items']} | {row['predicted']:.3f} | {text} |" for row, text in zip(rows, spread, strict=True)),
        "",
        "Grades, prices and the thresholds that follow from them are in recipe.json and change without the model.",
    ]


def _figure(figure: dict[str, Any]) -> str:
    if figure.get("value") is None:
        return f"none ({figure.get('reason', 'unknown')})"
    if figure.get("low") is None:
        return f"{figure['value']:.3f} (no interval: {figure.get('reason', 'unknown')})"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
