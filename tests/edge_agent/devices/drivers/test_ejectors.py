"""Ejectors of real lines: shots handed over in time, valves that close."""

import math
import sys
import types

import pytest

from edge_agent.devices.drivers import gpio
from edge_agent.devices.drivers.ejectors import SLOT_WORDS, ModbusPlcEjector, open_ejector
from edge_agent.devices.drivers.encoder import open_encoder
from edge_agent.devices.drivers.gpio import GpiodPins, GpioEjector
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.devices.drivers.shot_queue import ShotQueue
from edge_agent.interfaces import Shot
from models.errors import ConfigError, UnavailableError
from tests.simulators.fake_plc import Clock, FakePlc, broken, encoder_at

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
    ejector.fire(shot(2, 10.5), clock.now_s)  # a shot that was not announced
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


def test_an_address_that_the_plc_lacks_is_refused() -> None:
    clock = Clock()
    ejector, _, _ = plc_ejector(clock)
    assert not ejector.announce(shot(1, 50.0, outlet="moon"), 10.0)
    assert not ejector.announce(shot(1, 1e15), 10.0)
    assert ejector.counters == {"unknown_outlet": 1, "no_count": 1}


def test_the_queue_is_bounded_and_a_broken_driver_costs_one_shot() -> None:
    clock = Clock()
    belt = encoder_at(clock, 0, 100)
    queue = ShotQueue(broken, belt, limit=2, clock=clock)
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


def test_without_gpiod_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpiod", None)
    belt = PulseEncoder(mm_per_pulse=0.1)
    with pytest.raises(ConfigError, match=r"sortline\[gpio\]"):
        open_ejector("gpio:///dev/gpiochip0?valve=0:reject:17", belt)
    monkeypatch.setitem(sys.modules, "gpiod", types.ModuleType("gpiod"))  # version 1 has no request_lines
    with pytest.raises(ConfigError, match="gpiod 2"):
        GpiodPins("/dev/gpiochip0", [17])


def test_without_pymodbus_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymodbus.client", None)
    with pytest.raises(ConfigError, match=r"sortline\[industrial\]"):
        open_encoder("modbus://plc/input/1?mm_per_pulse=0.1")


class FakeGpiod:
    """Offers the part of libgpiod's bindings that the driver uses."""

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
