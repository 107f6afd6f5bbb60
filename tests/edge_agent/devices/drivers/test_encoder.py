"""Encoders of real lines: counters that wrap, devices that go silent, messages that come late or lie."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.devices.drivers.address import parse_address
from edge_agent.devices.drivers.encoder import EncoderOptions, ModbusEncoder, MqttEncoder
from edge_agent.devices.drivers.modbus import RegisterPoller
from edge_agent.devices.drivers.mqtt import SenderClock
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.mqtt import Incoming
from tests.simulators.fake_plc import HOSTILE, Clock, FakePlc, broken, encoder_at


@given(
    st.sampled_from([16, 32]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(-400, 400), min_size=1, max_size=200),
    st.sampled_from([0.1, -0.1]),
)
def test_a_counter_may_wrap_anywhere_and_run_both_ways(bits: int, start: int, steps: list[int], mm: float) -> None:
    encoder = PulseEncoder(mm_per_pulse=mm, bits=bits)
    total, at_s = start, 0.0
    encoder.feed(total % 2**bits, at_s)
    for step in steps:
        total, at_s = total + step, at_s + 0.01
        assert encoder.feed(total % 2**bits, at_s)
    assert encoder.position_mm(at_s) == pytest.approx(sum(steps) * mm, abs=1e-6)
    assert encoder.counters["lost_track"] == 0
    assert encoder.pulses_at(encoder.position_mm(at_s)) == total % 2**bits
    assert encoder.position_of((total + 7) % 2**bits) == pytest.approx((sum(steps) + 7) * mm, abs=1e-6)


def test_between_readings_the_position_is_interpolated_and_after_them_extrapolated_for_a_bounded_time() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100, 200, extrapolate_ms=50.0)
    assert encoder.speed_mm_s() == pytest.approx(1000.0)
    assert encoder.position_mm(clock.now_s) == pytest.approx(20.0)
    assert encoder.position_mm(clock.now_s - 0.005) == pytest.approx(15.0)
    assert encoder.position_mm(clock.now_s - 9.0) == 0.0
    assert encoder.position_mm(clock.now_s + 0.02) == pytest.approx(40.0)
    assert encoder.position_mm(clock.now_s + 60.0) == pytest.approx(70.0)


def test_when_readings_stop_the_belt_counts_as_standing_and_each_stop_is_counted_once() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100, stale_ms=200.0)
    assert not encoder.stale
    clock.now_s += 0.3
    assert encoder.stale
    assert encoder.speed_mm_s() == 0.0
    assert encoder.stale_count == 1
    assert encoder.feed(200, clock.now_s)
    assert not encoder.stale
    assert encoder.stale_count == 1
    assert encoder.position_mm(clock.now_s) == pytest.approx(20.0)


def test_before_the_first_reading_the_belt_stands_at_zero() -> None:
    encoder = PulseEncoder(mm_per_pulse=0.1)
    assert (encoder.position_mm(5.0), encoder.speed_mm_s(), encoder.stale, encoder.stale_count) == (0.0, 0.0, True, 0)
    assert encoder.pulses_at(1.0) is None
    assert encoder.position_of(1) is None


@pytest.mark.parametrize("wrong", [True, None, 1.0, "7", -1, 2**32, 10**400, math.nan, [1], b"1"])
def test_an_invalid_count_is_counted_and_ignored(wrong: object) -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100)
    assert not encoder.feed(wrong, clock.now_s + 0.01)
    assert not encoder.feed(110, math.nan)
    assert encoder.counters["bad_value"] == 2
    assert encoder.position_mm(clock.now_s) == pytest.approx(10.0)


def test_an_old_reading_is_ignored() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100)
    assert not encoder.feed(50, clock.now_s)
    assert not encoder.feed(50, clock.now_s - 0.005)
    assert encoder.counters["not_later"] == 2


def test_a_glitch_moves_nothing() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100)
    assert not encoder.feed(900_000, clock.now_s + 0.01)
    assert encoder.feed(300, clock.now_s + 0.02)
    assert encoder.position_mm(clock.now_s + 0.02) == pytest.approx(30.0)
    assert encoder.counters["lost_track"] == 0


def test_a_restarted_counter_goes_on_from_where_the_belt_was() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 800_000, 800_100)
    assert not encoder.feed(0, clock.now_s + 0.01)
    assert encoder.feed(100, clock.now_s + 0.02)
    assert encoder.counters["lost_track"] == 1
    assert encoder.position_mm(clock.now_s + 0.02) == pytest.approx(30.0)
    assert encoder.feed(200, clock.now_s + 0.03)
    assert encoder.position_mm(clock.now_s + 0.03) == pytest.approx(40.0)
    assert encoder.pulses_at(40.0) == 200


def test_a_gap_in_which_the_counter_may_have_gone_round_loses_track() -> None:
    clock = Clock()
    encoder = encoder_at(clock, 0, 100, bits=16)
    assert encoder.feed(5000, clock.now_s + 5.0)
    assert encoder.counters["lost_track"] == 1
    assert encoder.position_mm(clock.now_s + 5.0) == pytest.approx(110.0)  # 100 ms of the last speed
    assert encoder.pulses_at(10_000.0) is None  # more than half a turn away


@given(st.lists(st.tuples(st.one_of(st.integers(), st.floats(), st.none()), st.floats()), max_size=30))
def test_no_reading_ever_raises_or_breaks_the_position(readings: list[tuple[object, float]]) -> None:
    encoder = PulseEncoder(mm_per_pulse=0.1, bits=16)
    for pulses, at_s in readings:
        encoder.feed(pulses, at_s)
        assert math.isfinite(encoder.position_mm(1.0))
        assert math.isfinite(encoder.speed_mm_s())


def test_a_polled_encoder_takes_the_middle_of_the_request_and_drops_slow_answers() -> None:
    clock = Clock()
    plc = FakePlc(clock)
    options = EncoderOptions(mm_per_pulse=0.1, words="little", stale_ms=50.0)
    encoder = ModbusEncoder(plc, "input", 100, options, clock=clock)
    plc.words[100:102] = [0xFFFF, 0xFFFF]
    plc.takes_s = 0.004
    assert encoder.poller.poll() == pytest.approx(0.006)
    plc.words[100:102] = [9, 0]
    clock.now_s += 0.006
    encoder.poller.poll()
    assert encoder.position_mm(clock.now_s - 0.002) == pytest.approx(1.0)
    plc.takes_s = 0.2
    encoder.poller.poll()
    assert encoder.poller.counters["slow"] == 1
    assert encoder.stale


def test_a_silent_device_is_asked_ever_more_seldom_and_an_answer_ends_that() -> None:
    clock = Clock()
    plc = FakePlc(clock)
    plc.broken = 12
    poller = RegisterPoller(plc, "input", 0, 1, every_s=0.01, deliver=lambda *_: None, clock=clock)
    pauses = [poller.poll() for _ in range(12)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0
    assert poller.poll() == pytest.approx(0.01)


def test_a_reader_that_breaks_does_not_end_the_polling() -> None:
    clock = Clock()
    poller = RegisterPoller(
        FakePlc(clock),
        "input",
        0,
        1,
        every_s=0.01,
        deliver=broken,
        clock=clock,
    )
    poller.poll()
    assert poller.counters["deliver_failed"] == 1


def mqtt_encoder(clock: Clock) -> MqttEncoder:
    url = "mqtt://nowhere/line/encoder?mm_per_pulse=0.1"
    where, options = parse_address(url, EncoderOptions, schemes=("mqtt",))
    return MqttEncoder(*where.broker(options, "encoder"), where.topic(), options, clock=clock)


@pytest.mark.parametrize("payload", HOSTILE)
def test_a_hostile_message_is_counted_and_dropped(payload: bytes) -> None:
    encoder = mqtt_encoder(Clock())
    assert encoder.feeder.take(Incoming("line/encoder", payload))
    assert sum(encoder.feeder.counters.values()) == 1
    assert encoder.stale


def test_delay_on_the_way_does_not_move_the_belt() -> None:
    clock = Clock()
    encoder = mqtt_encoder(clock)
    for k, delay_s in enumerate((0.0, 0.03, 0.0, 0.08)):
        clock.now_s = 100.0 + 0.1 * k + delay_s
        encoder.feeder.take(Incoming("line/encoder", b'{"pulses": %d, "at_ms": %d}' % (1000 * k, 5000 + 100 * k)))
    assert encoder.position_mm(100.3) == pytest.approx(300.0, abs=0.5)
    assert encoder.speed_mm_s() == pytest.approx(1000.0, rel=0.01)
    encoder.feeder.take(Incoming("other", b"{}"))
    assert encoder.feeder.counters["foreign_topic"] == 1


def test_late_messages_are_dropped_until_they_show_that_the_clock_was_set() -> None:
    times = SenderClock(0.2)
    assert times.local_s(1000, 50.0) == pytest.approx(50.0)
    assert times.local_s(1100, 51.0) is None
    assert times.local_s(2100, 51.1) == pytest.approx(51.1, abs=0.01)
    found = [times.local_s(100 * k, 52.0 + 0.1 * k) for k in range(5)]
    assert found == [None, None, None, None, pytest.approx(52.4)]
    assert times.counters == {"delayed": 5, "clock_set": 1}
    assert times.local_s(2**53, 53.0) == 53.0  # a leap forward costs what comes next, not for ever
    assert [times.local_s(1000 + k, 53.1) is None for k in range(5)] == [True] * 4 + [False]
