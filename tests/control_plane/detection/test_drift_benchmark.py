"""The benchmark of detection counts what it says: intervals, episodes, peers that alarm and one that may not."""

import numpy as np
import pytest

from benchmarks.drift import Raised, clopper_pearson
from benchmarks.drift_peers import TUNED, peers
from benchmarks.drift_streams import Fault, Population, Site
from control_plane.detection.finding import Cause, Detector, Finding, Level, Severity


@pytest.fixture(scope="module")
def population() -> Population:
    return Population()


def test_the_interval_of_a_rate_is_the_exact_one() -> None:
    assert clopper_pearson(0, 30.0) == pytest.approx((0.0, 3.6889 / 30.0), abs=1e-4)
    assert clopper_pearson(3, 1.0) == pytest.approx((0.6187, 8.7673), abs=1e-3)


def test_a_condition_counts_once_within_its_refractory_time() -> None:
    finding = Finding(
        detector=Detector.TILE,
        cause=Cause.FLICKER,
        severity=Severity.WARNING,
        level=Level.LINE,
        line="l",
        effect=1.0,
        effect_unit="x",
        action="Look.",
    )
    raised = Raised()
    seen = ((0, [finding]), (60, [finding]), (600, []), (1800, [finding]), (9000, [finding]))
    begun = [len(raised.take(at, present)) for at, present in seen]
    assert begun == [1, 0, 0, 0, 1]


def test_documented_defaults_alarm_on_benign_lots_and_their_benign_maximum_does_not(population: Population) -> None:
    site = Site(population, "s", seed=3, items_per_s=1.5, with_lanes=False)
    spans = [(site.now_s, site.span(300.0)) for _ in range(24)]
    first = peers(population.profile)
    for peer in first:
        for now_s, sums in spans:
            peer.take(now_s, sums)
    by_name = {peer.name: peer for peer in first}
    assert by_name["always alarms"].alarms == 8
    assert by_name["PSI > 0.2, 5 min"].alarms > 0
    assert by_name["KS p < 0.05, 5 min"].alarms == 8
    again = peers(population.profile, {peer.name: peer.largest for peer in first})
    for peer in again:
        for now_s, sums in spans:
            peer.take(now_s, sums)
    assert [peer.alarms for peer in again if peer.name.endswith(TUNED)] == [0, 0, 0]


def test_a_fault_touches_its_own_line_and_lane_only(population: Population) -> None:
    def shares(fault: str, row: int) -> np.ndarray:
        site = Site(population, "s", seed=4, fault=Fault(fault, start_s=0.0, lines=(1,)))
        window = site.span(3600.0)[row].window
        return np.array([lane.feature_counts()[0] / lane.items for lane in window.by_lane])

    assert np.abs(shares("lane", 1)[2] - shares("", 1)[2]).max() > 0.03
    assert np.abs(shares("lane", 1)[0] - shares("", 1)[0]).max() < 0.03
    assert np.abs(shares("brightness", 0) - shares("", 0)).max() < 0.03
    assert np.abs(shares("brightness", 1) - shares("", 1)).max() > 0.05
