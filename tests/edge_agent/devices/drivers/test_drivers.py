"""Sensors and addresses of real lines: wrong readings, malformed addresses, unexpected answers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.devices.drivers import address
from edge_agent.devices.drivers.address import Options, parse_address
from edge_agent.devices.drivers.ejectors import open_ejector
from edge_agent.devices.drivers.encoder import open_encoder
from edge_agent.devices.drivers.item_sensors import ModbusScalar, MqttScalar, ScalarJoin, ScalarOptions, open_scalar
from edge_agent.devices.drivers.modbus import ModbusPort
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.mqtt import Incoming
from models.errors import ConfigError, UnavailableError
from tests.simulators.fake_plc import HOSTILE, Clock, FakePlc, encoder_at

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
def test_an_invalid_value_is_counted_and_ignored(wrong: object) -> None:
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
    plc.words[300:305] = [65535, 0x4320, 0, 0, 50]  # 160.0 at 5 mm, but it is unknown since when
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
def test_a_wrong_address_of_an_encoder_is_refused(url: str) -> None:
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
def test_a_wrong_address_of_an_ejector_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_ejector(url, PulseEncoder(mm_per_pulse=0.1))
    assert caught.value.code in {"driver.bad_url", "driver.bad_option"}


def test_a_wrong_address_of_a_sensor_is_refused() -> None:
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
