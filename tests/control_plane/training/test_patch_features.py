"""Features: the graph computes what numpy computes from their description."""

import numpy as np
import pytest

from control_plane.training import patch_features
from control_plane.training.colour_features import TINT_FEATURES, Tint, directions, united_tint
from control_plane.training.cross_validation import _of_parts
from control_plane.training.patch_features import (
    Dictionary,
    FeatureExtractor,
    FeatureSpec,
    PatchScale,
    normalised,
    shrunk,
    united,
    widths,
)
from tests.simulators.photographs import small_views


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


def test_features_have_the_same_bits_however_many_views_a_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    views, _, items = small_views(8)
    extractor = FeatureExtractor.fit(views, items, FeatureSpec(filters=8, patches=400), seed=1)
    usual = extractor.transform(views)
    for count in (1, 3, 64):
        monkeypatch.setattr(patch_features, "_AT_ONCE", count)
        assert np.array_equal(extractor.transform(views), usual)


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 2), (1, 2), (0, 1, 2)])
def test_columns_of_some_parts_are_what_an_extractor_of_these_parts_computes(parts: tuple[int, ...]) -> None:
    views, _, items = small_views(6)
    spec = FeatureSpec(filters=8, patches=400)
    extractor = FeatureExtractor.fit(views, items, spec, seed=1)
    columns = _of_parts(extractor.transform(views), widths(spec), parts)
    assert np.array_equal(columns, extractor.only(parts).transform(views))


@pytest.mark.parametrize("scale", FeatureSpec().scales)
def test_sampled_patches_are_the_whole_ones_among_those_drawn(scale: PatchScale) -> None:
    views, _, items = small_views(6)
    spec = FeatureSpec(patches=600)
    found = patch_features._sample_patches(views, items, spec, scale, np.random.default_rng(5))
    rng, size, expected = np.random.default_rng(5), scale.patch_px, []
    names = np.unique(items)
    each = spec.patches // len(names)
    for name in names:
        members = np.flatnonzero(items == name)
        chosen = rng.choice(members, size=min(len(members), max(1, each // 24)), replace=False)
        colours, inside = shrunk(views[chosen], scale)
        for picture, mask in zip(colours, inside, strict=True):
            for y, x in rng.integers(0, len(mask) - size + 1, size=(-(-each // len(chosen)), 2)):
                if mask[y : y + size, x : x + size].all():
                    expected.append(picture[y : y + size, x : x + size].ravel())
    assert len(found) > 20
    assert np.array_equal(found, np.array(expected))


def pooled_in_numpy(view: np.ndarray, scale: PatchScale, dictionary: Dictionary) -> np.ndarray:
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
