"""Tint and the vote: a large soft stain is seen, the lamp is not; who learnt nothing but skins has no say."""

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from control_plane.training.colour_features import TINT_FEATURES, directions
from control_plane.training.cross_validation import answers_of
from control_plane.training.head import fit_head, view_weights
from control_plane.training.onnx_graph import build_graph, compare
from control_plane.training.patch_features import FeatureExtractor, FeatureSpec, widths
from models.classifier import OnnxClassifier

SPEC = FeatureSpec(filters=8, patches=2_000)


def stained(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of shaded, noisy apples of many colours; every second one has a large soft dull patch."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]
    away = np.hypot(rows - 31.5, columns - 31.5)
    views = np.zeros((count, 64, 64, 3), np.uint8)
    for number in range(count):
        shade = np.sqrt(np.maximum(1.0 - (away / 30.0) ** 2, 0.0)) * 0.7 + 0.3
        picture = rng.uniform(90, 200, 3) * shade[..., None] * rng.uniform(0.7, 1.1)
        y, x = rng.uniform(20, 44, 2)
        if number % 2:
            soft = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2.0 * 9.0**2))[..., None]
            picture = picture * (1.0 - 0.4 * soft)
        blotches = cv2.GaussianBlur(rng.normal(size=(64, 64)), (0, 0), 3.0)
        picture = picture * (1.0 + 1.2 * blotches[..., None]) + rng.normal(0, 3, picture.shape)
        views[number] = np.where((away < 28)[..., None], np.clip(picture, 1, 255), 0).astype(np.uint8)
    return views, np.arange(count) % 2, np.arange(count).astype(str)


@pytest.mark.slow
def test_a_large_soft_stain_is_seen_by_the_tint_and_not_by_contrast() -> None:
    views, truth, items = stained(200, 1)
    fresh, expected, _ = stained(200, 2)
    extractor = FeatureExtractor.fit(views, items, SPEC, seed=1)
    seen, new = extractor.transform(views), extractor.transform(fresh)
    score = {}
    for name, columns in (("contrast", slice(0, -TINT_FEATURES)), ("tint", slice(-TINT_FEATURES, None))):
        scale = StandardScaler().fit(seen[:, columns])
        model = LogisticRegression(C=0.05).fit(scale.transform(seen[:, columns]), truth)
        score[name] = roc_auc_score(expected, model.decision_function(scale.transform(new[:, columns])))
    assert score["tint"] > 0.95
    assert score["tint"] > score["contrast"] + 0.05


def test_the_lamp_changes_next_to_nothing() -> None:
    views, _, items = stained(20, 3)
    extractor = FeatureExtractor.fit(views, items, SPEC, seed=1)
    darker = np.where(views > 0, np.maximum(views * 0.8, 1), 0).astype(np.uint8)
    before, after = (extractor.transform(v)[:, -TINT_FEATURES:] for v in (views, darker))
    stain = np.abs(before[0] - before[1]).mean()
    assert np.abs(before - after).mean() < 0.15 * stain


def test_directions_are_spread_and_of_length_one() -> None:
    found = directions()
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-6)
    between = np.abs(found @ found.T)[~np.eye(len(found), dtype=bool)]
    assert between.max() < 0.95


def members(items: int, useful: bool, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes the scores of a weak first member, and of a second that is better or has only memorised the items."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(items), 6)
    truth = names % 2
    first = truth[:, None] * 0.8 + rng.normal(size=(len(names), 1))
    skins = rng.normal(size=(items, 5))[names]
    second = np.hstack((truth[:, None] * 1.5 * useful + rng.normal(size=(len(names), 1)), skins))
    return np.hstack((first, second)), truth, names


@pytest.mark.parametrize(("items", "useful", "kept"), [(80, True, (0, 1)), (80, False, (0,)), (20, False, (0,))])
@pytest.mark.slow
def test_an_optional_member_votes_only_if_it_is_good_on_unseen_items(
    items: int, useful: bool, kept: tuple[int, ...]
) -> None:
    features, truth, names = members(items, useful)
    weights = view_weights(truth, names)
    head, found = fit_head(features, truth, names, weights, classes=2, widths=(1, 6), seed=1, optional=True)
    assert found == kept
    assert len(head.members) == len(head.votes) == len(head.widths) == len(kept)
    alone, _ = fit_head(features[:, :1], truth, names, weights, classes=2, widths=(1,), seed=1)
    if kept == (0,):
        assert (head.predict_proba(features[:, :1]) == alone.predict_proba(features[:, :1])).all()


@pytest.mark.slow
def test_a_member_without_weight_is_left_out_of_the_graph() -> None:
    views, truth, items = stained(120, 5)
    extractor = FeatureExtractor.fit(views, items, SPEC, seed=1)
    features = extractor.transform(views)
    features[:, : widths(SPEC)[0]] = np.random.default_rng(1).normal(size=(len(views), widths(SPEC)[0]))
    head, kept = fit_head(
        features, truth, items, view_weights(truth, items), classes=2, widths=widths(SPEC), seed=1, optional=True
    )
    assert kept[-1] == len(SPEC.scales)
    assert 0 not in kept
    small = extractor.only(kept)
    assert small.transform(views).shape[1] == sum(head.widths)
    assert (small.transform(views)[:, -TINT_FEATURES:] == features[:, -TINT_FEATURES:]).all()
    graph = OnnxClassifier(build_graph(small, head, name="t", metadata={}))
    assert compare(head.predict_proba(small.transform(views)), answers_of(graph, views, None)[0]).passed
