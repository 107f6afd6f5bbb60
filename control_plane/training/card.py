"""The model card: what a person should know before the bundle sorts anything. No times: equal content, equal bytes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from control_plane.training.graph import ParityReport
    from models.recipe import Recipe


def write_card(
    name: str, dataset: dict[str, Any], metrics: dict[str, Any], parity: "ParityReport", recipe: "Recipe"
) -> str:
    """Markdown with a YAML head."""
    levels = [key for key in ("view", "view_without_doubt", "item") if key in metrics]
    rows = [
        f"| {level.replace('_', ' ')} | {metric.replace('_', ' ')} | {_figure(metrics[level][metric])} |"
        for level in levels
        for metric in ("auc", "balanced_accuracy", "class_balanced_accuracy")
        if metric in metrics[level]
    ]
    warnings = [f"- {warning}" for warning in dataset.get("warnings", [])]
    calibrated = recipe.fusion.calibration_items
    fusion = f"learnt on {calibrated} held-out items" if calibrated else "not learnt (too few items)"
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
        f"Calibration of item verdicts: {fusion}. Threshold {recipe.threshold:g}.",
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


def _figure(figure: dict[str, Any]) -> str:
    if figure.get("value") is None:
        return f"none ({figure.get('reason', 'unknown')})"
    if figure.get("low") is None:
        return f"{figure['value']:.3f} (no interval: {figure.get('reason', 'unknown')})"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
