"""The watch over streams of windows: planted faults are named, restarts change nothing, bad input is counted."""

import msgspec
import pytest

from benchmarks.drift_streams import BUNDLE, Fault, Population, Site
from control_plane.detection.finding import Cause, Finding, LineSum
from control_plane.detection.watch import FORGET_S, MOST_BUNDLES, Review, Watch, WatchState
from models.errors import MessageError
from models.windows import Window


@pytest.fixture(scope="module")
def population() -> Population:
    return Population()


def site_of(population: Population, fault: Fault, items_per_s: float = 1.0) -> Site:
    return Site(population, "north", seed=11, lines=4, items_per_s=items_per_s, fault=fault)


def run(watch: Watch, site: Site, seconds: float, span_s: float = 10.0) -> list[Finding]:
    found: list[Finding] = []
    for _ in range(round(seconds / span_s)):
        sums = site.span(span_s)
        found = watch.step(site.now_s, sums)
    return found


@pytest.mark.parametrize("fault", ["", "dirt", "new defect", "prior shift", "scale drift", "weak valve", "lane"])
def test_the_simulated_windows_contradict_themselves_nowhere(population: Population, fault: str) -> None:
    site = site_of(population, Fault(fault, start_s=0.0))
    for given in [*site.span(10.0), *site.span(600.0)]:
        given.window.check()
        assert given.window.items > 0


@pytest.mark.parametrize(
    ("fault", "cause", "word"),
    [
        ("dirt", Cause.CAMERA_DIRTY, "upper right"),
        ("blur", Cause.CAMERA_BLURRED, "sharp"),
        ("brightness", Cause.LIGHT_LEVEL, "darker"),
        ("colour", Cause.LIGHT_COLOUR, "redder"),
        ("bump", Cause.CAMERA_MOVED, "px to the right"),
    ],
)
def test_a_fault_of_one_camera_is_named_on_that_line_within_two_minutes(
    population: Population, fault: str, cause: Cause, word: str
) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault(fault, start_s=200.0, lines=(2,)))
    assert run(watch, site, 200.0) == []
    found = run(watch, site, 120.0)
    assert [f.key for f in found] == [f"line/north/line-2/{cause}"]
    assert word in found[0].action
    assert found[0].delay_s <= 120.0
    assert found[0].items > 0


def test_a_wiped_lens_has_no_finding_any_more(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("dirt", start_s=100.0, lines=(0,)))
    assert run(watch, site, 200.0) != []
    site.fault = Fault()
    assert run(watch, site, 120.0) == []


def test_a_restart_changes_nothing(population: Population) -> None:
    facts = {BUNDLE: population.facts}
    straight, restarted = Watch(facts), Watch(facts)
    sites = [site_of(population, Fault("dirt", start_s=150.0)) for _ in range(2)]
    for _ in range(30):
        expected = straight.step(sites[0].now_s, sites[0].span(10.0))
        restarted = Watch.load(restarted.dump(), facts)
        assert restarted.step(sites[1].now_s, sites[1].span(10.0)) == expected
    assert expected != []
    assert restarted.dump() == straight.dump()


def test_a_damaged_state_is_refused(population: Population) -> None:
    with pytest.raises(MessageError) as error:
        Watch.load(b"\x81\xa5lines\x01", {})
    assert error.value.code == "detection.bad_state"
    assert Watch.load(Watch({}).dump(), {}).state.lines == {}


def test_a_weak_valve_is_named_with_its_outlet(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("weak valve", start_s=2700.0, size=3.0), items_per_s=8.0)
    assert run(watch, site, 2700.0, 60.0) == []
    found = run(watch, site, 600.0, 60.0)
    assert [(f.cause, f.lane, f.line) for f in found] == [(Cause.WEAK_EJECTOR, 1, "north/line-0")]
    assert "reject" in found[0].action
    low, high = found[0].interval or (0.0, 0.0)
    assert low < found[0].effect < high
    assert 0.3 < found[0].effect < 0.6, "planted are 0.45"


def test_a_variety_the_bundle_never_saw_is_named_at_once(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("announced variety", start_s=60.0, lines=(0, 1, 2, 3)))
    assert run(watch, site, 60.0) == []
    found = run(watch, site, 20.0)
    assert [f.key for f in found] == ["site/north/new-variety"]
    assert "braeburn" in found[0].action


def test_wrong_verdicts_on_reviewed_items_are_concept_drift_when_the_camera_is_sound(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault())
    run(watch, site, 100.0)
    review = Review(line="north/line-1", items=100, wrong=3)
    for _ in range(12):
        assert watch.step(site.now_s, site.span(10.0), [review]) == []
    worse = msgspec.structs.replace(review, wrong=20)
    found = [f for _ in range(6) for f in watch.step(site.now_s, site.span(10.0), [worse])]
    assert {f.key for f in found} == {"line/north/line-1/concept-drift"}


def test_bad_input_is_counted_and_the_rest_goes_on(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("dirt", start_s=0.0, lines=()))
    run(watch, site, 100.0)
    sums = site.span(10.0)
    window = sums[0].window
    broken = [
        msgspec.structs.replace(window, features=b"\x01" * 64, nulls=(0,)),  # does not sum to its items
        msgspec.structs.replace(window, features=window.features[:64], nulls=(0,)),  # one feature only
        msgspec.structs.replace(window, bundle="f" * 64),
        msgspec.structs.replace(window, started_ms=2**50),
        msgspec.structs.replace(window, started_ms=0, duration_ms=0),
        msgspec.structs.replace(window, ejectors={"strange": 4, "x//missed": 9, "0/reject/missed": 3}),
        msgspec.structs.replace(window, truth={"no arrow": 3, "rot>nowhere": 2}),
        Window(started_ms=0, duration_ms=10_000, bundle=""),
    ]
    now_s = site.now_s
    given = [LineSum(site="north", line="north/line-0", window=w) for w in broken]
    watch.step(now_s, given)
    assert watch.counters["inconsistent"] == 1
    assert watch.counters["other_features"] == 1
    assert watch.counters["unknown_bundle"] == 2
    watch.step(now_s, [], [Review(line="nobody", items=1, wrong=0), Review(line="north/line-0", items=1, wrong=2)])
    assert watch.counters["bad_review"] == 2
    assert watch.state.lines["north/line-0"].last_s <= now_s, "a clock in the future does not move the line's time"
    assert run(watch, site, 60.0) == []


def test_a_silent_line_has_no_findings(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("dirt", start_s=100.0))
    assert run(watch, site, 200.0) != []
    assert watch.step(site.now_s + 600.0, []) != []
    assert watch.step(site.now_s + 1000.0, []) == []


def test_a_false_alarm_raises_the_threshold_and_a_repair_starts_from_nothing(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault("dirt", start_s=100.0))
    found = run(watch, site, 200.0)
    watch.false_alarm(found[0])
    assert watch.state.lines["north/line-0"].camera.factor == pytest.approx(1.1)
    watch.relearn("north/line-0")
    assert not watch.state.lines["north/line-0"].camera.ready
    watch.relearn("nobody")
    assert run(watch, site, 200.0) == [], "the lens is as dirty as it is now usual"


def test_a_fresh_watch_knows_that_it_learns(population: Population) -> None:
    watch = Watch({BUNDLE: population.facts})
    site = site_of(population, Fault())
    run(watch, site, 4 * 3600.0, 300.0)
    states = watch.readiness()[BUNDLE]
    assert set(states.values()) == {"learning"}
    assert isinstance(watch.state, WatchState)


def test_lines_that_are_gone_and_bundles_of_long_ago_are_forgotten(population: Population) -> None:
    bundles = [f"{k:064d}" for k in range(MOST_BUNDLES + 3)]
    watch = Watch(dict.fromkeys(bundles, population.facts))
    site = site_of(population, Fault())
    for bundle in bundles:
        sums = site.span(10.0)
        window = msgspec.structs.replace(sums[0].window, bundle=bundle)
        watch.step(site.now_s, [msgspec.structs.replace(sums[0], window=window)])
    assert list(watch.state.used_s) == bundles[3:]
    assert set(watch.state.lanes) == set(bundles[3:])
    assert set(watch.state.lines) == {"north/line-0"}
    watch.step(site.now_s + FORGET_S + 60.0, [])
    assert watch.state.lines == {}
