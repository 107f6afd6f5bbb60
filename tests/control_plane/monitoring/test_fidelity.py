"""What is missing, late, repeated or impossible is counted by hour, and a wrong clock is known as such."""

from datetime import UTC, datetime, timedelta

import pytest

from control_plane.database.engine import reading
from control_plane.fleet.intake import Message
from control_plane.monitoring.fidelity import Fidelity, fidelity_between, fidelity_of, impossible
from control_plane.services import Services
from models.messages import Event, encode
from models.topics import Channel
from models.windows import Window
from tests.control_plane.fleet.test_fleet import batch, reported, window

START = datetime(2026, 3, 14, 10, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def ten_seconds(number: int, clock_ms: int = 0, **changes: object) -> Window:
    """Window `number` of a line that judges 10 items in each."""
    fields = {"started_ms": ms(at(10 * number)) + clock_ms, "lifetime_items": 10 * (number + 1), "views": 60}
    return window(10, **(fields | changes))


def send(services: Services, number: int, payload: object, delay_s: float = 0.5) -> None:
    """Sends what ended with window `number`, so much later."""
    message = Message(
        0, at(10 * number + 10 + delay_s), "line-1", Channel.BATCH, batch(payload, first=number), retained=False
    )
    services.ingest.store([message])


def report(services: Services, seconds: float, clock_ms: int = 0, lag_s: float = 0.05) -> None:
    said = encode(reported(at_ms=ms(at(seconds)) + clock_ms))
    services.ingest.store([Message(0, at(seconds + lag_s), "line-1", Channel.REPORTED, said, retained=False)])


def hours(services: Services) -> list[Fidelity]:
    with reading(services.engine) as session:
        return fidelity_of(session, "line-1", START, START + timedelta(hours=5))


def test_all_that_was_sent_is_accounted_for(services: Services) -> None:
    report(services, 0)
    for number in range(12):
        send(services, number, ten_seconds(number))
    (hour,) = hours(services)
    assert (hour.state, hour.complete, hour.timely, hour.consistent, hour.accurate) == ("green", 1, 1, 1, 1)
    assert (hour.windows, hour.items, hour.items_accounted, hour.missing_items) == (12, 120, 1.0, 0)
    assert hour.clock_offset_ms == -50


def test_lost_windows_are_missing_records_and_missing_items(services: Services) -> None:
    for number in range(100):
        if number not in {40, 41}:
            send(services, number, ten_seconds(number))
    (hour,) = hours(services)
    assert (hour.missing_records, hour.missing_items) == (2, 20)
    assert hour.items_accounted == pytest.approx(0.98)
    assert hour.state == "amber"


def test_a_gap_between_two_hours_counts_for_the_later_one_however_long_the_pause(services: Services) -> None:
    for number in (0, 1, 1300, 1301):
        send(services, number, ten_seconds(number))
    first, second = hours(services)
    assert (first.missing_records, second.missing_records, second.missing_items) == (0, 1298, 12_980)
    with reading(services.engine) as session:
        later = fidelity_of(session, "line-1", START + timedelta(hours=1), START + timedelta(hours=5))
        both = fidelity_between(session, "line-1", START, START + timedelta(hours=5))
    assert later == [second]
    assert (both.items, both.missing_items) == (40, 12_980)


def test_late_back_filled_and_repeated_windows_heal_their_own_hour(services: Services) -> None:
    report(services, 0)
    for number in range(350, 365):
        if number not in {355, 356}:
            send(services, number, ten_seconds(number))
    assert hours(services)[0].missing_records == 2
    send(services, 355, ten_seconds(355), delay_s=40)
    send(services, 356, ten_seconds(356), delay_s=4000)
    for _ in range(3):
        send(services, 357, ten_seconds(357), delay_s=60)
    first, second = hours(services)
    assert (first.windows, first.missing_records, first.late, first.backfilled, first.duplicates) == (10, 0, 2, 1, 3)
    assert (second.windows, second.missing_records, second.late) == (5, 0, 0)
    assert first.timely == pytest.approx(0.8)


def test_an_event_takes_a_number_and_is_no_missing_record(services: Services) -> None:
    send(services, 0, ten_seconds(0))
    send(services, 1, Event(at_ms=ms(at(20)), code="x.y"))
    send(services, 2, ten_seconds(2, lifetime_items=20))
    (hour,) = hours(services)
    assert (hour.records, hour.missing_records, hour.missing_items, hour.windows) == (3, 0, 0, 2)


@pytest.mark.parametrize("clock_ms", [-30_000, 25_000])
def test_a_clock_that_is_off_is_estimated_and_makes_no_window_late(services: Services, clock_ms: int) -> None:
    report(services, 0, clock_ms)
    for number in range(6, 12):
        send(services, number, ten_seconds(number, clock_ms))
    (hour,) = hours(services)
    assert hour.clock_offset_ms == clock_ms - 50
    assert (hour.late, hour.timely, hour.by_arrival) == (0, 1.0, 0)


def test_a_clock_that_jumps_says_nothing_of_missing_items(services: Services) -> None:
    for number in range(6):
        send(services, number, ten_seconds(number, clock_ms=-(10**12) if number > 2 else 0))
    (hour,) = hours(services)
    assert (hour.windows, hour.by_arrival, hour.missing_records, hour.missing_items) == (6, 3, 0, 0)


def test_a_box_set_up_anew_counts_from_the_start_and_nothing_is_missing(services: Services) -> None:
    for number in range(3):
        send(services, number, ten_seconds(number, lifetime_items=1_000_000 + 10 * number))
    send(services, 400, ten_seconds(400, lifetime_items=10))
    assert [hour.missing_items for hour in hours(services)] == [0, 0]


def test_contradictions_and_impossible_values_are_told_apart(services: Services) -> None:
    report(services, 0)
    send(services, 0, ten_seconds(0, classes={"sound": 3}))
    send(services, 1, ten_seconds(1, duration_ms=0))
    send(services, 2, ten_seconds(2, nulls=(5, 0), features=_features(5, 10)))
    (hour,) = hours(services)
    assert (hour.refused, hour.impossible, hour.state) == (1, 1, "red")
    assert hour.consistent == pytest.approx(2 / 3)
    assert hour.accurate == pytest.approx(0.5)


def _features(*counts: int) -> bytes:
    import numpy as np

    table = np.zeros((len(counts), 16), "<u4")
    table[:, 0] = counts
    return table.tobytes()


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, False),
        ({"duration_ms": 0}, True),
        ({"duration_ms": 10**9}, True),
        ({"items": 10**6, "views": 10**7}, True),
        ({"frames": 10**6}, True),
        ({"views": 9}, True),
        ({"views": 0}, False),
        ({"verdicts_late": 11}, True),
    ],
)
def test_values_no_line_can_have(changes: dict, wrong: bool) -> None:
    import msgspec

    assert impossible(msgspec.structs.replace(ten_seconds(0), **changes)) is wrong


def test_an_agent_that_sent_nothing_has_no_fidelity(services: Services) -> None:
    assert hours(services) == []
    with reading(services.engine) as session:
        assert fidelity_between(session, "line-1", START, START + timedelta(days=1)) is None
