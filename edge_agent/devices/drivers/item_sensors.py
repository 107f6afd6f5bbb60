"""One number per item, such as its weight: readings of a sensor beside the belt, joined to items by belt position.

    modbus://plc:502/input/300?value=float32&pulses=true&poll_ms=10&low=1&high=2000
    mqtt://broker:1883/line1/weight?low=1&high=2000         {"value": 182.5, "pulses": 123456}

The registers are: sequence, value (one or two), and with `pulses=true` the encoder's count at the weighing (two). A
reading is new when its sequence is. Without a count the reading stands for the place the belt had when it arrived:
that is good for slow belts only. One sensor serves one lane.
"""

import math
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from edge_agent.config import BrokerConfig
from edge_agent.devices.drivers.address import Finite, Options, Positive, Table, parse_address
from edge_agent.devices.drivers.modbus import ModbusPort, RegisterPoller, Registers, WordOrder, unsigned
from edge_agent.devices.drivers.mqtt import TopicFeed
from edge_agent.devices.drivers.pulses import PulseBelt

Kind: TypeAlias = Literal["float32", "int32", "uint32", "int16", "uint16"]
_FORMATS: Final[dict[str, tuple[int, str, str]]] = {
    "float32": (2, ">I", ">f"),
    "int32": (2, ">I", ">i"),
    "uint32": (2, ">I", ">I"),
    "int16": (1, ">H", ">h"),
    "uint16": (1, ">H", ">H"),
}
_SEQUENCES: Final = 1 << 16


@dataclass(slots=True)
class _Reading:
    place_mm: float
    value: float
    item_mm: float | None = None


class ScalarJoin:
    """Joins readings to items. Any thread may add, any may ask; both take microseconds.

    Args:
        sensor_mm: The sensor's distance behind column 0 of the image, as of outlets; negative in front of the camera.
        tolerance_mm: A reading belongs to an item no farther away; less than half the distance of two items.
        keep: Readings remembered.
        low: Values below are no measurement.
        high: Values above are no measurement.
    """

    def __init__(
        self, *, sensor_mm: float, tolerance_mm: float, keep: int = 256, low: float = -1e9, high: float = 1e9
    ) -> None:
        self._sensor_mm, self._tolerance_mm = sensor_mm, tolerance_mm
        self._low, self._high = low, high
        self._readings: deque[_Reading] = deque()
        self._keep = max(keep, 1)
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        """readings, bad_value, readings_unmatched (forgotten unused), matched, items_unmatched, shared"""

    def add(self, belt_mm: object, value: object) -> bool:
        """Takes a reading made while the belt stood at `belt_mm`; False when it is none. Never raises."""
        place, number = _finite(belt_mm), _finite(value)
        with self._lock:
            if place is None or number is None or not self._low <= number <= self._high:
                self.counters["bad_value"] += 1
                return False
            self._readings.append(_Reading(place - self._sensor_mm, number))
            self.counters["readings"] += 1
            if len(self._readings) > self._keep and self._readings.popleft().item_mm is None:
                self.counters["readings_unmatched"] += 1
        return True

    def value_for(self, item_mm: float) -> float | None:
        """Returns the value of the item with this belt coordinate; None when no reading is near enough."""
        with self._lock:
            nearest = min(self._readings, key=lambda reading: abs(reading.place_mm - item_mm), default=None)
            if nearest is None or not abs(nearest.place_mm - item_mm) <= self._tolerance_mm:
                self.counters["items_unmatched"] += 1
                return None
            if nearest.item_mm is None:
                nearest.item_mm = item_mm
                self.counters["matched"] += 1
            elif abs(nearest.item_mm - item_mm) > self._tolerance_mm:
                # Two items claim one reading: they lie closer than the tolerance allows.
                self.counters["shared"] += 1
            return nearest.value

    @property
    def remembered(self) -> int:
        """Number of readings in memory."""
        return len(self._readings)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


class ScalarOptions(Options, frozen=True, kw_only=True):
    """Options of a sensor's address."""

    value: Kind = "float32"
    words: WordOrder = "big"
    pulses: bool = False
    """Modbus: the registers end with the encoder's count."""
    scale: Finite = 1.0
    """Factor from the sensor's number to the value."""
    low: Finite = -1e9
    high: Finite = 1e9
    poll_ms: Annotated[float, msgspec.Meta(ge=1.0, le=10_000.0)] = 10.0
    reach_mm: Positive = 10_000.0
    """A count farther from the present belt position is wrong."""
    keep: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 256


class _Feeder:
    """Adds readings to the join with the place on the belt where they were made."""

    def __init__(self, join: ScalarJoin, belt: PulseBelt, options: ScalarOptions) -> None:
        self.join, self._belt = join, belt
        self._scale, self._reach_mm = options.scale, options.reach_mm
        self.counters: Counter[str] = Counter()
        """wrong_place, missed"""

    def _add(self, value: float, pulses: int | None, at_s: float) -> None:
        here_mm = self._belt.position_mm(at_s)
        place_mm = here_mm if pulses is None else self._belt.position_of(pulses)
        if place_mm is None or abs(place_mm - here_mm) > self._reach_mm:
            self.counters["wrong_place"] += 1
            return
        self.join.add(place_mm, value * self._scale)


class ModbusScalar(_Feeder):
    """Polls a sensor's registers in a thread of its own.

    Args:
        join: Takes the readings.
        belt: The encoder whose counts the PLC notes.
        registers: The PLC; used by this sensor alone.
        table: `input` or `holding`.
        address: First register.
        options: Options of the address.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        join: ScalarJoin,
        belt: PulseBelt,
        registers: Registers,
        table: Table,
        address: int,
        options: ScalarOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(join, belt, options)
        self._words: WordOrder = options.words
        self._size, self._raw, self._format = _FORMATS[options.value]
        self._pulses = options.pulses
        self._sequence: int | None = None
        count = 1 + self._size + 2 * int(options.pulses)
        self.poller = RegisterPoller(
            registers, table, address, count, every_s=options.poll_ms / 1000.0, deliver=self.take, clock=clock
        )

    def take(self, words: list[int], at_s: float) -> None:
        """Takes the registers read at `at_s`. What stood there at first contact is of unknown age: no reading."""
        sequence, before = words[0], self._sequence
        self._sequence = sequence
        if before is None or sequence == before:
            return
        self.counters["missed"] += (sequence - before) % _SEQUENCES - 1
        raw = unsigned(words[1 : 1 + self._size], self._words)
        (value,) = struct.unpack(self._format, struct.pack(self._raw, raw))
        pulses = unsigned(words[1 + self._size :], self._words) if self._pulses else None
        self._add(value, pulses, at_s)

    def start(self) -> None:
        """Begins to poll."""
        self.poller.start("scalar")

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self.poller.close()


class ScalarMessage(msgspec.Struct, frozen=True):
    """The message of a sensor."""

    value: float
    pulses: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    """The encoder's count when the value was measured."""


class MqttScalar(_Feeder):
    """Takes readings from a topic.

    Args:
        join: Takes the readings.
        belt: The encoder whose counts the messages carry.
        broker: Address of the broker, user and password file.
        client_id: MQTT client id.
        topic: Exact topic.
        options: Options of the address.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        join: ScalarJoin,
        belt: PulseBelt,
        broker: BrokerConfig,
        client_id: str,
        topic: str,
        options: ScalarOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(join, belt, options)
        self.feeder = TopicFeed(broker, client_id, topic, ScalarMessage, deliver=self.take, clock=clock)

    def take(self, message: ScalarMessage, received_s: float) -> None:
        """Adds a message that arrived at `received_s`."""
        self._add(message.value, message.pulses, received_s)

    def start(self) -> None:
        """Connects."""
        self.feeder.start()

    def close(self) -> None:
        """Disconnects. May be called twice."""
        self.feeder.close()


def open_scalar(
    url: str,
    belt: PulseBelt,
    *,
    sensor_mm: float,
    tolerance_mm: float,
    clock: Callable[[], float] = time.monotonic,
) -> ModbusScalar | MqttScalar:
    """Opens and starts the sensor of an address (see the head of this file); ask its `join` for values.

    A sensor that is not there is no error: items have no value until it answers.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`.
    """
    address, options = parse_address(url, ScalarOptions, schemes=("modbus", "mqtt"))
    join = ScalarJoin(
        sensor_mm=sensor_mm, tolerance_mm=tolerance_mm, keep=options.keep, low=options.low, high=options.high
    )
    sensor: ModbusScalar | MqttScalar
    if address.scheme == "modbus":
        table, first = address.register()
        port = ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0)
        sensor = ModbusScalar(join, belt, port, table, first, options, clock=clock)
    else:
        sensor = MqttScalar(join, belt, *address.broker(options, "scalar"), address.topic(), options, clock=clock)
    sensor.start()
    return sensor
