"""The classifier on the features: unions, seeds, and parity between scikit-learn and ONNX."""

from dataclasses import replace

import numpy as np
import pytest

from control_plane.evaluation.metrics import auc
from control_plane.training.cross_validation import answers_of
from control_plane.training.head import fit_head, view_weights
from control_plane.training.onnx_graph import build_graph, compare
from control_plane.training.patch_features import (
    FeatureExtractor,
    FeatureSpec,
    unions,
    united,
    widths,
)
from models.classifier import OnnxClassifier
from tests.simulators.photographs import small_views


def skins_and_marks(rng: np.random.Generator, *, telling: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes features of one scale of four filters: one marks the defect, the skin correlates by accident or not."""
    kind = np.arange(12) % 2
    labels, items = np.repeat(kind, 20), np.repeat([f"i{k}" for k in range(12)], 20)
    features = np.abs(rng.normal(1.0, 0.1, (240, 12)))
    features[:, :4] += np.repeat(0.7 * rng.random(12) + (0.3 * kind if telling else 0.15), 20)[:, None]
    features[:, 4] += 0.2 * labels
    return features.astype(np.float32), labels, items


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_unions_teach_to_look_at_the_mark_and_not_at_the_skin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels, items = skins_and_marks(rng, telling=True)
    others, truth, _ = skins_and_marks(rng, telling=False)
    weights = view_weights(labels, items)
    plain, taught = (
        fit_head(features, labels, items, weights, classes=2, widths=(12,), seed=1, unite=unite)[0].predict_proba(
            others
        )
        for unite in ((), (united,))
    )
    assert auc(truth > 0, taught[:, 1]) > auc(truth > 0, plain[:, 1]) + 0.005


@pytest.mark.parametrize("good_items", [1, 6])
def test_a_view_is_united_with_good_views_of_other_items_only(good_items: int) -> None:
    features, _, items = skins_and_marks(np.random.default_rng(3), telling=True)
    labels = np.repeat(np.arange(12) >= good_items, 20).astype(int)
    features[:, 0] = np.arange(len(features))
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def seen(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        pairs.append((first[:, 0].astype(int), second[:, 0].astype(int)))
        return united(first, second)

    weights = view_weights(labels, items)
    fit_head(features, labels, items, weights, classes=2, widths=(12,), seed=1, unite=(seen,))
    first, second = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    assert (labels[second] == 0).all()
    assert (items[first] != items[second]).all()
    assert set(labels[first]) == ({0, 1} if good_items > 1 else {1})


@pytest.mark.slow
def test_the_same_data_and_seed_give_the_same_bytes() -> None:
    views, truth, items = small_views()
    graphs = []
    for _ in range(2):
        extractor = FeatureExtractor.fit(views, items, FeatureSpec(filters=6, patches=400), seed=1)
        weights = view_weights(truth, items)
        head, _ = fit_head(
            extractor.transform(views),
            truth,
            items,
            weights,
            classes=2,
            widths=widths(extractor.spec),
            seed=1,
            unite=unions(extractor.spec),
        )
        graphs.append(build_graph(extractor, head, name="t", metadata={"b": "2", "a": "1"}))
    assert graphs[0] == graphs[1]
    assert OnnxClassifier(graphs[0]).metadata == {"a": "1", "b": "2"}


@pytest.mark.parametrize(("scalars", "unite"), [(0, False), (2, False), (2, True)])
@pytest.mark.slow
def test_scikit_learn_and_onnx_agree_also_with_scalars_that_are_unknown(scalars: int, unite: bool) -> None:
    views, truth, items = small_views()
    truth = np.arange(len(views)) // 2 % 2  # only the scalars tell the classes apart
    known = (np.random.default_rng(2).normal(100, 8, (len(views), scalars)) + 60 * truth[:, None]).astype(np.float32)
    known[::5, :1] = np.nan
    names = ("weight_g", "length_mm")[:scalars]
    spec = FeatureSpec(filters=6, patches=400, scalars=names)
    extractor = FeatureExtractor.fit(views, items, spec, seed=1, scalars=known)
    head, parts = fit_head(
        extractor.transform(views, known),
        truth,
        items,
        view_weights(truth, items),
        classes=2,
        widths=widths(extractor.spec),
        seed=1,
        optional=int(scalars > 0),
        unprojected=int(scalars > 0),
        unite=unions(extractor.spec) if unite else (),
    )
    extractor = extractor.only(parts)
    assert extractor.spec.scalars == names
    graph = build_graph(extractor, head, name="t", metadata={})
    expected = head.predict_proba(extractor.transform(views, known))
    report = compare(expected, answers_of(OnnxClassifier(graph), views, known)[0])
    assert report.passed
    assert report.max_difference < 1e-4
    wrong = build_graph(extractor, replace(head, votes=2.5 * head.votes), name="t", metadata={})
    assert not compare(expected, answers_of(OnnxClassifier(wrong), views, known)[0]).passed
