"""The loop: what lines report becomes alarms, once, over restarts and lost leads; odd data hide no other line."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlmodel import select

from control_plane.alarms.costs import Prices, Traffic, cost_of_waiting
from control_plane.alarms.policies import settle
from control_plane.alarms.raising import Look, unannounced
from control_plane.alarms.reported_faults import ReportedFaults
from control_plane.alarms.watcher import LEASE, Watch, Watcher
from control_plane.config import AlarmPolicyConfig, AlarmsConfig
from control_plane.database.engine import reading, writing
from control_plane.database.leases import take_lease
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.alarms import Alarm, AlarmDecision, AlarmWatch, DecisionState
from control_plane.database.tables.columns import utc_now
from control_plane.detection.finding import Cause, Detector, Finding, LineSum, Severity
from control_plane.services import Services
from models.errors import ConflictError, InputError, MessageError
from models.messages import encode
from models.recipe import Recipe, Terms
from models.topics import Channel
from tests.control_plane.alarms.test_raising import NOW, finding
from tests.control_plane.fleet.test_fleet import batch, reported, say, window
from tests.simulators.processes import wait_until

CONFIG = AlarmsConfig(hold_s=60.0)
WEAK = {"0/reject/fired": 100, "0/reject/confirmed": 60, "0/reject/missed": 40}


class Sums:
    """A watch that remembers what it was given, and finds what a test says."""

    def __init__(self, state: bytes = b"", present: Sequence[Finding] = ()) -> None:
        self.seen: list[tuple[str, int]] = msgspec.msgpack.decode(state, type=list[tuple[str, int]]) if state else []
        self.present = list(present)

    def step(self, now_s: float, sums: Sequence[LineSum]) -> list[Finding]:
        del now_s
        for one in sums:
            if one.window.lot == "poison":
                raise ZeroDivisionError
            self.seen.append((one.line, one.window.items))
        return self.present

    def dump(self) -> bytes:
        return msgspec.msgpack.encode(self.seen)


def watcher(
    services: Services, watch: Callable[[bytes], Watch] = ReportedFaults, name: str = "one", **changes: Any
) -> Watcher:
    return Watcher(
        services.engine,
        name,
        msgspec.structs.replace(CONFIG, **changes),
        {"test": watch},
        recipe=lambda _: None,
        announce=unannounced,
        levels=0,
        counters=services.counters,
    )


def alarms(services: Services) -> list[Alarm]:
    with reading(services.engine) as session:
        return list(session.exec(select(Alarm).order_by(Alarm.id)))


def test_a_camera_that_a_line_calls_frozen_becomes_an_alarm_of_that_line(services: Services) -> None:
    say(services, Channel.REPORTED, encode(reported(labels={"site": "north"})))
    bad = window(camera={"camera.frozen": 1, "blind_ms": 8000})
    say(services, Channel.BATCH, batch(window(), bad))
    say(services, Channel.BATCH, batch(window()), "line-2")
    watcher(services).look(utc_now())
    [alarm] = alarms(services)
    assert (alarm.line, alarm.site, alarm.cause, alarm.severity) == ("line-1", "north", "frozen", "critical")
    assert alarm.effect == pytest.approx(0.4)
    assert alarm.evidence["faults"] == {"camera.frozen": 1}
    assert "Look at the camera of line-1" in alarm.action


def test_an_ejector_whose_shots_have_no_effect_becomes_an_alarm_of_its_lane(services: Services) -> None:
    say(services, Channel.BATCH, batch(window(ejectors=WEAK, lot="B-1")))
    watcher(services).look(utc_now())
    [alarm] = alarms(services)
    assert (alarm.key, alarm.lane, alarm.severity) == ("lane/line-1:0/weak-ejector", 0, "critical")
    assert alarm.interval[0] < 0.4 < alarm.interval[1]
    assert alarm.lots == ["B-1"]


def test_a_few_missed_shots_are_no_alarm(services: Services) -> None:
    say(services, Channel.BATCH, batch(window(ejectors={"0/reject/confirmed": 97, "0/reject/missed": 3})))
    assert watcher(services).look(utc_now()) == 0


def test_each_window_is_taken_once_also_by_the_next_process(services: Services) -> None:
    one = watcher(services, Sums)
    now = utc_now()
    for number in range(3):
        say(services, Channel.BATCH, batch(window(items=number + 1), first=number))
        say(services, Channel.BATCH, batch(window(items=number + 1), first=number))
        one.look(now + timedelta(seconds=number))
    one.stop()  # never started: keeps nothing
    one._save(one._fence or 0, now)
    say(services, Channel.BATCH, batch(window(items=4), first=3))
    two = watcher(services, Sums, "two")
    two.look(now + timedelta(seconds=40))
    watch = two._watches["test"]
    assert isinstance(watch, Sums)
    assert watch.seen == [("line-1", 1), ("line-1", 2), ("line-1", 3), ("line-1", 4)]


def test_a_process_that_was_overtaken_writes_nothing(services: Services) -> None:
    one = watcher(services, lambda _: Sums(present=[finding()]))
    now = utc_now()
    one.look(now)
    assert len(alarms(services)) == 1
    with writing(services.engine) as session:
        assert take_lease(session, LEASE, "two", seconds=30, now=now + timedelta(seconds=31)) == 2
        session.commit()
    one._fence = 1  # it slept within a look
    assert not one._apply(looked(now), 1)
    assert one.look(now + timedelta(seconds=32)) == 0
    assert not one.leading


def looked(now: datetime) -> Look:
    return Look([finding("line-9")], frozenset(), now)


def test_a_look_that_failed_is_taken_again_from_the_kept_state(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, now = watcher(services, Sums), utc_now()
    say(services, Channel.BATCH, batch(window(items=1)))
    one.look(now)
    say(services, Channel.BATCH, batch(window(items=2), first=1))
    with monkeypatch.context() as patch:
        patch.setattr(one.register, "apply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.look(now + timedelta(seconds=1))
    one.look(now + timedelta(seconds=2))
    watch = one._watches["test"]
    assert isinstance(watch, Sums)
    assert watch.seen == [("line-1", 1), ("line-1", 2)]


def test_a_sum_that_breaks_a_watch_hides_no_other_line(services: Services) -> None:
    say(services, Channel.BATCH, batch(window(lot="poison")))
    say(services, Channel.BATCH, batch(window(items=5)), "line-2")
    one = watcher(services, lambda _: Sums(present=[finding("line-2")]))
    assert one.look(utc_now()) == 1
    watch = one._watches["test"]
    assert isinstance(watch, Sums)
    assert ("line-2", 5) in watch.seen
    assert (services.counters["alarm_watch_failed"], services.counters["alarm_sums_refused"]) == (1, 1)


def test_a_window_that_contradicts_itself_is_counted_and_used_for_nothing(services: Services) -> None:
    say(services, Channel.BATCH, batch(window(items=4, classes={"sound": 1}, camera={"camera.frozen": 9})))
    assert watcher(services).look(utc_now()) == 0
    assert services.counters["alarm_windows_refused"] == 1


def test_a_kept_state_that_cannot_be_read_begins_afresh(services: Services) -> None:
    with writing(services.engine) as session:
        session.add(AlarmWatch(name="test", state=b"\xc1rubbish", updated_at=NOW))
        session.add(AlarmWatch(name="reader", state=b"\xc1", updated_at=NOW))
        session.commit()
    say(services, Channel.BATCH, batch(window(ejectors=WEAK)))
    assert watcher(services).look(utc_now()) == 1
    assert services.counters["alarm_state_refused"] == 2
    with pytest.raises(MessageError):
        ReportedFaults(b"\xc1")


def test_what_lines_report_goes_over_a_restart() -> None:
    one = ReportedFaults()
    total = LineSum(site="n", line="line-1", window=window(ejectors=WEAK))
    found = one.step(1000.0, [total])
    assert [f.cause for f in ReportedFaults(one.dump()).step(1005.0, [])] == [f.cause for f in found]
    assert ReportedFaults(one.dump()).step(1400.0, []) == []


# -- what it costs --------------------------------------------------------------------------------------------------


def recipe(**terms: Any) -> Recipe:
    return Recipe(classes=("sound", "rot"), good_class="sound", terms=Terms(**terms))


def traffic(rejected_now: int, usual: int = 10) -> Traffic:
    found = Traffic()
    for is_usual, rejected in ((True, usual), (False, rejected_now)):
        for _ in range(60):
            one = window(items=100, outlets={"pass": 100 - rejected, "reject": rejected})
            found.add(one, frozenset({"pass"}), usual=is_usual)
    return found


def test_the_cost_of_waiting_is_items_times_harm_times_price() -> None:
    prices = Prices.of(recipe(escaped=2.0, prices={"sound": 0.5, "rot": 0.1}, wasted=0.2), "", "")
    assert prices is not None
    assert (prices.escaped, prices.wasted) == (2.0, pytest.approx(0.6))
    said = finding(evidence={"harm": {"escaped": 0.01, "wasted": 0.05}})
    assert cost_of_waiting(said, prices, traffic(10))["per_h"] == pytest.approx(36_000 * (0.02 + 0.03), rel=0.01)
    dirty = cost_of_waiting(finding(), prices, traffic(30))
    assert dirty["per_h"] == pytest.approx(36_000 * 0.2 * 0.6, rel=0.05)
    assert dirty["basis"].startswith("at most: 29.9% of the items are rejected, 10.0% are usual")
    weak = finding(detector=Detector.EJECTOR, cause=Cause.WEAK_EJECTOR, effect=0.5)
    assert cost_of_waiting(weak, prices, traffic(10))["per_h"] == pytest.approx(36_000 * 0.05 * 2.0, rel=0.01)


def test_without_prices_without_traffic_or_for_another_crop_no_cost_is_said() -> None:
    assert Prices.of(recipe(), "", "") is None
    prices = Prices.of(recipe(escaped=1.0), "", "")
    assert cost_of_waiting(finding(), None, traffic(30)) == {}
    assert cost_of_waiting(finding(), prices, Traffic()) == {}
    assert cost_of_waiting(finding(cause=Cause.PRIOR_SHIFT), prices, traffic(30)) == {}
    hostile = finding(evidence={"harm": {"escaped": float("nan"), "wasted": -3}})
    assert cost_of_waiting(hostile, prices, traffic(30))["per_h"] == 0.0


# -- what it may start ----------------------------------------------------------------------------------------------


def policy(**changes: Any) -> AlarmPolicyConfig:
    values = {"cause": "covariate-shift", "request": "review-queue", "items": 100, "budget_items_per_day": 250}
    return AlarmPolicyConfig(**(values | changes))


def raised(services: Services, now: Any, *findings: Finding, policies: tuple[AlarmPolicyConfig, ...]) -> None:
    one = watcher(services, lambda _: Sums(present=findings), hold_s=0.0, policies=policies)
    one.look(now)


def decisions(services: Services) -> list[AlarmDecision]:
    with reading(services.engine) as session:
        return list(session.exec(select(AlarmDecision).order_by(AlarmDecision.id)))


def shift(line: str, **changes: Any) -> Finding:
    return finding(line, Cause.COVARIATE_SHIFT, detector=Detector.COVARIATE, **changes)


def test_a_policy_asks_once_within_its_budget_and_says_why_not_beyond(services: Services) -> None:
    now = utc_now()
    raised(services, now, *[shift(f"line-{n}") for n in (1, 2, 3)], policies=(policy(),))
    found = decisions(services)
    assert [d.state for d in found] == [DecisionState.AWAITING_CONFIRMATION] * 2 + [DecisionState.WITHHELD]
    assert found[2].reason == "budget: 200 of 250 items of the last 24 h are asked for"
    assert found[0].details == {
        "cause": "covariate-shift",
        "site": "north",
        "line": "line-1",
        "lane": None,
        "lots": [],
        "items": 100,
    }


def test_within_the_cool_down_a_worse_alarm_asks_nothing_more(services: Services) -> None:
    now = utc_now()
    free = (policy(confirmation=False, budget_items_per_day=1000),)
    raised(services, now, shift("line-1"), policies=free)
    raised(services, now + timedelta(hours=1), shift("line-1", severity=Severity.CRITICAL), policies=free)
    first, second = decisions(services)
    assert (first.state, second.state) == (DecisionState.REQUESTED, DecisionState.WITHHELD)
    assert second.reason.startswith("cool-down: asked at")


def test_no_retraining_is_proposed_from_a_dirty_lens(services: Services) -> None:
    ask = (policy(request="retraining-proposal"),)
    raised(services, utc_now(), finding(), shift("line-1"), shift("line-2"), policies=ask)
    first, second = decisions(services)
    assert first.state is DecisionState.WITHHELD
    assert "(camera-dirty) is open: these pictures must train no model" in first.reason
    assert second.state is DecisionState.AWAITING_CONFIRMATION


def test_a_request_is_confirmed_once_by_a_person(services: Services) -> None:
    raised(services, utc_now(), shift("line-1"), policies=(policy(),))
    with writing(services.engine) as session:
        for number in (0, 2**30):
            with pytest.raises(InputError):
                settle(session, 1, number, confirm=True, actor="ida", reason="", now=NOW)
        settle(session, 1, 1, confirm=True, actor="ida", reason="", now=NOW)
        with pytest.raises(ConflictError) as caught:
            settle(session, 1, 1, confirm=False, actor="omar", reason="", now=NOW)
        session.commit()
    assert caught.value.code == "decision.settled"
    assert [(d.state, d.decided_by) for d in decisions(services)] == [("requested", "ida")]


def test_the_loop_runs_as_a_thread_and_keeps_its_state_when_it_stops(services: Services) -> None:
    say(services, Channel.BATCH, batch(window(ejectors=WEAK)))
    one = watcher(services, period_s=0.1)
    one.start()
    one.wake()
    wait_until(lambda: len(alarms(services)) == 1, what="the alarm")
    one.stop()
    with reading(services.engine) as session:
        assert {row.name for row in session.exec(select(AlarmWatch))} == {"test", "reader"}
        assert session.exec(select(Agent)).one().id == "line-1"
