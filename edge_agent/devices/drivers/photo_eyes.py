"""Photo-eyes behind the ejectors: digital inputs of a PLC, a topic, or the box's own pins.

    modbus://plc:502/discrete/12?eye=0:reject:0&eye=1:reject:1&poll_ms=5
    modbus://plc:502/input/400?eye=0:reject:0&pulses=true
    mqtt://broker:1883/line1/eyes?eye=0:reject:0            {"eye": 0, "pulses": 123456}
    gpio:///dev/gpiochip0?eye=0:reject:22&debounce_ms=2

`eye=LANE:OUTLET:NUMBER` names each eye of an address. The number is, for a discrete input, its place behind the first
one; for registers the place of the eye's counter of sightings behind the first one, where with `pulses=true` each eye
has three registers (counter, and the encoder's count at the newest sighting, high and low); for MQTT the `eye` of the
message; for GPIO the line. Discrete inputs are polled, so an item must cover the eye longer than `poll_ms`.

Where no count says where the belt was, the position at the time of the sighting counts: the kernel's time of the edge
for GPIO, the middle of the request for Modbus, the arrival for MQTT.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Final, Protocol, TypeAlias

import msgspec

from edge_agent.devices.drivers.address import Address, Options, Positive, Table, numbered, parse_address
from edge_agent.devices.drivers.gpio import GpiodEdges
from edge_agent.devices.drivers.modbus import MAX_READ, ModbusPort, RegisterPoller, Registers, WordOrder, unsigned
from edge_agent.devices.drivers.mqtt import TopicFeed
from edge_agent.devices.drivers.pulses import PulseBelt
from edge_agent.interfaces import Sighting
from models.errors import ConfigError

Eye: TypeAlias = tuple[int, str]
"""(lane, outlet)."""
_KEEP: Final = 1024
_COUNTS: Final = 1 << 16
_WORDS_WITH_PULSES: Final = 3


class PhotoEyes:
    """Sightings of all eyes of a line, in the order of their arrival; implements `Confirmation`.

    Any thread may add, the sorting thread takes; both take microseconds.

    Args:
        belt: The encoder, with whose positions shots and sightings are compared.
        min_mm: Two sightings of one eye closer than this on the belt are one item.
        reach_mm: A count farther from the present belt position is wrong.
    """

    def __init__(self, belt: PulseBelt, *, min_mm: float = 15.0, reach_mm: float = 10_000.0) -> None:
        self._belt, self._min_mm, self._reach_mm = belt, min_mm, reach_mm
        self._waiting: deque[tuple[float, Sighting]] = deque()
        self._last_mm: dict[Eye, float] = {}
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        """seen, chatter (too close to the sighting before), wrong_place, dropped (nothing took them), unknown_eye,
        missed (a counter went on by more than one)"""

    def saw(self, eye: Eye, at_s: float, pulses: int | None = None) -> None:
        """Adds a sighting. Never raises, never waits for a device.

        Args:
            eye: Lane and outlet.
            at_s: When, monotonic seconds.
            pulses: The encoder's count at the sighting, where it is known.
        """
        here_mm = self._belt.position_mm(at_s)
        place_mm = here_mm if pulses is None else self._belt.position_of(pulses)
        with self._lock:
            if place_mm is None or abs(place_mm - here_mm) > self._reach_mm:
                self.counters["wrong_place"] += 1
                return
            before_mm = self._last_mm.get(eye)
            if before_mm is not None and abs(place_mm - before_mm) < self._min_mm:
                self.counters["chatter"] += 1
                return
            self._last_mm[eye] = place_mm
            self._waiting.append((at_s, Sighting(*eye, place_mm)))
            self.counters["seen"] += 1
            if len(self._waiting) > _KEEP:
                self._waiting.popleft()
                self.counters["dropped"] += 1

    def sightings(self, until_s: float) -> list[Sighting]:
        """See `edge_agent.interfaces.Confirmation`."""
        with self._lock:
            taken = [sighting for at_s, sighting in self._waiting if at_s <= until_s]
            if taken:
                self._waiting = deque(entry for entry in self._waiting if entry[0] > until_s)
        return taken


class ModbusEyes:
    """Polls the inputs or counters of a PLC in a thread of its own.

    Args:
        eyes: Takes the sightings.
        registers: The PLC; used by this thread alone.
        table: `discrete` for inputs, `input` or `holding` for counters.
        first: Address of the first one.
        numbers: Place of each eye behind the first one.
        pulses: Each counter is followed by the encoder's count, two registers.
        words: Which register of a count comes first.
        every_s: From one request to the next.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        eyes: PhotoEyes,
        registers: Registers,
        table: Table,
        first: int,
        numbers: Mapping[Eye, int],
        *,
        pulses: bool = False,
        words: WordOrder = "big",
        every_s: float = 0.005,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._eyes, self._table, self._numbers, self._words = eyes, table, dict(numbers), words
        self._stride = _WORDS_WITH_PULSES if pulses else 1
        self._before: list[int] | None = None
        count = (max(self._numbers.values()) + 1) * self._stride
        self.poller = RegisterPoller(registers, table, first, count, every_s=every_s, deliver=self.take, clock=clock)

    def take(self, words: list[int], at_s: float) -> None:
        """Takes what was read at `at_s`. What stood there at first contact is of unknown age: no sighting."""
        before, self._before = self._before, words
        if before is None:
            return
        for eye, number in self._numbers.items():
            at = number * self._stride
            more = (words[at] - before[at]) % _COUNTS
            if self._table in {"discrete", "coil"}:
                more = int(words[at] > before[at])
            if not more:
                continue
            self._eyes.counters["missed"] += more - 1
            counted = self._stride > 1
            self._eyes.saw(eye, at_s, unsigned(words[at + 1 : at + 3], self._words) if counted else None)

    def start(self) -> None:
        """Begins to poll."""
        self.poller.start("photo-eyes")

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self.poller.close()


class EyeMessage(msgspec.Struct, frozen=True):
    """What a photo-eye publishes at each sighting."""

    eye: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    pulses: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    """The encoder's count at the sighting."""


class EyeOptions(Options, frozen=True, kw_only=True):
    """Options of an address."""

    eye: tuple[str, ...] = ()
    """`LANE:OUTLET:NUMBER` of each eye."""
    pulses: bool = False
    words: WordOrder = "big"
    poll_ms: Annotated[float, msgspec.Meta(ge=1.0, le=10_000.0)] = 5.0
    debounce_ms: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 2.0
    """GPIO: a change that lasts shorter is ignored."""
    active_low: bool = False
    min_mm: Positive = 15.0
    """Two sightings of one eye closer than this are one item."""


class _Source(Protocol):
    def start(self) -> None:
        """Begins."""

    def close(self) -> None:
        """Ends. May be called twice."""


class OpenedEyes(PhotoEyes):
    """The eyes of a line with the devices they come from; closing it closes them."""

    def __init__(self, belt: PulseBelt, *, min_mm: float) -> None:
        super().__init__(belt, min_mm=min_mm)
        self.sources: list[_Source] = []

    def close(self) -> None:
        """Ends all threads and connections. May be called twice."""
        for source in self.sources:
            source.close()


def open_photo_eyes(urls: Iterable[str], belt: PulseBelt, *, clock: Callable[[], float] = time.monotonic) -> OpenedEyes:
    """Opens and starts the eyes of some addresses (see the head of this file).

    A device that is not there is no error: it is asked again and again, and meanwhile every shot counts as missed.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`, `driver.no_pins`.
    """
    parsed = [_parse(url) for url in urls]
    eyes = OpenedEyes(belt, min_mm=max((options.min_mm for _, options in parsed), default=15.0))
    try:
        for address, options in parsed:
            numbers = _numbers(options)
            source: _Source
            if address.scheme == "gpio":
                source = _gpio_eyes(eyes, address.path or f"/dev/{address.host}", numbers, options)
            elif address.scheme == "mqtt":
                names = {number: eye for eye, number in numbers.items()}
                source = TopicFeed(
                    *address.broker(options, "eyes"),
                    address.topic(),
                    EyeMessage,
                    deliver=_deliver_to(eyes, names),
                    clock=clock,
                )
            else:
                table, first = address.register(("discrete", "coil", "input", "holding"))
                bits = table in {"discrete", "coil"}
                size = (max(numbers.values()) + 1) * (_WORDS_WITH_PULSES if options.pulses else 1)
                if size > MAX_READ or first + size > _COUNTS or (bits and options.pulses):
                    raise ConfigError(
                        "driver.bad_option",
                        "The photo-eyes cannot be read.",
                        expected=f"at most {MAX_READ} registers below {_COUNTS}, pulses=true with registers only",
                        got=address.shown,
                    )
                port = ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0)
                source = ModbusEyes(
                    eyes,
                    port,
                    table,
                    first,
                    numbers,
                    pulses=options.pulses,
                    words=options.words,
                    every_s=options.poll_ms / 1000.0,
                    clock=clock,
                )
            eyes.sources.append(source)
            source.start()
    except ConfigError:
        eyes.close()
        raise
    return eyes


def places_of(urls: Iterable[str]) -> set[Eye]:
    """Returns lane and outlet of each eye that the addresses name; opens nothing.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`.
    """
    return {eye for url in urls for eye in _numbers(_parse(url)[1])}


def _parse(url: str) -> tuple[Address, EyeOptions]:
    return parse_address(url, EyeOptions, schemes=("modbus", "mqtt", "gpio"), many=("eye",))


def _numbers(options: EyeOptions) -> dict[Eye, int]:
    found: dict[Eye, int] = {}
    for (lane, outlet), number in numbered(options.eye, parts=3, limit=0xFFFF).items():
        if lane not in {str(known) for known in range(8)}:
            raise ConfigError("driver.bad_option", "A photo-eye is wrong.", expected="a lane from 0 to 7", got=lane)
        found[int(lane), outlet] = number
    if not found or len(set(found.values())) != len(found):
        raise ConfigError(
            "driver.bad_option",
            "Photo-eyes need different numbers.",
            expected="eye=LANE:OUTLET:NUMBER, each number once",
            got=options.eye,
        )
    return found


def _gpio_eyes(eyes: PhotoEyes, chip: str, numbers: Mapping[Eye, int], options: EyeOptions) -> GpiodEdges:
    names = {line: eye for eye, line in numbers.items()}
    return GpiodEdges(
        chip,
        names,
        lambda line, at_s: eyes.saw(names[line], at_s),
        active_low=options.active_low,
        debounce_ms=options.debounce_ms,
    )


def _deliver_to(eyes: PhotoEyes, names: Mapping[int, Eye]) -> Callable[[EyeMessage, float], None]:
    def deliver(message: EyeMessage, received_s: float) -> None:
        eye = names.get(message.eye)
        if eye is None:
            eyes.counters["unknown_eye"] += 1
            return
        eyes.saw(eye, received_s, message.pulses)

    return deliver
