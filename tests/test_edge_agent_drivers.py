"""Drivers of real lines: counters that wrap, readings that lie, shots handed over in time, valves that close."""

import math
import sys
import types
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.drivers import address, gpio
from edge_agent.drivers.address import Options, parse_address
from edge_agent.drivers.ejectors import SLOT_WORDS, ModbusPlcEjector, open_ejector
from edge_agent.drivers.encoder import EncoderOptions, ModbusEncoder, MqttEncoder, open_encoder
from edge_agent.drivers.gpio import GpiodPins, GpioEjector
from edge_agent.drivers.handover import HandOver
from edge_agent.drivers.modbus import ModbusPort, RegisterPoller
from edge_agent.drivers.mqtt import SenderClock
from edge_agent.drivers.pulses import PulseEncoder
from edge_agent.drivers.scalars import ModbusScalar, MqttScalar, ScalarJoin, ScalarOptions, open_scalar
from edge_agent.link import Incoming
from edge_agent.seams import Shot
from models.errors import ConfigError, UnavailableError


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakePlc:
    """Registers in memory; `broken` requests fail, each costs `takes_s`."""

    def __init__(self, clock: Clock) -> None:
        self.words = [0] * 0x10000
        self.clock, self.takes_s = clock, 0.0
        self.broken = 0
        self.writes: list[tuple[int, list[int]]] = []
        self.closed = 0

    def _request(self) -> None:
        self.clock.now_s += self.takes_s
        if self.broken:
            self.broken -= 1
            raise UnavailableError("driver.no_answer", "The device does not answer.")

    def read(self, _table: str, first: int, count: int) -> list[int]:
        self._request()
        return self.words[first : first + count]

    def write(self, first: int, values: Sequence[int]) -> None:
        self.words[first : first + len(values)] = values  # also when the answer is lost
        self.writes.append((first, list(values)))
        self._request()

    def close(self) -> None:
        self.closed += 1


def broken(*_: object) -> None:
    raise RuntimeError("a driver's bug")


def encoder_at(clock: Clock, *pulses: int, every_s: float = 0.01, **options: object) -> PulseEncoder:
    """An encoder that has just been fed."""
    encoder = PulseEncoder(**({"mm_per_pulse": 0.1, "clock": clock} | options))
    for k, count in enumerate(pulses):
        clock.now_s += every_s * bool(k)
        assert encoder.feed(count, clock.now_s)
    return encoder


# -- encoder --------------------------------------------------------------------------------------------------------


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
def test_what_is_no_count_is_counted_and_ignored(wrong: object) -> None:
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


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"pulses": 1}',
    b'{"pulses": NaN, "at_ms": 1}',
    b'{"pulses": 1.5, "at_ms": 1}',
    b'{"pulses": true, "at_ms": 1}',
    b'{"pulses": "1", "at_ms": 1}',
    b'{"pulses": -1, "at_ms": 1}',
    b'{"pulses": 4294967296, "at_ms": 1}',
    b'{"pulses": 1, "at_ms": 1e999}',
    b'{"pulses": 1, "at_ms": 99999999999999999999}',
    b'{"x":' + b"[" * 1000,
    b'{"pulses": 1, "at_ms": 1, "x": "' + b"a" * 2000 + b'"}',
]


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


# -- hand-over ------------------------------------------------------------------------------------------------------


def shot(item: int, target_mm: float, outlet: str = "reject", lane: int = 1) -> Shot:
    return Shot(lane, outlet, item, target_mm)


def plc_ejector(clock: Clock, slots: int = 2, start: int = 0) -> tuple[ModbusPlcEjector, FakePlc, PulseEncoder]:
    plc, belt = FakePlc(clock), encoder_at(clock, start, start + 100, stale_ms=1e4)
    outlets = {"reject": 3}
    ejector = ModbusPlcEjector(plc, first=200, slots=slots, outlets=outlets, belt=belt, ahead_mm=150.0, clock=clock)
    return ejector, plc, belt


def test_a_shot_is_one_write_of_target_lane_outlet_and_sequence() -> None:
    clock = Clock()
    ejector, plc, belt = plc_ejector(clock, start=2**32 - 150)
    plc.words[200:212] = [7] * 12
    plc.takes_s = 0.003
    assert ejector.announce(shot(1, 110.0), belt.position_mm(clock.now_s))
    ejector.queue.step()
    assert plc.writes == [(200, [0] * 12), (200, [1, 1, 3, 0, 950, 1])]
    assert ejector.queue.counters["sent"] == 1
    assert ejector.queue.write_ms.count == ejector.queue.handover_ms.count == 1
    assert ejector.queue.write_ms.quantile(0.5) == pytest.approx(6.0, rel=0.05)
    assert ejector.ahead_mm == 150.0


def test_an_announced_shot_is_not_handed_over_again_when_it_falls_due() -> None:
    clock = Clock()
    ejector, plc, _ = plc_ejector(clock)
    assert ejector.announce(shot(1, 10.5), 10.0)
    ejector.queue.step()
    ejector.fire(shot(1, 10.5), clock.now_s)
    ejector.queue.step()
    assert len(plc.writes) == 2
    assert ejector.queue.counters["repeated"] == 1
    ejector.fire(shot(2, 10.5), clock.now_s)  # nobody announced this one
    ejector.queue.step()
    assert plc.writes[-1][1][0] == 2


def test_a_shot_whose_item_has_passed_is_never_written() -> None:
    clock = Clock()
    ejector, plc, _ = plc_ejector(clock)
    assert not ejector.announce(shot(1, 5.0), 10.0)
    assert not ejector.announce(shot(1, 50.0), math.nan)
    with pytest.raises(UnavailableError, match="handed over"):
        ejector.fire(shot(1, 5.0), clock.now_s)
    plc.broken = 1
    assert ejector.announce(shot(2, 12.0), 10.0)
    ejector.queue.step()
    clock.now_s += 0.05  # meanwhile the belt runs on
    ejector.queue.step()
    assert ejector.queue.waiting == 0
    assert ejector.queue.counters["late"] == 4
    assert ejector.queue.counters["sent"] == 0


def test_a_write_without_answer_is_repeated_into_the_same_slot() -> None:
    clock = Clock()
    ejector, plc, _ = plc_ejector(clock)
    ejector.announce(shot(1, 60.0), 10.0)
    ejector.queue.step()
    ejector.announce(shot(2, 70.0), 10.0)
    plc.broken = 2
    for _ in range(3):
        ejector.queue.step()
    again = [write for write in plc.writes if write[1][0] == 2]
    assert again == [(200 + SLOT_WORDS, again[0][1])] * 3
    assert ejector.queue.counters["sent"] == 2


def test_a_slot_is_used_again_only_after_its_item_has_passed() -> None:
    clock = Clock()
    ejector, plc, belt = plc_ejector(clock)
    for item in range(3):
        assert ejector.announce(shot(item, 50.0 + 10.0 * item), 10.0)
    ejector.queue.step()
    assert ejector.queue.waiting == 1
    assert ejector.counters["ring_full"] == 1
    clock.now_s += 0.1
    belt.feed(650, clock.now_s)
    ejector.queue.step()
    assert plc.writes[-1][0] == 200
    assert plc.writes[-1][1][0] == 3


def test_sequences_skip_zero_when_they_wrap() -> None:
    clock = Clock()
    ejector, plc, _ = plc_ejector(clock, slots=4)
    ejector.queue._sequence = 0xFFFE
    for item in range(2):
        ejector.announce(shot(item, 100.0), 10.0)
    ejector.queue.step()
    assert [words[0] for _, words in plc.writes[1:]] == [0xFFFF, 1]


def test_what_the_plc_does_not_know_is_refused() -> None:
    clock = Clock()
    ejector, _, _ = plc_ejector(clock)
    assert not ejector.announce(shot(1, 50.0, outlet="moon"), 10.0)
    assert not ejector.announce(shot(1, 1e15), 10.0)
    assert ejector.counters == {"unknown_outlet": 1, "no_count": 1}


def test_the_queue_is_bounded_and_a_broken_driver_costs_one_shot() -> None:
    clock = Clock()
    belt = encoder_at(clock, 0, 100)
    queue = HandOver(broken, belt, limit=2, clock=clock)
    assert [queue.offer(shot(item, 50.0), 10.0) for item in range(3)] == [True, True, False]
    queue.step()
    assert queue.counters["refused"] == 1
    assert queue.counters["failed"] == 2
    queue.close()


# -- pins -----------------------------------------------------------------------------------------------------------


class FakePins:
    def __init__(self) -> None:
        self.open: set[int] = set()
        self.stuck = 0
        self.released = 0

    def set(self, line: int, *, active: bool) -> None:
        if self.stuck:
            self.stuck -= 1
            raise OSError("stuck")
        (self.open.add if active else self.open.discard)(line)

    def release(self) -> None:
        self.released += 1


def gpio_ejector() -> tuple[GpioEjector, FakePins]:
    pins = FakePins()
    return GpioEjector(pins, {(1, "reject"): 17, (0, "reject"): 18}, pulse_s=0.02), pins


def test_a_valve_opens_at_once_and_closes_after_its_pulse() -> None:
    ejector, pins = gpio_ejector()
    ejector.fire(shot(1, 0.0), 10.0)
    assert pins.open == {17}
    assert ejector.step(10.019) == pytest.approx(0.001)
    assert pins.open == {17}
    ejector.step(10.0201)
    assert pins.open == set()


def test_a_valve_fired_while_open_stays_open_until_the_later_end() -> None:
    ejector, pins = gpio_ejector()
    ejector.fire(shot(1, 0.0), 10.0)
    ejector.fire(shot(2, 0.0, lane=0), 10.005)
    ejector.fire(shot(3, 0.0), 10.01)
    ejector.step(10.026)
    assert pins.open == {17}
    ejector.step(10.031)
    assert pins.open == set()


def test_a_valve_that_does_not_close_is_tried_again() -> None:
    ejector, pins = gpio_ejector()
    ejector.fire(shot(1, 0.0), 10.0)
    pins.stuck = 2
    for at_s in (10.03, 10.05, 10.07):
        ejector.step(at_s)
    assert pins.open == set()
    assert ejector.counters["close_failed"] == 2


def test_a_valve_that_cannot_be_set_or_does_not_exist_is_an_error_of_the_shot() -> None:
    ejector, pins = gpio_ejector()
    pins.stuck = 1
    with pytest.raises(UnavailableError, match="cannot be set"):
        ejector.fire(shot(1, 0.0), 10.0)
    with pytest.raises(UnavailableError, match="no such valve"):
        ejector.fire(shot(1, 0.0, outlet="moon"), 10.0)


def test_closing_closes_every_valve_and_nothing_opens_any_more() -> None:
    ejector, pins = gpio_ejector()
    ejector.start()
    ejector.fire(shot(1, 0.0), 1e12)  # would stay open for ever
    ejector.close()
    ejector.close()
    assert pins.open == set()
    assert pins.released == 1
    with pytest.raises(UnavailableError):
        ejector.fire(shot(1, 0.0), 10.0)


def test_without_gpiod_the_operator_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpiod", None)
    belt = PulseEncoder(mm_per_pulse=0.1)
    with pytest.raises(ConfigError, match=r"sortline\[gpio\]"):
        open_ejector("gpio:///dev/gpiochip0?valve=0:reject:17", belt)
    monkeypatch.setitem(sys.modules, "gpiod", types.ModuleType("gpiod"))  # version 1 has no request_lines
    with pytest.raises(ConfigError, match="gpiod 2"):
        GpiodPins("/dev/gpiochip0", [17])


def test_without_pymodbus_the_operator_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymodbus.client", None)
    with pytest.raises(ConfigError, match=r"sortline\[industrial\]"):
        open_encoder("modbus://plc/input/1?mm_per_pulse=0.1")


class FakeGpiod:
    """What libgpiod's bindings offer."""

    class LineSettings:
        def __init__(self, **settings: object) -> None:
            self.settings = settings

    class Request:
        def __init__(self) -> None:
            self.values: list[tuple[int, str]] = []
            self.released = False

        def set_value(self, line: int, value: str) -> None:
            self.values.append((line, value))

        def release(self) -> None:
            self.released = True

    class line:  # noqa: N801  the library's name
        class Value:
            ACTIVE, INACTIVE = "on", "off"

        class Direction:
            OUTPUT = "output"

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict]] = []
        self.request = self.Request()

    def request_lines(self, chip: str, **arguments: dict) -> "FakeGpiod.Request":
        if chip.endswith("9"):
            raise FileNotFoundError(chip)
        self.requests.append((chip, arguments))
        return self.request


def test_pins_are_requested_as_outputs_that_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeGpiod()
    monkeypatch.setattr(gpio, "load_extra", lambda module, _extra: library.line if "." in module else library)
    belt = PulseEncoder(mm_per_pulse=0.1)
    url = "gpio:///dev/gpiochip0?valve=0:reject:17&valve=1:reject:18&pulse_ms=5&active_low=true"
    ejector = open_ejector(url, belt)
    assert ejector.ahead_mm == 0.0
    ejector.fire(shot(1, 0.0), 1e12)
    ejector.close()
    chip, arguments = library.requests[0]
    assert (chip, list(arguments["config"])) == ("/dev/gpiochip0", [(17, 18)])
    assert arguments["config"][17, 18].settings == {
        "direction": "output",
        "output_value": "off",
        "active_low": True,
    }
    assert library.request.values[0] == (18, "on")
    assert set(library.request.values[1:]) == {(17, "off"), (18, "off")}
    assert library.request.released
    with pytest.raises(ConfigError, match="cannot be taken"):
        open_ejector("gpio://gpiochip9?valve=0:reject:17", belt)


# -- scalars --------------------------------------------------------------------------------------------------------


def test_the_nearest_reading_within_the_tolerance_is_the_items() -> None:
    join = ScalarJoin(sensor_mm=-200.0, tolerance_mm=20.0)
    for belt_mm, value in ((100.0, 150.0), (180.0, 160.0)):  # the items are at 300 and 380
        assert join.add(belt_mm, value)
    assert join.value_for(305.0) == 150.0
    assert join.value_for(371.0) == 160.0
    assert join.value_for(371.5) == 160.0
    assert join.value_for(340.0) is None
    assert join.value_for(math.nan) is None
    assert join.counters == {"readings": 2, "matched": 2, "items_unmatched": 2}


def test_a_reading_claimed_by_two_items_is_counted() -> None:
    join = ScalarJoin(sensor_mm=0.0, tolerance_mm=20.0)
    join.add(100, 1)
    assert [join.value_for(85.0), join.value_for(115.0)] == [1.0, 1.0]
    assert join.counters["shared"] == 1


@pytest.mark.parametrize("wrong", [None, True, "1", math.nan, math.inf, 10**400, -1.0, 2001.0, [1]])
def test_what_is_no_value_is_counted_and_ignored(wrong: object) -> None:
    join = ScalarJoin(sensor_mm=0.0, tolerance_mm=20.0, low=0.0, high=2000.0)
    assert not join.add(1.0, wrong)
    assert not join.add(math.nan, 5.0)
    assert join.counters == {"bad_value": 2}
    assert join.remembered == 0


@given(st.lists(st.floats(-1e6, 1e6), max_size=300))
def test_memory_is_bounded_and_every_reading_is_accounted_for(places: list[float]) -> None:
    join = ScalarJoin(sensor_mm=0.0, tolerance_mm=1.0, keep=16)
    for place in places:
        join.add(place, 1.0)
    assert join.remembered == min(len(places), 16)
    assert join.counters["readings_unmatched"] == max(len(places) - 16, 0)


def test_a_polled_sensor_gives_one_reading_per_sequence_at_the_noted_count() -> None:
    clock = Clock()
    belt = encoder_at(clock, 0, 100, 200)
    join, plc = ScalarJoin(sensor_mm=0.0, tolerance_mm=2.0, high=2000.0), FakePlc(clock)
    sensor = ModbusScalar(join, belt, plc, "input", 300, ScalarOptions(pulses=True), clock=clock)
    plc.words[300:305] = [65535, 0x4320, 0, 0, 50]  # 160.0 at 5 mm, but nobody knows since when
    sensor.poller.poll()
    assert join.remembered == 0
    for sequence, high, count in ((0, 0x4320, 150), (0, 0x4320, 150), (2, 0x4348, 180), (3, 0x7FC0, 190)):
        plc.words[300:305] = [sequence, high, 0, 0, count]
        sensor.poller.poll()
    assert join.remembered == 2
    assert join.value_for(15.5) == 160.0
    assert join.value_for(18.0) == 200.0
    assert join.counters["bad_value"] == 1  # the last was NaN
    assert sensor.counters["missed"] == 1
    plc.words[300:305] = [4, 0x4320, 0, 0x7000, 0]
    sensor.poller.poll()
    assert sensor.counters["wrong_place"] == 1


def test_a_published_weight_is_scaled_and_placed() -> None:
    clock = Clock()
    belt = encoder_at(clock, 0, 100, 200)
    where, options = parse_address("mqtt://nowhere/weight?scale=0.001", ScalarOptions, schemes=("mqtt",))
    join = ScalarJoin(sensor_mm=0.0, tolerance_mm=2.0)
    sensor = MqttScalar(join, belt, *where.broker(options, "scalar"), where.topic(), options, clock=clock)
    for payload in (b'{"value": 182000, "pulses": 150}', b'{"value": 90000}', *HOSTILE, b'{"value": NaN}'):
        assert sensor.feeder.take(Incoming("weight", payload))
    assert join.value_for(15.0) == pytest.approx(182.0)
    assert join.value_for(20.0) == pytest.approx(90.0)
    assert join.remembered == 2


# -- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "plc",
        "http://plc/input/1?mm_per_pulse=1",
        "modbus:///input/1?mm_per_pulse=1",
        "modbus://plc:99999/input/1?mm_per_pulse=1",
        "modbus://plc/coils/1?mm_per_pulse=1",
        "modbus://plc/input/65536?mm_per_pulse=1",
        "modbus://plc/input/x?mm_per_pulse=1",
        "modbus://plc/input/1",
        "modbus://plc/input/1?mm_per_pulse=0",
        "modbus://plc/input/1?mm_per_pulse=nan",
        "modbus://plc/input/1?mm_per_pulse=1&bits=24",
        "modbus://plc/input/1?mm_per_pulse=1&mm_per_pulse=2",
        "modbus://plc/input/1?mm_per_pulse=1&speed=2",
        "modbus://plc/input/1?mm_per_pulse=1&unit=300",
        "mqtt://user:secret@broker/topic?mm_per_pulse=1",
        "mqtt://broker/?mm_per_pulse=1",
        "mqtt://broker/%23?mm_per_pulse=1",
        "mqtt://broker/a/+?mm_per_pulse=1",
        "mqtt://[broker/a?mm_per_pulse=1",
        "mqtt://broker/" + "a" * 4000,
    ],
)
def test_a_wrong_address_of_an_encoder_is_told(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_encoder(url)
    assert caught.value.code in {"driver.bad_url", "driver.bad_option"}
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "modbus://plc/holding/1",
        "modbus://plc/input/1?outlet=reject:1",
        "modbus://plc/holding/65530?outlet=reject:1",
        "modbus://plc/holding/1?outlet=reject",
        "modbus://plc/holding/1?outlet=reject:1&outlet=reject:2",
        "modbus://plc/holding/1?outlet=reject:70000",
        "modbus://plc/holding/1?outlet=reject:1&slots=0",
        "gpio:///dev/gpiochip0",
        "gpio:///dev/gpiochip0?valve=9:reject:1",
        "gpio:///dev/gpiochip0?valve=0:reject:-1",
    ],
)
def test_a_wrong_address_of_an_ejector_is_told(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_ejector(url, PulseEncoder(mm_per_pulse=0.1))
    assert caught.value.code in {"driver.bad_url", "driver.bad_option"}


def test_a_wrong_address_of_a_sensor_is_told() -> None:
    with pytest.raises(ConfigError, match="value"):
        open_scalar("modbus://plc/input/1?value=text", PulseEncoder(mm_per_pulse=0.1), sensor_mm=0.0, tolerance_mm=5.0)


def test_addresses_have_the_usual_ports_and_users() -> None:
    where, _ = parse_address("mqtt://me@broker/a%20b/c", Options, schemes=("mqtt",))
    assert (where.host, where.port, where.topic()) == ("broker", 1883, "a b/c")
    config, client = where.broker(Options(client="line-1"), "encoder")
    assert (config.username, client) == ("me", "line-1")
    assert parse_address("modbus://plc/input/7", Options, schemes=("modbus",))[0].register() == ("input", 7)
    assert address.numbered(("a:1", "b:2"), parts=2, limit=9) == {("a",): 1, ("b",): 2}


# -- the library's answers ------------------------------------------------------------------------------------------


class FakeAnswer:
    def __init__(self, registers: object, *, error: bool = False) -> None:
        self.registers, self.error = registers, error

    def isError(self) -> bool:  # noqa: N802  the library's name
        return self.error


class FakeClient:
    def __init__(self, answer: object) -> None:
        self.answer, self.closed = answer, 0

    def connect(self) -> bool:
        return self.answer is not None

    def read_input_registers(self, *_: object, **__: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("answer", "counter"),
    [
        (None, "connect_failed"),
        (ValueError("struct"), "failed"),
        (FakeAnswer([1, 2], error=True), "refused"),
        (FakeAnswer([1]), "malformed"),
        (FakeAnswer([1, 2, 3]), "malformed"),
        (FakeAnswer(None), "malformed"),
        (FakeAnswer([1, 70000]), "malformed"),
        (FakeAnswer([1, True]), "malformed"),
        (FakeAnswer([1, 2.0]), "malformed"),
    ],
)
def test_whatever_the_device_answers_is_an_error_we_know(answer: object, counter: str) -> None:
    port = ModbusPort("127.0.0.1", 1)
    port._client = FakeClient(answer)
    with pytest.raises(UnavailableError):
        port.read("input", 0, 2)
    assert port.counters == {counter: 1}
