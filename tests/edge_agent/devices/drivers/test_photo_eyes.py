"""Photo-eyes: each item one sighting, at the place where the belt was, whatever the wire; hostile input is counted."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from edge_agent.devices.drivers import gpio
from edge_agent.devices.drivers.gpio import GpiodEdges
from edge_agent.devices.drivers.photo_eyes import EyeMessage, ModbusEyes, PhotoEyes, _deliver_to, open_photo_eyes
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.devices.hardware import open_hardware
from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.interfaces import Shot, Sighting
from edge_agent.line_config import LineConfig
from models.errors import ConfigError
from tests.simulators.fake_plc import Clock, FakePlc

EYE = (0, "reject")
OTHER = (1, "reject")


def belt_at(clock: Clock, pulses: int = 10_000) -> PulseEncoder:
    belt = PulseEncoder(mm_per_pulse=0.1, stale_ms=60_000.0, clock=clock)
    belt.feed(pulses, clock.now_s)
    return belt


def test_a_sighting_is_given_once_and_not_before_its_time() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock))
    eyes.saw(EYE, clock.now_s, pulses=10_200)
    eyes.saw(OTHER, clock.now_s + 5.0, pulses=10_400)
    place_mm = belt_at(clock).position_mm(clock.now_s)
    assert eyes.sightings(clock.now_s) == [Sighting(*EYE, pytest.approx(place_mm + 20.0))]
    assert eyes.sightings(clock.now_s) == []
    assert [sighting.lane for sighting in eyes.sightings(clock.now_s + 5.0)] == [1]


def test_chatter_of_one_eye_is_one_item_and_two_eyes_do_not_disturb_each_other() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock), min_mm=15.0)
    for pulses in (10_000, 10_050, 10_149, 10_200):
        eyes.saw(EYE, clock.now_s, pulses)
    eyes.saw(OTHER, clock.now_s, 10_010)
    assert (eyes.counters["seen"], eyes.counters["chatter"]) == (3, 2)


def test_a_count_far_from_the_belt_is_no_sighting_and_memory_is_bounded() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock), min_mm=0.5)
    eyes.saw(EYE, clock.now_s, 4_000_000_000)
    assert (eyes.counters["wrong_place"], eyes.counters["seen"]) == (1, 0)
    for k in range(1500):
        eyes.saw(EYE, clock.now_s, 10_000 + 10 * k)
    assert len(eyes.sightings(clock.now_s)) == 1024
    assert eyes.counters["dropped"] == 1500 - 1024


def test_a_discrete_input_gives_one_sighting_per_rising_edge() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock), min_mm=0.0001)
    source = ModbusEyes(eyes, FakePlc(clock), "discrete", 12, {EYE: 0, OTHER: 1}, clock=clock)
    for second, bits in enumerate(([1, 0], [1, 0], [0, 1], [0, 1], [1, 1])):
        source.take(bits, clock.now_s + second * 0.01)
    assert eyes.counters["seen"] == 2, "the input that is on at first contact is of unknown age"
    assert {(s.lane, s.outlet) for s in eyes.sightings(1e9)} == {EYE, OTHER}


def test_a_counter_that_wraps_or_jumps_gives_its_newest_sighting_and_counts_the_missed_ones() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock))
    source = ModbusEyes(eyes, FakePlc(clock), "input", 400, {EYE: 0}, pulses=True, clock=clock)
    source.take([0xFFFF, 0, 10_000], clock.now_s)
    source.take([0xFFFF, 0, 10_000], clock.now_s)
    source.take([2, 0, 10_500], clock.now_s)
    (sighting,) = eyes.sightings(clock.now_s)
    assert sighting.belt_mm == pytest.approx(50.0)
    assert eyes.counters["missed"] == 2


def test_a_message_of_an_unknown_eye_is_counted() -> None:
    clock = Clock()
    eyes = PhotoEyes(belt_at(clock))
    deliver = _deliver_to(eyes, {4: EYE})
    deliver(EyeMessage(eye=5), clock.now_s)
    deliver(EyeMessage(eye=4, pulses=10_100), clock.now_s)
    assert (eyes.counters["unknown_eye"], eyes.counters["seen"]) == (1, 1)


def test_sightings_of_the_eyes_confirm_shots_and_correct_the_lead() -> None:
    clock = Clock()
    belt = belt_at(clock)
    eyes = PhotoEyes(belt)
    ledger = ConfirmationLedger(eye_mm=60.0)
    for item in range(20):
        target_mm = 100.0 + 100.0 * item
        # The valve takes effect 12 ms after its command, at 1 m/s 12 mm farther on.
        ledger.fired(Shot(0, "reject", item, target_mm), clock.now_s, target_mm - 12.0, 1000.0)
        if item != 7:
            eyes.saw(EYE, clock.now_s, 10_000 + round((target_mm + 60.0) * 10))
    for sighting in eyes.sightings(clock.now_s):
        ledger.seen(sighting)
    ledger.settle(1e6)
    assert ledger.counts()["0/reject/confirmed"] == 19
    assert ledger.counts()["0/reject/missed"] == 1
    assert ledger.lead_s(0, "reject") == pytest.approx(0.012)


class FakeChip:
    """The part of libgpiod's bindings that inputs use, at its real seam."""

    class LineSettings:
        def __init__(self, **settings: object) -> None:
            self.settings = settings

    line = SimpleNamespace(Direction=SimpleNamespace(INPUT="input"), Edge=SimpleNamespace(RISING="rising"))

    def __init__(self) -> None:
        self.requested: dict[str, object] = {}
        self.events: list[SimpleNamespace] = []
        self.fail = False
        self.released = 0

    def request_lines(self, chip: str, **arguments: object) -> "FakeChip":
        self.requested = {"chip": chip, **arguments}
        return self

    def wait_edge_events(self, _timeout_s: float) -> bool:
        if self.fail:
            raise OSError("chip")
        return bool(self.events)

    def read_edge_events(self) -> list[SimpleNamespace]:
        events, self.events = self.events, []
        return events

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> FakeChip:
    library = FakeChip()
    monkeypatch.setattr(gpio, "load_extra", lambda module, _extra: library.line if "." in module else library)
    return library


def test_edges_of_a_chip_carry_the_kernels_time(chip: FakeChip) -> None:
    seen: list[tuple[int, float]] = []
    edges = GpiodEdges("/dev/gpiochip0", [22, 23], lambda line, at_s: seen.append((line, at_s)), debounce_ms=2.0)
    chip.events = [SimpleNamespace(line_offset=23, timestamp_ns=12_500_000_000)]
    edges.step(0.0)
    edges.step(0.0)
    assert seen == [(23, 12.5)]
    (settings,) = chip.requested["config"].values()
    assert settings.settings == {
        "direction": "input",
        "edge_detection": "rising",
        "active_low": False,
        "debounce_period": timedelta(milliseconds=2),
    }
    edges.close()
    edges.close()
    assert chip.released == 1


def test_a_chip_that_fails_is_counted_and_asked_again(chip: FakeChip) -> None:
    seen: list[int] = []
    edges = GpiodEdges("/dev/gpiochip0", [22], lambda line, _at_s: seen.append(line))
    edges._stopping.set()  # the pause after a failure would last
    chip.fail = True
    edges.step(0.0)
    chip.fail, chip.events = False, [SimpleNamespace(line_offset=22, timestamp_ns=1)]
    edges.step(0.0)
    assert (edges.counters["failed"], seen) == (1, [22])


@pytest.mark.parametrize(
    "url",
    [
        "modbus://plc/discrete/12",
        "modbus://plc/discrete/12?eye=0:reject",
        "modbus://plc/discrete/12?eye=8:reject:0",
        "modbus://plc/discrete/12?eye=0:reject:0&eye=1:reject:0",
        "modbus://plc/discrete/12?eye=0:reject:0&pulses=true",
        "modbus://plc/discrete/65535?eye=0:reject:1",
        "modbus://plc/input/0?eye=0:reject:125",
        "modbus://plc/valves/0?eye=0:reject:0",
        "mqtt://broker/a/%23?eye=0:reject:0",
        "http://plc/discrete/12?eye=0:reject:0",
        "gpio:///dev/gpiochip0?eye=0:reject:22&bounce_ms=2",
    ],
)
def test_a_wrong_address_of_photo_eyes_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_photo_eyes([url], belt_at(Clock()))
    assert caught.value.code in {"driver.bad_url", "driver.bad_option"}


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({}, "line.no_encoder"),
        ({"encoder": "mqtt://127.0.0.1:1/encoder?mm_per_pulse=0.1"}, "line.no_ejector_for_eye"),
    ],
)
def test_photo_eyes_need_an_encoder_and_an_ejector(tmp_path: Path, settings: dict[str, str], code: str) -> None:
    cv2.imwrite(str(tmp_path / "frame.png"), np.zeros((200, 320, 3), np.uint8))
    eye = "mqtt://127.0.0.1:1/eyes?eye=0:reject:0"
    with pytest.raises(ConfigError) as caught:
        open_hardware(LineConfig(camera=str(tmp_path), confirmation=(eye,), **settings))
    assert caught.value.code == code
