"""Statistics add exactly, profiles and windows refuse contradictions, the stability index means what it says."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import BundleError, MessageError
from models.histogram import Histogram
from models.profile import (
    BINS,
    FeatureCounter,
    Profile,
    build_profile,
    feature_names,
    item_features,
    parse_profile,
    stability_index,
)
from models.windows import Window, merge

NAMES = feature_names(5)


def reference(seed: int = 1, items: int = 800) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(items, len(NAMES))).astype(np.float32)


def window_of(features: np.ndarray, profile: Profile, **changes: object) -> Window:
    counter = FeatureCounter(profile)
    for row in features:
        counter.add(row)
    counts, nulls, _ = counter.take()
    n = len(features)
    fields = {
        "started_ms": 1000,
        "duration_ms": 10_000,
        "bundle": "ab" * 32,
        "items": n,
        "classes": {"sound": n} if n else {},
        "outlets": {"pass": n} if n else {},
        "lanes": (n, 0),
        "features": counts.astype("<u4").tobytes(),
        "nulls": nulls,
    }
    return Window(**(fields | changes))


@given(st.lists(st.floats(1e-3, 1e6), max_size=60), st.lists(st.floats(1e-3, 1e6), max_size=60))
def test_histograms_add_exactly_in_any_order(a: list[float], b: list[float]) -> None:
    one, two, whole = Histogram(), Histogram(), Histogram()
    for value in a:
        one.add(value)
        whole.add(value)
    for value in b:
        two.add(value)
        whole.add(value)
    assert one.merged(two) == two.merged(one) == whole
    assert whole.count == len(a) + len(b)


def test_histogram_quantiles_are_within_the_promised_error() -> None:
    values = np.random.default_rng(3).lognormal(2.0, 0.8, 20_000)
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    for q in (0.01, 0.5, 0.99):
        assert histogram.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.045)


def test_histogram_counts_what_has_no_logarithm() -> None:
    histogram = Histogram()
    for value in (0.0, -1.0, float("nan"), float("inf"), 5e-324, 1e300):
        histogram.add(value)
    assert histogram.count == 6
    assert histogram.zero == 4
    assert np.isnan(Histogram().quantile(0.5))


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 1000))
def test_windows_add_to_the_window_of_the_whole(first: int, second: int, seed: int) -> None:
    profile = build_profile(reference(), NAMES, {"sound": 800})
    features = reference(seed, first + second)
    features[::7, 3] = np.nan
    a, b = window_of(features[:first], profile), window_of(features[first:], profile)
    whole = window_of(features, profile)
    added = merge(a, b)
    assert added.features == whole.features
    assert (added.items, added.nulls, added.classes, added.lanes) == (
        whole.items,
        whole.nulls,
        whole.classes,
        whole.lanes,
    )
    added.check()


def test_windows_of_different_bundles_do_not_add() -> None:
    profile = build_profile(reference(), NAMES, {})
    a = window_of(reference(2, 10), profile)
    b = window_of(reference(3, 10), profile, bundle="cd" * 32)
    with pytest.raises(MessageError) as caught:
        merge(a, b)
    assert caught.value.code == "window.not_mergeable"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_window_without_features_adds_items_whose_features_are_not_known(swapped: bool) -> None:
    profile = build_profile(reference(), NAMES, {"sound": 800})
    seen = reference(2, 1)
    seen[0, 1] = np.nan
    full = window_of(seen, profile)
    bare = msgspec.structs.replace(window_of(reference(3, 3), profile), features=b"", nulls=())
    merged = merge(bare, full) if swapped else merge(full, bare)
    merged.check()
    assert merged.items == 4
    assert merged.nulls == (3, 4, *(3,) * (len(NAMES) - 2))


@pytest.mark.parametrize(
    "change",
    [
        {"items": 11},
        {"classes": {"sound": 3}},
        {"outlets": {}},
        {"lanes": (1,)},
        {"features": b"123"},
        {"nulls": (0,)},
    ],
)
def test_a_window_whose_counts_contradict_each_other_is_refused(change: dict[str, object]) -> None:
    window = window_of(reference(2, 10), build_profile(reference(), NAMES, {}))
    window.check()
    with pytest.raises(MessageError) as caught:
        msgspec.structs.replace(window, **change).check()
    assert caught.value.code == "window.inconsistent"


def test_a_window_is_small_on_the_wire() -> None:
    window = window_of(reference(2, 180), build_profile(reference(), NAMES, {}))
    assert len(msgspec.msgpack.encode(window)) < 2048


def test_bins_hold_equal_shares_of_the_reference() -> None:
    profile = build_profile(reference(items=1600), NAMES, {})
    assert profile.count_array().min() >= 95
    assert profile.count_array().max() <= 105


def test_a_feature_that_is_never_known_has_an_empty_row() -> None:
    features = reference()
    features[:, 2] = np.nan
    profile = build_profile(features, NAMES, {})
    profile.check()
    assert profile.count_array()[2].sum() == 0
    counter = FeatureCounter(profile)
    counter.add(features[0])
    counts, nulls, _ = counter.take()
    assert nulls[2] == 1
    assert counts[2].sum() == 0


def test_stability_index_is_near_zero_without_drift_and_grows_with_it() -> None:
    profile = build_profile(reference(items=3000), NAMES, {})
    same = window_of(reference(9, 600), profile).feature_counts()
    moved = window_of(reference(9, 600) + np.float32(0.8), profile).feature_counts()
    calm, drifted = stability_index(profile.count_array(), same), stability_index(profile.count_array(), moved)
    assert calm.max() < 0.05
    assert drifted.min() > 0.3
    nothing = stability_index(profile.count_array(), np.zeros_like(same))
    assert np.isnan(nothing).all()


def test_profile_round_trip_and_refusals() -> None:
    profile = build_profile(reference(), NAMES, {"sound": 700, "rot": 100})
    data = msgspec.msgpack.encode(profile)
    assert parse_profile(data) == profile
    with pytest.raises(BundleError) as caught:
        parse_profile(data[:-5])
    assert caught.value.code == "profile.malformed"
    broken = msgspec.structs.replace(profile, edges=profile.edges[1:])
    with pytest.raises(BundleError) as caught:
        parse_profile(msgspec.msgpack.encode(broken))
    assert caught.value.code == "profile.inconsistent"


def test_item_features_are_means_over_views_with_log_odds_and_entropy() -> None:
    views = np.stack([np.full(9, 1.0), np.full(9, 3.0)]).astype(np.float32)
    embedding = np.array([[0.0, 2.0], [4.0, 2.0]], np.float32)
    features = item_features(views, embedding, (0.5, 0.5), 0.5)
    assert features[:9] == pytest.approx(2.0)
    assert features[9] == pytest.approx(0.0)
    assert features[10] == pytest.approx(np.log(2.0))
    assert features[11:] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("index", [-241, 240, 20_000])
def test_a_bucket_that_no_value_falls_into_is_refused(index: int) -> None:
    strange = Window(started_ms=0, duration_ms=1, bundle="a" * 64, latency_ms=Histogram(buckets={1: 3, index: 1}))
    with pytest.raises(MessageError, match="buckets from -240 to 239"):
        strange.check()
    edges = Histogram()
    for value in (1e-300, 1e300):
        edges.add(value)
    Window(started_ms=0, duration_ms=1, bundle="a" * 64, latency_ms=edges).check()
    assert edges.share_above(50.0) == 0.5


def test_windows_that_would_count_more_than_fits_do_not_add() -> None:
    many = 2**32 - 1
    counts = np.zeros((1, BINS), "<u4")
    counts[0, 0] = many
    one = Window(started_ms=0, duration_ms=1, bundle="a" * 64, items=many, features=counts.tobytes(), nulls=(0,))
    one.feature_counts()
    with pytest.raises(MessageError, match="more than fits"):
        merge(one, one)
