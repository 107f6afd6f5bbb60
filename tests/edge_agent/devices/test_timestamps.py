"""Times of exposures: a hole keeps its time, and timestamps that cannot be are replaced and counted."""

import math

import pytest

from edge_agent.devices.timestamps import CameraClock, FileClock

P = 0.04


def placed(stamps: list[float]) -> tuple[list[float], int]:
    clock = FileClock(P)
    ahead = [*stamps[1:], None]
    return [clock.place(stamp, following) for stamp, following in zip(stamps, ahead, strict=True)], clock.mended


@pytest.mark.parametrize(
    ("stamps", "expected", "mended"),
    [
        pytest.param([0, 1, 2, 3], [0, 1, 2, 3], 0, id="steady"),
        pytest.param([5, 6, 7], [0, 1, 2], 0, id="does-not-begin-at-0"),
        pytest.param([0, 1, 4, 5, 7], [0, 1, 4, 5, 7], 0, id="holes-keep-their-time"),
        pytest.param([0, 7, 8, 9], [0, 7, 8, 9], 0, id="hole-behind-the-first-frame"),
        pytest.param([0, 0.7, 2.1, 2.6, 4.2], [0, 0.7, 2.1, 2.6, 4.2], 0, id="variable-rate"),
        pytest.param([0, 1, 1, 3, 4], [0, 1, 2, 3, 4], 1, id="doubled-and-then-a-gap"),
        pytest.param([0, 0, 2, 2, 4, 4], [0, 1, 2, 3, 4, 5], 3, id="stamps-in-pairs"),
        pytest.param([0, 1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 3, 4, 5], 1, id="an-extra-frame-of-the-same-moment"),
        pytest.param([0, 1, 1, 1, 4, 5], [0, 1, 2, 3, 4, 5], 2, id="three-of-one-stamp"),
        pytest.param([10, 11, 12, 2, 3, 4], [0, 1, 2, 3, 4, 5], 1, id="jumps-back-and-goes-on"),
        pytest.param([10, 11, 12, 1, 14, 15], [0, 1, 2, 3, 4, 5], 1, id="one-stamp-too-early"),
        pytest.param([0, 1, 2, 900, 4, 5], [0, 1, 2, 3, 4, 5], 1, id="one-stamp-too-late"),
        pytest.param([0, 1, 100_000, 100_001], [0, 1, 2, 3], 1, id="a-jump-of-an-hour-is-another-clock"),
        pytest.param([0, 0, 0, 0], [0, 1, 2, 3], 3, id="no-stamps-at-all"),
        pytest.param([math.nan, math.nan, math.nan], [0, 1, 2], 2, id="no-numbers"),
    ],
)
def test_file_times(stamps: list[float], expected: list[float], mended: int) -> None:
    found, count = placed([stamp * P for stamp in stamps])
    assert found == pytest.approx([at * P for at in expected])
    assert count == mended


def test_a_file_that_states_no_number_at_all_runs_at_its_nominal_rate() -> None:
    clock = FileClock(P)
    times = [clock.place(math.nan, math.nan) for _ in range(4)]
    assert times == pytest.approx([0.0, P, 2 * P, 3 * P])


def test_the_cameras_own_clock_takes_the_jitter_of_a_network_out() -> None:
    clock = CameraClock()
    delays = [0.01, 0.03, 0.02, 0.045, 0.03, 0.04] * 60
    found = [clock.exposure_s(100.0 + k * P, 5.0 + k * P + delay) for k, delay in enumerate(delays)]
    assert clock.believed
    late = found[120:]
    assert late == pytest.approx([5.01 + k * P for k in range(120, len(delays))], abs=0.003)
    assert found == sorted(found)


def test_time_stamps_that_run_at_another_pace_are_not_used() -> None:
    for pace in (0.8, 1.3):
        clock = CameraClock()
        arrivals = [5.0 + k * P for k in range(400)]
        found = [clock.exposure_s(1.0 + k * P * pace, arrived) for k, arrived in enumerate(arrivals)]
        assert not clock.believed
        assert max(abs(at - arrived) for at, arrived in zip(found, arrivals, strict=True)) <= 0.25


def test_a_camera_that_restarts_its_clock_or_has_none_is_taken_at_arrival() -> None:
    clock = CameraClock()
    stamps = [100.0 + k * P for k in range(120)] + [1.0 + k * P for k in range(40)] + [0.0] * 5
    arrivals = [5.0 + k * P for k in range(len(stamps))]
    found = [clock.exposure_s(stamp, arrived) for stamp, arrived in zip(stamps, arrivals, strict=True)]
    assert found == pytest.approx(arrivals, abs=1.0e-3)
    assert not clock.believed
