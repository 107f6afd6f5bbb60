"""From photographs to a bundle: hostile folders, honest splits, one computation on both sides."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from control_plane.data.photo_folder import load_dataset
from control_plane.data.splits import item_folds
from control_plane.evaluation.evaluate import evaluate, judged_items
from control_plane.evaluation.metrics import auc, auc_within_folds, item_truth, measure
from control_plane.evaluation.operating_point import cost_report, held_out_of
from control_plane.training.augment import varied
from control_plane.training.colour_features import TINT_FEATURES, Tint, directions, united_tint
from control_plane.training.head import fit_head, view_weights
from control_plane.training.onnx_graph import build_graph, parity
from control_plane.training.onnx_import import ImportSettings, import_onnx
from control_plane.training.patch_features import (
    Dictionary,
    FeatureExtractor,
    FeatureSpec,
    Scale,
    normalised,
    shrunk,
    unions,
    united,
    widths,
)
from control_plane.training.pipeline import TrainSettings, train
from models.bundle import read_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.view_spec import PreprocessSpec

SPEC = PreprocessSpec()


def photo(rng: np.random.Generator, *, bad: bool) -> np.ndarray:
    """A textured disc on white; bad ones have a dark blot."""
    image = np.full((80, 80, 3), 250, np.uint8)
    disc = np.zeros((80, 80), np.uint8)
    cv2.circle(disc, (40, 40), 32, 1, -1)
    colour = rng.integers(90, 200, 3)
    texture = np.clip(colour + rng.normal(0, 8, (80, 80, 3)), 1, 235).astype(np.uint8)
    image[disc > 0] = texture[disc > 0]
    if bad:
        at = tuple(int(v) for v in rng.integers(28, 52, 2))
        cv2.circle(image, at, int(rng.integers(6, 11)), (15, 25, 40), -1)
    return image


def folder(root: Path, *, items: int = 12, views: int = 4, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = []
    (root / "views").mkdir(parents=True)
    for item in range(items):
        for view in range(views):
            bad = item % 2 == 1
            path = f"views/{item}-{view}.png"
            cv2.imwrite(str(root / path), photo(rng, bad=bad))
            rows.append((path, "defect" if bad else "sound", f"item-{item}", view, int(view == 0)))
    with (root / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label", "item", "frame", "doubt"))
        writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "photos", items=24)


def refused(code: str, root: Path, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load_dataset(root, SPEC, **options)
    assert caught.value.code == code
    return caught.value


def labels(root: Path, text: str) -> Path:
    (root / "labels.csv").write_text(text)
    return root


def test_a_good_folder_is_read_with_the_good_class_first(data: Path) -> None:
    found = load_dataset(data, SPEC)
    assert found.classes == ("sound", "defect")
    assert found.views.shape == (96, 64, 64, 3)
    assert found.report.items == 24
    assert found.doubt.sum() == 24
    assert found.digest == load_dataset(data, SPEC).digest


def test_the_digest_changes_with_a_label_or_a_byte(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=6)
    before = load_dataset(root, SPEC).digest
    text = (root / "labels.csv").read_text()
    labels(root, text.replace("item-0,0,1", "item-0,0,0").replace("views/0-0.png,sound", "views/0-0.png,defect"))
    assert load_dataset(root, SPEC).digest != before
    labels(root, text)
    cv2.imwrite(str(root / "views/0-0.png"), photo(np.random.default_rng(9), bad=False))
    assert load_dataset(root, SPEC).digest != before


def test_a_tree_with_one_folder_per_class_warns_when_items_are_unknown(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("good", "bad"):
        (tmp_path / name / "apple-1").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / name / "apple-1" / "a.png"), photo(rng, bad=name == "bad"))
        cv2.imwrite(str(tmp_path / name / "loose.png"), photo(rng, bad=name == "bad"))
    found = load_dataset(tmp_path, SPEC)
    assert found.classes == ("good", "bad")
    assert sorted(set(found.items)) == ["bad/apple-1", "bad/loose.png", "good/apple-1", "good/loose.png"]
    assert any("item of its own" in warning for warning in found.report.warnings)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    refused("dataset.missing", tmp_path / "none")
    refused("dataset.empty", tmp_path)


def test_one_class_and_a_class_with_one_item_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    rows = (root / "labels.csv").read_text().splitlines()
    labels(root, "\n".join([rows[0], *(r for r in rows[1:] if "sound" in r)]))
    refused("dataset.one_class", root)
    labels(root, "\n".join([rows[0], *(r for r in rows[1:] if "item-3" not in r)]))
    assert refused("dataset.too_few_items", root).got == 1


def test_a_label_without_file_is_refused_and_a_file_without_label_is_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    (root / "stray.jpg").write_bytes(b"x")
    assert any("no label" in warning for warning in load_dataset(root, SPEC).report.warnings)
    (root / "views/0-0.png").unlink()
    refused("dataset.missing_files", root)


def test_unreadable_images_are_skipped_while_few_and_refused_when_many(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=12)
    (root / "views/0-0.png").write_bytes(b"")
    found = load_dataset(root, SPEC)
    assert found.report.skipped == {"views/0-0.png": "photo.unreadable"}
    for number in range(6):
        (root / f"views/{number}-1.png").write_bytes(b"\x89PNG rubbish")
    refused("dataset.too_many_unreadable", root)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd"])
def test_a_label_that_names_a_file_outside_is_refused(tmp_path: Path, path: str) -> None:
    refused("dataset.unsafe_path", labels(tmp_path, f"path,label\n{path},sound\n"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pth,label\na,b\n", "dataset.missing_columns"),
        ("", "dataset.missing_columns"),
        ("path,label\na.png,\n", "dataset.empty"),
        ('path,label\n"unclosed', "dataset.malformed_csv"),
    ],
)
def test_a_broken_label_file_is_refused(tmp_path: Path, text: str, code: str) -> None:
    refused(code, labels(tmp_path, text))


def test_label_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    refused("dataset.malformed_csv", tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    text = (root / "labels.csv").read_text()
    labels(root, text + "views/0-0.png,defect,item-0,0,0\n")
    refused("dataset.conflicting_labels", root)
    lines = text.splitlines()
    labels(root, "\n".join([lines[0] + ",split", lines[1] + ",test", *(line + ",train" for line in lines[2:])]))
    refused("dataset.split_leaks", root)
    labels(root, text.replace("sound", "fine"))
    refused("dataset.no_good_class", root)
    assert load_dataset(root, SPEC, good_class="fine").classes[0] == "fine"


def test_all_views_of_an_item_are_on_one_side_and_each_view_is_tested_once() -> None:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 23, 400).astype(str)
    truth = (rng.random(400) < 0.4).astype(int)
    tested = np.zeros(400, int)
    for train_rows, test_rows in item_folds(items, truth, folds=5, seed=3):
        assert not set(items[train_rows]) & set(items[test_rows])
        tested[test_rows] += 1
    assert (tested == 1).all()


def test_an_item_is_bad_when_a_sure_view_shows_it() -> None:
    none = np.zeros(3, bool)
    assert item_truth(np.array([0, 0, 2]), none) == 2
    assert item_truth(np.array([0, 0, 2]), np.array([False, False, True])) == 0
    assert item_truth(np.array([1, 1]), np.ones(2, bool)) == 1


def test_intervals_widen_when_views_are_copies() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 2
    score = np.clip(0.5 + 0.25 * (truth - 0.5) + rng.normal(0, 0.25, 40), 0.01, 0.99)
    repeat = np.repeat(np.arange(40), 20)
    probabilities = np.column_stack((1 - score, score))
    single = measure(truth, probabilities, np.arange(40), ("sound", "bad"))["auc"]
    copies = measure(truth[repeat], probabilities[repeat], repeat, ("sound", "bad"))["auc"]
    assert copies["value"] == pytest.approx(single["value"], abs=1e-6)
    assert copies["high"] - copies["low"] == pytest.approx(single["high"] - single["low"], abs=0.05)
    few = measure(truth[:4], probabilities[:4], np.arange(4), ("sound", "bad"))
    for figure in (few["auc"], few["confusion_shares"][0][0]):
        assert figure["low"] is None
        assert "only 4 items" in figure["reason"]


def test_the_mean_within_folds_is_blind_to_offsets_between_folds_and_pooling_is_not() -> None:
    bad = np.tile([False, True], 40)
    score = np.repeat([0.1, 0.5, 0.3, 0.7], 20) + 0.1 * bad
    folds = [np.arange(k * 20, (k + 1) * 20) for k in range(4)]
    within = auc_within_folds(bad, score, folds)
    assert (within["value"], within["low"], within["high"], within["folds"]) == (1.0, 1.0, 1.0, 4)
    assert auc(bad, score) < 0.75
    one_sided = auc_within_folds(bad, score, [*folds[:2], np.flatnonzero(bad)])
    assert one_sided["value"] is None
    assert "only 2 folds" in one_sided["reason"]


def test_each_cell_of_the_confusion_has_an_interval_over_items() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(60) % 2, 10)
    score = np.where(rng.random(600) < 0.8, truth * 0.9 + 0.05, 0.5)
    found = measure(truth, np.column_stack((1 - score, score)), np.repeat(np.arange(60), 10), ("sound", "rot", "worm"))
    counts, shares = np.array(found["confusion"]), found["confusion_shares"]
    for row in range(2):
        for column in range(2):
            cell = shares[row][column]
            assert cell["value"] == pytest.approx(counts[row, column] / counts[row].sum(), abs=1e-4)
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert shares[0][1]["low"] < shares[0][1]["high"]
    assert shares[2][0] == {"value": None, "low": None, "high": None, "reason": "no item of this class"}


def small_views(count: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    views = np.zeros((count, 64, 64, 3), np.uint8)
    for row in range(count):
        cv2.circle(disc := np.zeros((64, 64), np.uint8), (32, 32), 28, 1, -1)
        pixels = np.clip(rng.normal(130, 25, (64, 64, 3)), 1, 255).astype(np.uint8)
        if row % 2:
            cv2.circle(pixels, (30, 30), 9, (20, 30, 50), -1)
        views[row][disc > 0] = pixels[disc > 0]
    return views, np.arange(count) % 2, np.array([f"i{row // 2 * 2 + row % 2}" for row in range(count)])


@pytest.mark.parametrize("view_px", [64, 61])
def test_the_graph_computes_what_numpy_computes(view_px: int) -> None:
    views, _, items = small_views(8)
    views = np.ascontiguousarray(views[:, :view_px, :view_px])
    spec = FeatureSpec(filters=6, patches=400, view_px=view_px)
    extractor = FeatureExtractor.fit(views, items, spec, seed=1)
    got = extractor.transform(views)
    for row in range(4):
        expected = [
            pooled_in_numpy(views[row], *pair) for pair in zip(spec.scales, extractor.dictionaries, strict=True)
        ] + [tint_in_numpy(views[row], extractor.tint)]
        assert got[row] == pytest.approx(np.concatenate(expected), rel=2e-3, abs=2e-3)


def pooled_in_numpy(view: np.ndarray, scale: Scale, dictionary: Dictionary) -> np.ndarray:
    """Features of one scale, straight from their description."""
    colours, inside = shrunk(view[None], scale)
    size, starts = scale.patch_px, range(0, inside.shape[1] - scale.patch_px + 1, scale.stride)
    flat = dictionary.kernels.transpose(0, 2, 3, 1).reshape(len(dictionary.biases), -1)
    codes = np.zeros((len(starts), len(starts), len(flat)))
    whole = np.zeros((len(starts), len(starts)), bool)
    for at_y, y in enumerate(starts):
        for at_x, x in enumerate(starts):
            whole[at_y, at_x] = inside[0, y : y + size, x : x + size].all()
            patch = normalised(colours[0, y : y + size, x : x + size].reshape(1, -1), scale.noise)[0]
            codes[at_y, at_x] = whole[at_y, at_x] * np.maximum(flat @ patch + dictionary.biases, 0)
    tile = -(-len(starts) // 3)
    corners = [(y * tile, x * tile) for y, x in np.ndindex(3, 3)]
    tops = [codes[y : y + tile, x : x + tile].max(axis=(0, 1)) for y, x in corners]
    mean = codes.sum(axis=(0, 1)) / whole.sum()
    return np.concatenate((np.sqrt(mean), np.max(tops, axis=0), np.mean(tops, axis=0)))


def tint_in_numpy(view: np.ndarray, tint: Tint) -> np.ndarray:
    """Features of the tint, straight from their description, place by place."""
    side = len(view) // 2
    deviation, mostly = np.zeros((side, side, 3)), np.zeros((side, side), bool)
    for y, x in np.ndindex(side, side):
        block = view[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3).astype(float)
        item = block[block.max(axis=1) > 0]
        mostly[y, x] = len(item) > 2
        if mostly[y, x]:
            blue, green, red = np.log(item.mean(axis=0) + 6.0)
            deviation[y, x] = (0.2 * blue + 0.4 * green + 0.4 * red, red - green, green - blue)
    deviation[mostly] -= deviation[mostly].mean(axis=0)
    deviation = (deviation - tint.usual.transpose(1, 2, 0)) / tint.spread
    found = []
    for reach in (0, 1, 2):
        step = 1 if reach == 0 else 2
        smooth, count = np.zeros((side, side, 3)), 0
        for y, x in np.ndindex(side, side):
            near = slice(max(y - reach, 0), y + reach + 1), slice(max(x - reach, 0), x + reach + 1)
            if y % step == x % step == 0 and mostly[near].sum() > 0.5 * (2 * reach + 1) ** 2:
                smooth[y, x] = deviation[near][mostly[near]].mean(axis=0)
                count += 1
        along = smooth @ np.concatenate((directions(), -directions())).T
        found.append(along.max(axis=(0, 1)))
        found += [np.sqrt(np.maximum(along - t, 0.0).sum(axis=(0, 1)) / count) for t in (0.0, 1.0, 2.0)]
    return np.concatenate(found)


def test_features_are_finite_for_empty_and_tiny_items_and_blind_to_the_background() -> None:
    views, _, items = small_views(8)
    extractor = FeatureExtractor.fit(views, items, FeatureSpec(filters=6, patches=400), seed=1)
    odd = np.zeros((2, 64, 64, 3), np.uint8)
    odd[1, 30, 30] = 9
    assert np.isfinite(extractor.transform(odd)).all()
    assert extractor.transform(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 36 + TINT_FEATURES)


def test_united_features_are_those_of_a_view_that_shows_both() -> None:
    rng = np.random.default_rng(6)
    views = np.zeros((3, 64, 64, 3), np.uint8)
    views[0, 8:56, 4:28] = rng.integers(60, 90, (48, 24, 3))
    views[1, 8:56, 36:60] = rng.integers(20, 250, (48, 24, 3))
    views[2] = views[0] + views[1]
    extractor = FeatureExtractor.fit(views, np.arange(3), FeatureSpec(filters=6, patches=400), seed=1)
    for scale in np.split(extractor.transform(views)[:, :36], 2, axis=1):
        first, second, both = scale[0:1], scale[1:2], scale[2:3]
        found = united(first, second)
        assert found[:, :12] == pytest.approx(both[:, :12], abs=1e-4)
        assert found[:, 12:] == pytest.approx((first + second)[:, 12:] / 2)
        assert (found == united(second, first)).all()
        assert united(first, first) == pytest.approx(first)
    first, second = (extractor.transform(views)[k : k + 1, 36:] for k in (0, 1))
    assert united_tint(first, first) == pytest.approx(np.abs(first), abs=1e-6)
    assert (united_tint(first, second) == united_tint(second, first)).all()


def skins_and_marks(rng: np.random.Generator, *, telling: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of one scale of four filters: a mark tells a defect; the skin does by accident, or not at all."""
    kind = np.arange(12) % 2
    labels, items = np.repeat(kind, 20), np.repeat([f"i{k}" for k in range(12)], 20)
    features = np.abs(rng.normal(1.0, 0.1, (240, 12)))
    features[:, :4] += np.repeat(0.7 * rng.random(12) + (0.3 * kind if telling else 0.15), 20)[:, None]
    features[:, 4] += 0.2 * labels
    return features.astype(np.float32), labels, items


@pytest.mark.parametrize("seed", range(4))
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
def test_scikit_learn_and_onnx_agree_also_with_scalars_that_are_unknown(scalars: int, unite: bool) -> None:
    views, truth, items = small_views()
    extractor = FeatureExtractor.fit(views, items, FeatureSpec(filters=6, patches=400), seed=1)
    known = np.random.default_rng(2).normal(100, 20, (len(views), scalars)).astype(np.float32) if scalars else None
    if known is not None:
        known[::5, 0] = np.nan
    head, _ = fit_head(
        extractor.transform(views),
        truth,
        items,
        view_weights(truth, items),
        classes=2,
        widths=widths(extractor.spec),
        seed=1,
        scalars=known,
        unite=unions(extractor.spec) if unite else (),
    )
    graph = build_graph(extractor, head, name="t", metadata={})
    report = parity(extractor, head, graph, views, known)
    assert report.passed
    assert report.max_difference < 1e-4
    wrong = build_graph(extractor, replace(head, votes=2.5 * head.votes), name="t", metadata={})
    assert not parity(extractor, head, wrong, views, known).passed


def test_varied_views_are_other_views_of_a_whole_item_on_no_background() -> None:
    views, _, _ = small_views(8)
    made = varied(views, np.random.default_rng(0))
    assert made.shape == views.shape
    assert made.dtype == np.uint8
    assert (made == varied(views, np.random.default_rng(0))).all()
    assert (made != views).any(axis=(1, 2, 3)).all()
    area = (made.max(axis=3) > 0).sum(axis=(1, 2)) / (views.max(axis=3) > 0).sum(axis=(1, 2))
    assert (area > 0.5).all()
    assert (area < 1.1).all()
    assert (made.min(axis=3) > 0).sum() == (made.max(axis=3) > 0).sum()
    nothing = varied(np.zeros((3, 64, 64, 3), np.uint8), np.random.default_rng(1))
    assert not nothing.any()
    assert varied(views[:0], np.random.default_rng(0)).shape == (0, 64, 64, 3)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("trained") / "bundle"
    stages: list[tuple[str, float]] = []
    settings = TrainSettings(name="discs", effort="quick", folds=3)
    found = train(data, settings, output, progress=lambda name, share: stages.append((name, share)))
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    return output, found.summary()


def test_training_makes_a_bundle_that_works_and_tells_its_figures(trained: tuple[Path, dict]) -> None:
    output, summary = trained
    bundle = read_bundle(output)
    bundle.golden.check(OnnxClassifier(bundle.model))
    assert summary["metrics"]["view"]["auc"]["value"] > 0.9
    assert summary["metrics"]["item"]["items"] == 24
    assert summary["parity"]["passed"]
    assert summary["parity"]["views"] == 2 * 96
    assert bundle.profile.items == 24
    assert bundle.recipe.fusion.calibration_items == 24
    assert "Brier score" in bundle.card
    assert "24 items in 2 bins" in bundle.card
    assert "- contrast in colour, 1/1: " in bundle.card
    held = held_out_of(bundle.lineage, bundle.recipe)
    assert len(held.truth) == 24
    assert bundle.lineage["fusion"]["log_loss"].keys() == {"1", "2", "3", "4"}
    assert str(output) not in json.dumps(bundle.lineage)


def test_evaluating_judges_a_folder_as_an_agent_would(trained: tuple[Path, dict], tmp_path: Path) -> None:
    other = folder(tmp_path / "other", items=10, seed=77)
    report = evaluate(trained[0], other)
    assert report["metrics"]["view"]["auc"]["value"] > 0.9
    assert report["metrics"]["item"]["rows"] == 10
    less = evaluate(trained[0], other, exclude_doubt=True)
    assert less["metrics"]["view"]["rows"] == 30
    assert json.loads(json.dumps(report)) == report


def test_training_stops_when_told(data: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def progress(_stage: str, share: float) -> None:
        if share > 0.1:
            raise Stop

    with pytest.raises(Stop):
        train(data, TrainSettings(name="x", effort="quick", folds=3), tmp_path / "b", progress=progress)
    assert not (tmp_path / "b").exists()


def exported(path: Path, *, batch: int | str = 1, classes: int = 2, opset: int = 13, ir: int = 8) -> Path:
    """What a PyTorch export looks like: float32 NCHW RGB, normalised, one batch size, logits."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.2, (classes, 3)).astype(np.float32)
    weights[0], weights[1] = [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "torch",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir
    onnx.save(model, str(path))
    return path


def imported(data: Path, **options: object) -> ImportSettings:
    values = {"name": "torch", "classes": ["sound", "defect"], "data": str(data), "mean": [0.5] * 3, "std": [0.2] * 3}
    return ImportSettings(**(values | options))


def test_a_model_from_elsewhere_becomes_a_bundle(data: Path, tmp_path: Path) -> None:
    bundle = import_onnx(exported(tmp_path / "m.onnx"), imported(data), tmp_path / "b")
    again = read_bundle(tmp_path / "b")
    assert again.digest == bundle.digest
    classifier = OnnxClassifier(again.model)
    again.golden.check(classifier)
    assert classifier.embedding_size == 0
    assert classifier.classify(load_dataset(data, SPEC).views[:5]).probabilities.shape == (5, 2)


@pytest.mark.parametrize(("opset", "ir"), [(11, 6), (17, 9), (18, 10), (20, 10), (21, 11)])
def test_a_model_in_the_format_of_any_exporter_becomes_a_bundle(
    data: Path, tmp_path: Path, opset: int, ir: int
) -> None:
    # PyTorch 2.13 stamps format 9 on opset 17 and 10 on opset 18 and later.
    bundle = import_onnx(exported(tmp_path / "m.onnx", opset=opset, ir=ir), imported(data), tmp_path / "b")
    bundle.golden.check(OnnxClassifier(bundle.model))


def test_operators_newer_than_any_agent_reads_are_refused(data: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "m.onnx", opset=23, ir=11)
    model = onnx.load(str(path))
    model.graph.node.insert(2, helper.make_node("RMSNormalization", ["flat", "one"], ["even"], axis=-1))
    model.graph.node[-1].input[0] = "even"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "one"))
    onnx.save(model, str(path))
    with pytest.raises(InputError) as caught:
        import_onnx(path, imported(data), tmp_path / "b")
    assert caught.value.code == "import.wrong_signature"
    assert "opset 17 to 21" in str(caught.value)


def test_an_imported_model_learns_its_fusion_from_items_it_never_saw(data: Path, tmp_path: Path) -> None:
    model = exported(tmp_path / "m.onnx", batch="N")
    plain = import_onnx(model, imported(data), tmp_path / "plain")
    assert plain.recipe.fusion.calibration_items == 0
    assert "held_out" not in plain.lineage
    bundle = import_onnx(model, imported(data, unseen=True), tmp_path / "b")
    assert bundle.recipe.fusion.calibration_items == 24
    assert held_out_of(bundle.lineage, bundle.recipe).truth.count(0) == 12
    assert "Brier score" in bundle.card


def test_costs_can_be_counted_on_a_folder_the_model_never_saw(trained: tuple[Path, dict], tmp_path: Path) -> None:
    held = judged_items(trained[0], folder(tmp_path / "other", items=10, seed=77))
    assert held.truth.count(1) == 5
    report = cost_report(held, read_bundle(trained[0]).recipe)
    assert report["items"] == 10
    assert report["recipe"]["escape_rate"]["value"] < 0.5


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"classes": ["sound", "a", "b"]}, "import.wrong_classes"),
        ({"classes": ["fine", "defect"]}, "import.wrong_classes"),
        ({"view_px": 32}, "import.wrong_signature"),
        ({"logits": False}, "import.wrong_signature"),
        ({"layout": "sideways"}, "import.bad_settings"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(data: Path, tmp_path: Path, options: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        import_onnx(exported(tmp_path / "m.onnx"), imported(data, **options), tmp_path / "b")
    assert caught.value.code == code
    assert not (tmp_path / "b").exists()


def test_what_is_no_model_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for content in (b"", b"rubbish", exported(tmp_path / "x.onnx").read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            import_onnx(path, imported(data), tmp_path / "b")
        assert caught.value.code in {"import.unreadable", "import.wrong_signature"}
