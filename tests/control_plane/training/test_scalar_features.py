"""Weight is learnt: a class that no view shows, unknown values, and parity with the graph."""

import csv
from pathlib import Path

import numpy as np
import pytest

from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.evaluate import evaluate
from control_plane.training.onnx_writer import GraphWriter, floats
from control_plane.training.pipeline import TrainSettings, train
from control_plane.training.scalar_features import ScalarTransform, scalar_width, write_scalars
from models.bundle import read_bundle
from models.classifier import OnnxClassifier, ort
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import photo, save


def fruit(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 (count, 2): weight and length of fruit of one density, give or take five per cent."""
    length = rng.uniform(60, 90, count)
    return np.column_stack((0.00045 * length**3 * rng.uniform(0.95, 1.05, count), length)).astype(np.float32)


def by_graph(transform: ScalarTransform, scalars: np.ndarray) -> np.ndarray:
    w = GraphWriter()
    count = scalars.shape[1]
    w.op("Identity", [write_scalars(w, transform, "scalars")], output="features")
    model = w.model([floats("scalars", count)], [floats("features", scalar_width(count))], name="s")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["features"], {"scalars": scalars.astype(np.float32)})[0]


def by_numpy(transform: ScalarTransform, row: np.ndarray) -> np.ndarray:
    """The features of one item, straight from their description."""
    count = len(row)
    known = [bool(value > 0) and value < 1e9 for value in row]
    deviation = [float(np.log(row[k]) - transform.centre[k]) if known[k] else 0.0 for k in range(count)]
    filled = [
        deviation[k] if known[k] else sum(transform.regression[j, k] * deviation[j] for j in range(count))
        for k in range(count)
    ]
    white = np.clip(np.array(filled) @ transform.whiten, -6, 6)
    products = [white[i] * white[j] for i in range(count) for j in range(i, count)]
    return np.concatenate((white, products, [float(not k) for k in known]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_graph_computes_what_numpy_computes(count: int) -> None:
    rng = np.random.default_rng(1)
    scalars = np.column_stack((fruit(rng, 60), rng.uniform(8, 14, 60)))[:, :count].astype(np.float32)
    transform = ScalarTransform.fit(scalars, np.arange(60))
    odd = scalars[:8].copy()
    odd[0], odd[1, 0], odd[2, -1], odd[3, 0], odd[4, 0], odd[5, 0] = np.nan, np.nan, np.nan, 0.0, -5.0, np.inf
    got = by_graph(transform, odd)
    assert np.isfinite(got).all()
    for row in range(8):
        assert got[row] == pytest.approx(by_numpy(transform, odd[row]), rel=1e-3, abs=1e-3)


def test_a_missing_weight_is_estimated_from_the_length_so_that_a_large_fruit_is_not_light() -> None:
    rng = np.random.default_rng(2)
    transform = ScalarTransform.fit(fruit(rng, 200), np.arange(200))
    large = np.array([[np.nan, 88.0]], np.float32)
    weighed = np.array([[0.00045 * 88.0**3, 88.0], [0.8 * 0.00045 * 88.0**3, 88.0]], np.float32)
    unknown, usual, light = by_graph(transform, np.concatenate((large, weighed)))
    assert unknown[:2] == pytest.approx(usual[:2], abs=0.7)
    assert np.abs(light[:2] - usual[:2]).max() > 4.0
    assert list(unknown[-2:]) == [1.0, 0.0]


def test_items_with_many_rows_count_once() -> None:
    scalars = fruit(np.random.default_rng(3), 30)
    once = ScalarTransform.fit(scalars, np.arange(30))
    often = ScalarTransform.fit(np.repeat(scalars, 5, axis=0), np.repeat(np.arange(30), 5))
    assert once.centre == pytest.approx(often.centre, rel=1e-5)
    assert once.regression == pytest.approx(often.regression, rel=1e-3)


def hollow_folder(root: Path, *, seed: int = 0, items: int = 60, unknown: float = 0.0) -> Path:
    """Sound, blotted and hollow discs in turn; hollow ones look sound and weigh four fifths."""
    rng = np.random.default_rng(seed)
    measured = fruit(rng, items)
    rows = []
    (root / "views").mkdir(parents=True)
    for item in range(items):
        label = ("sound", "defect", "hollow")[item % 3]
        weight = measured[item, 0] * (0.8 if label == "hollow" else 1.0)
        for view in range(2):
            path = f"views/{item}-{view}.png"
            save(root / path, photo(rng, bad=label == "defect"))
            cell = "" if rng.random() < unknown else f"{weight:.1f}"
            rows.append((path, label, f"item-{item}", cell, f"{measured[item, 1]:.1f}"))
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "item", "weight_g", "length_mm"), *rows])
    return root


@pytest.mark.slow
def test_a_class_visible_by_weight_alone_is_learnt_and_missed_without_the_scale(tmp_path: Path) -> None:
    data = hollow_folder(tmp_path / "data", unknown=0.05)
    found = train(data, TrainSettings(name="fruit", effort="quick", folds=3), tmp_path / "b")
    item, blind = found.metrics["item"], found.metrics["item_without_scalars"]
    classes = item["classes"]
    hollow = classes.index("hollow")
    caught = item["confusion_shares"][hollow][hollow]["value"]
    assert caught > 0.85
    assert item["class_balanced_accuracy"]["value"] > blind["class_balanced_accuracy"]["value"] + 0.15
    bundle = read_bundle(tmp_path / "b")
    assert bundle.preprocess.scalars == ("weight_g", "length_mm")
    assert bundle.golden.scalars.shape[1] == 2
    assert np.isnan(bundle.golden.scalars).any()
    assert bundle.golden.check(OnnxClassifier(bundle.model)) <= bundle.golden.tolerance
    assert bundle.lineage["votes"]["scalars: weight_g, length_mm"] > 0
    assert "item without scalars" in bundle.card
    report = evaluate(tmp_path / "b", hollow_folder(tmp_path / "other", seed=7, items=30))
    assert report["metrics"]["item"]["confusion"][hollow][hollow] >= 8
    assert "item_without_scalars" in report["metrics"]


@pytest.mark.slow
def test_scalars_can_be_left_out_and_a_folder_without_them_is_warned_of(tmp_path: Path) -> None:
    data = hollow_folder(tmp_path / "data", items=18)
    assert load_dataset(data, PreprocessSpec()).scalar_names == ("weight_g", "length_mm")
    found = train(data, TrainSettings(name="fruit", effort="quick", folds=2, scalars=()), tmp_path / "b")
    assert read_bundle(tmp_path / "b").preprocess.scalars == ()
    assert "item_without_scalars" not in found.metrics
    assert found.dataset.get("scalars") is None
