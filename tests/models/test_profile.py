"""A profile's scalars and varieties: what the training data know is a reference, what they do not is left out."""

import msgspec
import numpy as np
import pytest

from models.errors import BundleError
from models.profile import (
    BINS,
    FeatureCounter,
    Profile,
    build_profile,
    encode_profile,
    feature_names,
    parse_profile,
)

NAMES = feature_names(2)
ITEMS = 400


def made(**changes: object) -> Profile:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(ITEMS, len(NAMES))).astype(np.float32)
    varieties = ["gala"] * 300 + ["russet"] * 70 + [""] * 20 + ["rare"] * 10
    verdicts = ["sound" if k % 4 else "rot" for k in range(ITEMS)]
    features[300:370] += 2.0
    weights = rng.normal(180.0, 20.0, ITEMS)
    weights[::10] = np.nan
    lengths = np.full(ITEMS, np.nan)
    lengths[:31] = 75.0
    arguments: dict[str, object] = {
        "scalars": {"weight_g": weights, "length_mm": lengths},
        "varieties": varieties,
        "verdicts": verdicts,
    }
    return build_profile(features, NAMES, {"sound": 300, "rot": 100}, **(arguments | changes))  # type: ignore[arg-type]


def test_a_measured_scalar_gets_sixteen_bins_of_equal_shares_and_one_hardly_measured_none() -> None:
    profile = made()
    assert set(profile.scalars) == {"weight_g"}
    bins = profile.scalars["weight_g"]
    assert len(bins.edges) == BINS - 1
    assert sum(bins.counts) == 360
    assert max(bins.counts) - min(bins.counts) <= 2


def test_each_variety_with_enough_items_has_its_own_reference_in_the_bins_of_the_whole() -> None:
    profile = made()
    assert {name: found.items for name, found in profile.varieties.items()} == {"gala": 300, "russet": 70}
    gala, russet = profile.varieties["gala"], profile.varieties["russet"]
    assert gala.count_array().sum(axis=1).tolist() == [300] * len(NAMES)
    assert russet.count_array()[0, 8:].sum() > 60, "its features lie higher"
    assert sum(russet.class_counts.values()) == 70


def test_a_profile_comes_back_and_has_no_key_for_what_is_not_known() -> None:
    profile = made()
    assert parse_profile(encode_profile(profile)) == profile
    plain = made(scalars={}, varieties=(), verdicts=())
    assert parse_profile(encode_profile(plain)) == plain
    assert list(msgspec.msgpack.decode(encode_profile(plain))) == [
        "schema_version",
        "features",
        "edges",
        "counts",
        "class_counts",
        "items",
        "view_defect",
    ], "the bytes it always had: agents that know no scalars read it"


@pytest.mark.parametrize(
    "change",
    [
        {"scalars": {"weight_g": {"edges": [1.0] * 14, "counts": [1] * 16}}},
        {"scalars": {"weight_g": {"edges": [1.0] * 15, "counts": [1] * 15}}},
        {"scalars": {"weight_g": {"edges": [2.0, *[1.0] * 14], "counts": [1] * 16}}},
        {"scalars": {"weight_g": {"edges": [float("nan")] * 15, "counts": [1] * 16}}},
        {"varieties": {"gala": {"items": 3, "counts": [[1] * 16], "class_counts": {}}}},
        {"varieties": {"gala": {"items": 3, "counts": [[1] * 15] * len(NAMES), "class_counts": {}}}},
    ],
)
def test_bins_that_contradict_themselves_are_refused(change: dict[str, object]) -> None:
    values = msgspec.msgpack.decode(encode_profile(made())) | change
    with pytest.raises(BundleError) as caught:
        parse_profile(msgspec.msgpack.encode(values))
    assert caught.value.code == "profile.inconsistent"


def test_an_item_is_counted_in_the_bin_of_its_weight_as_the_reference_was() -> None:
    profile = made()
    counter = FeatureCounter(profile)
    row = np.zeros(len(NAMES), np.float32)
    edges = profile.scalars["weight_g"].edges
    for weight in (edges[0] - 1.0, edges[0], edges[14] + 1.0, None, float("nan")):
        counter.add(row, {"weight_g": weight, "length_mm": 75.0})
    counter.add(row)
    _, nulls, scalars = counter.take()
    assert set(nulls) == {0}
    assert scalars == {"weight_g": (2, *[0] * 14, 1)}
    assert counter.take()[2] == {}, "it starts anew"
