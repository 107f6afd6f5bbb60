"""Ejectors of real lines: shots handed to a PLC over Modbus, published over MQTT, or fired on GPIO pins.

    modbus://plc:502/holding/200?outlet=reject:1&outlet=juice:2&slots=16&ahead_mm=150
    mqtt://broker:1883/line1/shots?ahead_mm=300
    gpio:///dev/gpiochip0?valve=0:reject:17&valve=1:reject:18&pulse_ms=20

A network is too slow and too uneven to open a valve at the millimetre. The first two therefore want each shot ahead
of time (`announce`, as soon as the belt is within `ahead_mm` of the target); the device compares its own encoder with
the target and fires. `fire` hands over what was not announced; for an announced shot it does nothing.

The option `safe` chooses the state in which a line that ends leaves its outputs:

| device | `hold` | `off` | `eject` |
|---|---|---|---|
| Modbus | shots that the PLC has are fired (default) | they are withdrawn | by the PLC only, with `safe_register` |
| MQTT | shots that were published are fired (default) | - | - |
| GPIO | valves stay as they are | valves close (default) | valves open and stay open |

A line that dies without ending (power, a crash of the system) can do none of this. With `safe_register=N` the PLC finds
the state in a holding register (0 hold, 1 off, 2 eject) and applies it when the heartbeat (`heartbeat`) stops; the pins
of a GPIO chip fall to the state that its driver and the board's resistors give them.
"""

import logging
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sized
from typing import Annotated, Final

import msgspec

from edge_agent.devices.drivers.address import Milliseconds, Options, Positive, numbered, parse_address
from edge_agent.devices.drivers.gpio import GpiodPins, GpioEjector, SafeState
from edge_agent.devices.drivers.modbus import MAX_WRITE, ModbusPort, Registers
from edge_agent.devices.drivers.mqtt import TopicOut
from edge_agent.devices.drivers.pulses import PulseBelt
from edge_agent.devices.drivers.shot_queue import Announced, ShotQueue
from edge_agent.interfaces import Shot
from models.errors import ConfigError, UnavailableError

SLOT_WORDS: Final = 6
"""Sequence, lane, outlet, target (high, low), sequence again."""
SAFE_NUMBERS: Final[dict[SafeState, int]] = {"hold": 0, "off": 1, "eject": 2}
log = logging.getLogger("sortline.drivers")
_MAX_SEQUENCE: Final = 0xFFFF
_CLEAR_MM: Final = 10.0


class _HandingOver:
    """An ejector that hands each shot to a device ahead of time; `fire` hands over what was not announced."""

    def __init__(self, belt: PulseBelt, ahead_mm: float) -> None:
        self._belt = belt
        self.ahead_mm = ahead_mm
        """See `edge_agent.interfaces.AheadEjector`."""

    @abstractmethod
    def announce(self, shot: Shot, position_mm: float) -> bool:
        """See `edge_agent.interfaces.AheadEjector`."""

    def fire(self, shot: Shot, at_s: float) -> None:
        """Hands over a shot that was not announced.

        Raises:
            UnavailableError: `driver.not_handed_over`.
        """
        if not self.announce(shot, self._belt.position_mm(at_s)):
            raise _not_handed_over(shot)


class ModbusPlcEjector(_HandingOver):
    """Writes each shot into a ring of slots of a PLC, one multi-register write per shot.

    A slot is six holding registers: sequence, lane, outlet number, target count (high, low), sequence again. The PLC
    takes a slot when both sequences are equal, not 0, and other than those it took from this slot before; it fires
    when its counter reaches the target. A slot is used again only after its item has passed. On first contact the ring
    is emptied (all 0), so that shots of an earlier run are not fired.

    Args:
        registers: The PLC; used by this ejector's thread alone.
        first: Address of the ring.
        slots: Slots in it.
        outlets: Number of each outlet in the PLC.
        belt: The encoder whose counts the PLC compares.
        ahead_mm: See `edge_agent.interfaces.AheadEjector`.
        late_mm: A shot whose item has passed by more is not written.
        safe: State in which a line that ends leaves the PLC; see the head of this file.
        safe_register: Holding register in which the PLC finds `safe` (0 hold, 1 off, 2 eject), for a line that dies.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        registers: Registers,
        *,
        first: int,
        slots: int,
        outlets: Mapping[str, int],
        belt: PulseBelt,
        ahead_mm: float,
        late_mm: float = 3.0,
        safe: SafeState = "hold",
        safe_register: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(belt, ahead_mm)
        self._safe_register = safe_register
        self._registers, self._clock = registers, clock
        self._safe = safe
        self._first, self._outlets = first, dict(outlets)
        self._busy_to_mm: list[float | None] = [None] * slots
        self._next = 0
        self._trying = (0, 0)
        self._emptied = False
        self.counters: Counter[str] = Counter()
        """unknown_outlet, no_count, ring_full"""
        self.queue = ShotQueue(self._write, belt, late_mm=late_mm, clock=clock)

    def announce(self, shot: Shot, position_mm: float) -> bool:
        """See `edge_agent.interfaces.AheadEjector`."""
        if shot.outlet not in self._outlets:
            self.counters["unknown_outlet"] += 1
            return False
        if self._belt.pulses_at(shot.target_mm) is None:
            self.counters["no_count"] += 1
            return False
        return self.queue.offer(shot, position_mm)

    def _write(self, entry: Announced) -> None:
        if not self._emptied:
            self._empty()
        target = self._belt.pulses_at(entry.shot.target_mm)
        if target is None:
            raise UnavailableError("driver.no_answer", "The device does not answer.", expected="a belt position")
        # A repeated write goes where the first went: it may have arrived although no answer came.
        slot = self._trying[1] if self._trying[0] == entry.sequence else self._free_slot()
        self._trying = (entry.sequence, slot)
        sequence = (entry.sequence - 1) % _MAX_SEQUENCE + 1
        words = [
            sequence,
            entry.shot.lane,
            self._outlets[entry.shot.outlet],
            target >> 16,
            target & 0xFFFF,
            sequence,
        ]
        self._registers.write(self._first + slot * SLOT_WORDS, words)
        self._busy_to_mm[slot] = entry.shot.target_mm
        self._next = slot + 1

    def _free_slot(self) -> int:
        """Returns the next slot whose item has passed."""
        position_mm = self._belt.position_mm(self._clock())
        for k in range(len(self._busy_to_mm)):
            slot = (self._next + k) % len(self._busy_to_mm)
            target_mm = self._busy_to_mm[slot]
            if target_mm is None or position_mm > target_mm + _CLEAR_MM:
                self._busy_to_mm[slot] = None
                return slot
        self.counters["ring_full"] += 1
        raise UnavailableError("driver.ring_full", "Every slot of the PLC holds a shot that is still to come.")

    def _empty(self) -> None:
        words = len(self._busy_to_mm) * SLOT_WORDS
        for at in range(0, words, MAX_WRITE):
            self._registers.write(self._first + at, [0] * min(MAX_WRITE, words - at))
        if self._safe_register is not None and not self._emptied:
            self._registers.write(self._safe_register, [SAFE_NUMBERS[self._safe]])
        self._emptied = True

    def start(self) -> None:
        """Starts the thread that writes."""
        self.queue.start("hand-over")

    def close(self) -> None:
        """Ends the thread and leaves the PLC in the safe state. May be called twice."""
        self.queue.close()
        if self._emptied and self._safe == "off":
            try:
                self._empty()
            except UnavailableError as error:
                log.warning("the shots in the PLC could not be withdrawn: %s", error)
            self._emptied = False
        self._registers.close()


class ShotMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The message for a shot; `sequence` shows repetitions (QoS 1) and gaps."""

    sequence: int
    lane: int
    outlet: str
    item_id: int
    target_mm: float
    position_mm: float
    """Belt position when the shot was announced: `target_mm - position_mm` is what was left to travel."""
    target_pulses: int | None
    """The encoder's count at the target, where a counter is known."""


class MqttEjector(_HandingOver):
    """Publishes each shot ahead of time.

    Args:
        out: The topic.
        belt: The encoder.
        ahead_mm: See `edge_agent.interfaces.AheadEjector`.
        late_mm: A shot whose item has passed by more is not published.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        out: TopicOut,
        *,
        belt: PulseBelt,
        ahead_mm: float,
        late_mm: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(belt, ahead_mm)
        self._out = out
        self.queue = ShotQueue(self._publish, belt, late_mm=late_mm, clock=clock)

    def announce(self, shot: Shot, position_mm: float) -> bool:
        """See `edge_agent.interfaces.AheadEjector`."""
        return self.queue.offer(shot, position_mm)

    def _publish(self, entry: Announced) -> None:
        message = ShotMessage(
            sequence=entry.sequence,
            lane=entry.shot.lane,
            outlet=entry.shot.outlet,
            item_id=entry.shot.item_id,
            target_mm=entry.shot.target_mm,
            position_mm=entry.position_mm,
            target_pulses=self._belt.pulses_at(entry.shot.target_mm),
        )
        self._out.send(msgspec.json.encode(message))

    def start(self) -> None:
        """Connects and starts the thread that publishes."""
        self._out.start()
        self.queue.start("hand-over")

    def close(self) -> None:
        """Ends the thread and the connection. May be called twice."""
        self.queue.close()
        self._out.close()


def _not_handed_over(shot: Shot) -> UnavailableError:
    return UnavailableError("driver.not_handed_over", "A shot could not be handed over.", item=shot.item_id)


class EjectorOptions(Options, frozen=True, kw_only=True):
    """Options of an ejector's address."""

    ahead_mm: Positive = 150.0
    late_mm: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 3.0
    slots: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    outlet: tuple[str, ...] = ()
    """`NAME:NUMBER` of each outlet in the PLC."""
    valve: tuple[str, ...] = ()
    """`LANE:OUTLET:LINE` of each valve on the chip."""
    pulse_ms: Milliseconds = 20.0
    active_low: bool = False
    safe: SafeState | None = None
    """State in which a line that ends leaves its outputs; None = `off` for GPIO, else `hold`."""
    safe_register: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)] | None = None
    """Modbus: holding register in which the PLC finds the safe state."""


def open_ejector(
    url: str, belt: PulseBelt, *, clock: Callable[[], float] = time.monotonic
) -> ModbusPlcEjector | MqttEjector | GpioEjector:
    """Opens and starts the ejector of an address (see the head of this file).

    A PLC or broker that is not there is no error: shots are tried until their items have passed.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`, `driver.no_pins`.
    """
    address, options = parse_address(url, EjectorOptions, schemes=("modbus", "mqtt", "gpio"), many=("outlet", "valve"))
    ejector: ModbusPlcEjector | MqttEjector | GpioEjector
    if address.scheme == "gpio":
        valves = {}
        for (lane, outlet), line in numbered(options.valve, parts=3, limit=4095).items():
            if lane not in {str(number) for number in range(8)}:
                raise ConfigError("driver.bad_option", "A valve is wrong.", expected="a lane from 0 to 7", got=lane)
            valves[int(lane), outlet] = line
        _need(valves, "valve=LANE:OUTLET:LINE")
        pins = GpiodPins(address.path or f"/dev/{address.host}", valves.values(), active_low=options.active_low)
        ejector = GpioEjector(pins, valves, pulse_s=options.pulse_ms / 1000.0, safe=options.safe or "off", clock=clock)
    elif address.scheme == "mqtt":
        _check_safe(options, ("hold",))
        out = TopicOut(*address.broker(options, "ejector"), address.topic())
        ejector = MqttEjector(out, belt=belt, ahead_mm=options.ahead_mm, late_mm=options.late_mm, clock=clock)
    else:
        table, first = address.register()
        _check_safe(options, ("hold", "off") if options.safe_register is None else ("hold", "off", "eject"))
        outlets = {name: number for (name,), number in numbered(options.outlet, parts=2, limit=0xFFFF).items()}
        _need(outlets, "outlet=NAME:NUMBER")
        if table != "holding" or first + options.slots * SLOT_WORDS > 0x10000:
            raise ConfigError(
                "driver.bad_option", "The ring does not fit.", expected="holding registers below 65536", got=first
            )
        ejector = ModbusPlcEjector(
            ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0),
            first=first,
            slots=options.slots,
            outlets=outlets,
            belt=belt,
            ahead_mm=options.ahead_mm,
            late_mm=options.late_mm,
            safe=options.safe or "hold",
            safe_register=options.safe_register,
            clock=clock,
        )
    ejector.start()
    return ejector


def _check_safe(options: EjectorOptions, possible: tuple[SafeState, ...]) -> None:
    if options.safe is not None and options.safe not in possible:
        raise ConfigError(
            "driver.bad_option",
            "This device cannot be left in such a safe state; `eject` over Modbus needs safe_register.",
            expected=" or ".join(possible),
            got=options.safe,
        )


def _need(given: Sized, what: str) -> None:
    if not given:
        raise ConfigError("driver.bad_option", "An ejector needs outlets.", expected=what, got="none")
