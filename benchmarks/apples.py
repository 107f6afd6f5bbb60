"""Cross-validates a training by item on labelled photographs: `python -m benchmarks.apples --data DIR`.

The figures are the ones every training run prints, without writing a bundle anywhere. The baseline beside them is a
classifier that sees only the mean colour of the item.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.data.splits import item_folds
from control_plane.evaluation.metrics import measure
from control_plane.training.pipeline import TrainSettings, train
from models.view_spec import PreprocessSpec


def colour_baseline(dataset: Dataset, folds: int, seed: int) -> dict:
    """Returns view figures of a logistic regression on the mean colour of the item."""
    inside = dataset.views.max(axis=3) > 0
    mean = dataset.views.sum(axis=(1, 2)) / np.maximum(inside.sum(axis=(1, 2)), 1)[:, None]
    found = np.zeros((len(mean), len(dataset.classes)))
    for train_rows, test_rows in item_folds(dataset.items, dataset.labels, folds=folds, seed=seed):
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
        found[test_rows] = model.fit(mean[train_rows], dataset.labels[train_rows]).predict_proba(mean[test_rows])
    return measure(dataset.labels, found, dataset.items, dataset.classes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three folds, small dictionary")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folds, effort = (3, "quick") if options.quick else (options.folds, "standard")
    baseline = colour_baseline(load_dataset(options.data, PreprocessSpec()), folds, options.seed)
    settings = TrainSettings(name="benchmark", seed=options.seed, effort=effort, folds=folds)
    with tempfile.TemporaryDirectory() as scratch:
        found = train(
            options.data,
            settings,
            Path(scratch) / "bundle",
            progress=lambda stage, share: print(f"\r{100 * share:3.0f} % {stage:<40}", end="", file=sys.stderr),
        ).summary()
    print(file=sys.stderr)
    rows = [("mean colour, views", baseline), *((level, figures) for level, figures in found["metrics"].items())]
    for level, figures in rows:
        if isinstance(figures, dict) and "auc" in figures:
            for name in ("auc", "auc_within_folds", "balanced_accuracy"):
                if name in figures:
                    print(f"{level:<22} {name:<18} {figures[name]}")
    print(f"parity {found['parity']}\nseconds {found['seconds']}")
    if options.json:
        options.json.write_text(json.dumps({"baseline": baseline, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
