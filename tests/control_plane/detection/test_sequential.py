"""Latches do not flutter, rates keep their run length, states survive as bytes, and damaged ones are refused."""

import math

import msgspec
import numpy as np
import pytest

from control_plane.detection.sequential import Array, Latch, RateWatch, decode_state, encode_state, weight
from models.errors import MessageError


def test_ten_spans_of_ten_seconds_weigh_as_one_of_a_hundred() -> None:
    short = 0.0
    for _ in range(10):
        short += weight(10.0, 330.0) * (1.0 - short)
    assert short == pytest.approx(weight(100.0, 330.0))


def test_a_latch_holds_between_its_release_and_its_threshold() -> None:
    latch = Latch()
    assert [latch.take(r, 10.0 * k) for k, r in enumerate((0.1, 0.9, 1.0, 0.8, 0.71, 0.69, 0.9))] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_the_delay_runs_from_the_last_quiet_step_and_names_the_lots() -> None:
    latch = Latch()
    for k, (ratio, lot) in enumerate(((0.1, "a"), (0.4, "a"), (0.6, "b"), (0.8, "b"), (1.2, "c"))):
        latch.take(ratio, 100.0 * (k + 1), 50, lot)
    assert latch.on
    assert latch.delay_s == 300.0
    assert latch.delay_items == 200, "the chunk of the last quiet step may hold the beginning"
    assert latch.lots == ["a", "b", "c"]


def test_a_rate_of_misses_is_found_and_its_natural_one_is_not() -> None:
    rng = np.random.default_rng(5)
    watch = RateWatch()
    ratios = [watch.take(20, int(rng.binomial(20, 0.01))) for _ in range(20_000)]
    assert max(ratios) < 1.0, "400,000 shots of the usual rate"
    shots = 0
    while watch.take(20, int(rng.binomial(20, 0.15))) < 1.0:
        shots += 20
        assert shots < 1000
    assert shots > 20


def test_a_rate_that_happened_to_be_low_while_it_was_learnt_raises_no_alarm() -> None:
    """Eight failures of 300 are common at 4 %; a usual rate of 2.7 % would be left behind for ever."""
    rng = np.random.default_rng(6)
    watch = RateWatch()
    watch.take(300, 8)
    assert max(watch.take(20, int(rng.binomial(20, 0.04))) for _ in range(20_000)) < 1.0


def test_a_rate_learns_before_it_judges() -> None:
    watch = RateWatch()
    assert watch.take(100, 50) == 0.0
    assert watch.take(0, 0) == 0.0
    watch.take(300, 0)
    assert 0.125 < watch.usual < 0.2, "above what was seen by what 400 trials leave open"


class _State(msgspec.Struct):
    values: Array
    by_name: dict[str, Array]


def test_a_state_with_arrays_survives_as_bytes() -> None:
    state = _State(np.arange(6.0).reshape(2, 3), {"nan": np.array([math.nan, -1.0])})
    back = decode_state(encode_state(state), _State)
    assert (back.values == state.values).all()
    assert np.isnan(back.by_name["nan"][0])
    back.values += 1.0  # it can be written to


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"junk", encode_state(Latch())])
def test_a_damaged_state_is_refused_by_name(damage: bytes) -> None:
    with pytest.raises(MessageError) as error:
        decode_state(damage, _State)
    assert error.value.code == "detection.bad_state"


def test_an_array_whose_shape_does_not_fit_its_bytes_is_refused() -> None:
    data = encode_state(_State(np.zeros(4), {})).replace(b"\x91\x04", b"\x91\x05")
    with pytest.raises(MessageError):
        decode_state(data, _State)
