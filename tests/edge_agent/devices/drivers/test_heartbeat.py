"""The heartbeat output changes while the line turns and stands still when it does not; safe states of ejectors."""

import pytest

from edge_agent.devices.drivers.ejectors import SLOT_WORDS, ModbusPlcEjector, open_ejector
from edge_agent.devices.drivers.gpio import GpioEjector, SafeState
from edge_agent.devices.drivers.heartbeat import HeartbeatOutput, open_heartbeat
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.interfaces import Shot
from models.errors import ConfigError, UnavailableError
from tests.edge_agent.devices.drivers.test_ejectors import FakePins
from tests.simulators.fake_plc import Clock, FakePlc


def test_it_beats_while_the_line_turns_and_stands_still_when_it_hangs() -> None:
    clock, written = Clock(), list[int]()
    output = HeartbeatOutput(written.append, patience_s=1.0, clock=clock)
    output.step()
    assert written == [], "a line that has not turned yet is not alive"
    output.turned()
    output.step()
    clock.now_s += 0.9
    output.step()
    clock.now_s += 0.2
    output.step()
    output.step()
    assert written == [1, 2]
    output.turned()
    output.step()
    assert written == [1, 2, 3]
    assert output.counters == {"beats": 3, "skipped": 3}


def test_a_device_that_does_not_answer_is_counted_and_tried_at_the_next_beat() -> None:
    clock, answers = Clock(), iter([UnavailableError("driver.no_answer", "No."), OSError("chip"), None])
    ended: list[bool] = []

    def write(_n: int) -> None:
        if (error := next(answers, None)) is not None:
            raise error

    output = HeartbeatOutput(write, clock=clock, end=lambda: ended.append(True))
    output.turned()
    for _ in range(3):
        output.step()
    assert output.counters == {"no_answer": 2, "beats": 1}
    output.close()
    output.close()
    assert ended == [True]


@pytest.mark.parametrize(
    "url", ["gpio:///dev/gpiochip0", "modbus://plc/input/3", "mqtt://broker/", "modbus://plc/coil/3?every_ms=1"]
)
def test_a_wrong_address_of_a_heartbeat_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_heartbeat(url)


@pytest.mark.parametrize(("safe", "open_after"), [("off", set()), ("hold", {17}), ("eject", {17, 18})])
def test_a_line_that_ends_leaves_its_valves_in_the_safe_state(safe: SafeState, open_after: set[int]) -> None:
    pins = FakePins()
    valves = {(0, "reject"): 17, (1, "reject"): 18}
    ejector = GpioEjector(pins, valves, pulse_s=0.02, safe=safe, clock=Clock())
    ejector.fire(Shot(0, "reject", 1, 0.0), 100.0)
    ejector.close()
    assert pins.open == open_after
    assert pins.released == 1


@pytest.mark.parametrize(("safe", "left", "number"), [("hold", 1, 0), ("off", 0, 1), ("eject", 1, 2)])
def test_a_plc_keeps_or_loses_its_shots_and_finds_the_safe_state(safe: SafeState, left: int, number: int) -> None:
    clock = Clock()
    plc, belt = FakePlc(clock), PulseEncoder(mm_per_pulse=0.1, stale_ms=60_000.0, clock=clock)
    belt.feed(0, clock.now_s)
    ejector = ModbusPlcEjector(
        plc,
        first=200,
        slots=2,
        outlets={"reject": 1},
        belt=belt,
        ahead_mm=150.0,
        safe=safe,
        safe_register=300,
        clock=clock,
    )
    assert ejector.announce(Shot(0, "reject", 1, 50.0), 0.0)
    ejector.queue.step()
    assert plc.words[300] == number
    ejector.close()
    ring = plc.words[200 : 200 + 2 * SLOT_WORDS]
    assert sum(ring[k] != 0 for k in range(0, len(ring), SLOT_WORDS)) == left


@pytest.mark.parametrize(
    "url",
    [
        "modbus://plc/holding/200?outlet=reject:1&safe=eject",
        "mqtt://broker/line1/shots?safe=off",
        "modbus://plc/holding/200?outlet=reject:1&safe=open",
    ],
)
def test_a_safe_state_that_a_device_cannot_give_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_ejector(url, PulseEncoder(mm_per_pulse=0.1))
    assert caught.value.code == "driver.bad_option"
