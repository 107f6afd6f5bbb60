"""The default model in float32 and in int8: time per view, and what the smaller numbers cost in accuracy.

Both judge views that the simulated line's own pipeline collects from apples neither has seen. Time is processor time
of one thread, taken in turn, so that a busy machine slows both alike.
"""

import tempfile
from pathlib import Path

from benchmarks.figures import Figures
from control_plane.data.photo_folder import load_dataset
from control_plane.training.quantise import FLIP_LIMIT, quantised
from edge_agent.line_config import LineConfig
from edge_agent.offline.collect import collect
from models.bundle import read_bundle

_UNSEEN = 1007
"""Seed of a simulated line with other apples than those of the training."""


def stage(figures: Figures, bundle: Path, *, quick: bool) -> None:
    """Quantises the bundle and measures both; the bounds are those of the gate of a quantised model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        collect(LineConfig(lanes=2, seed=_UNSEEN), folder / "data", items=80 if quick else 400)
        dataset = load_dataset(folder / "data", read_bundle(bundle).preprocess)
        made = quantised(bundle, folder / "int8", dataset.views, dataset.labels, dataset.items, gate=False)
    report = made.report
    ms, size, area, balanced = (report[key] for key in ("ms_per_view", "model_bytes", "auc", "balanced_accuracy"))
    rows = [
        ("float32, per view", ms["float32"], "ms"),
        ("int8, per view", ms["int8"], "ms"),
        ("int8 / float32, time", ms["ratio"], ""),
        ("int8 / float32, bytes of the model", size["int8"] / size["float32"], ""),
        ("view AUC, float32", area["float32"], ""),
        ("view AUC, int8", area["int8"], ""),
        ("AUC cost", area["cost"], ""),
        ("AUC cost, 95 % interval", f"{area['low']:+.4f} to {area['high']:+.4f}", ""),
        ("balanced accuracy, float32", balanced["float32"], ""),
        ("balanced accuracy, int8", balanced["int8"], ""),
        ("views that change sides", report["flips"], ""),
        ("largest difference of a probability", report["max_difference"], ""),
    ]
    note = f"{report['views']} views of {report['items']} unseen simulated apples; batches of 8 on one thread"
    # The AUC has no bound here, because quick runs have too few items for its third digit; training has AUC_LIMIT.
    figures.table("float32 against int8", rows, {"views that change sides": ("<=", FLIP_LIMIT)}, note=note)
