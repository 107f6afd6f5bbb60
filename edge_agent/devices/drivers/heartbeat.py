"""A heartbeat output: it changes while the line is healthy, so that a PLC notices a line that is dead.

    modbus://plc:502/coil/20?every_ms=250
    modbus://plc:502/holding/310
    mqtt://broker:1883/line1/heartbeat                      {"sequence": 7}
    gpio:///dev/gpiochip0?line=25

A coil or a pin is toggled, a register and the message count. The output changes only while the sorting thread turns,
so it stands still when the line hangs, has crashed or has no power. What follows is for the PLC to decide; see
`safe_register` in `ejectors`. When the line ends in order, pin and coil go off.

A camera at fault does not stop the heartbeat: the fail-safe (`line.fail_safe`) acts on that.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from edge_agent.devices.drivers.address import Address, Options, parse_address
from edge_agent.devices.drivers.gpio import GpiodPins
from edge_agent.devices.drivers.modbus import ModbusPort
from edge_agent.devices.drivers.mqtt import TopicOut
from models.errors import ConfigError, UnavailableError

log = logging.getLogger("sortline.drivers")
_COUNTS: Final = 1 << 16


class HeartbeatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What is published at each beat."""

    sequence: int
    """Counts the beats from 1."""


class HeartbeatOutput:
    """Changes an output as long as the line says that it turns; see `edge_agent.interfaces.Heartbeat`.

    Args:
        write: Writes beat number n (from 1; 0 = the line ends); raises UnavailableError or OSError.
        every_s: From one change to the next.
        patience_s: A sorting thread that has not turned for so long is dead.
        end: Closes the device.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        write: Callable[[int], None],
        *,
        every_s: float = 0.25,
        patience_s: float = 1.0,
        end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every_s, self._patience_s, self._end, self._clock = write, every_s, patience_s, end, clock
        self._turned_s: float | None = None
        self._sequence = 0
        self._failing = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()
        """beats, skipped (the line did not turn), no_answer"""

    def turned(self) -> None:
        """See `edge_agent.interfaces.Heartbeat`."""
        self._turned_s = self._clock()

    def step(self) -> None:
        """Writes the next beat if the line is healthy."""
        if self._turned_s is None or self._clock() - self._turned_s > self._patience_s:
            self.counters["skipped"] += 1
            return
        self._sequence += 1
        self._try(self._sequence)

    def _try(self, sequence: int) -> None:
        try:
            self._write(sequence)
        except (UnavailableError, OSError) as error:
            self.counters["no_answer"] += 1
            if not self._failing:
                log.warning("heartbeat: %s", error)
            self._failing = True
        else:
            self._failing = False
            self.counters["beats"] += 1

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.step()

    def close(self) -> None:
        """Ends the thread and switches pin or coil off. May be called twice."""
        already = self._stopping.is_set()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if not already:
            self._try(0)
            self._end()


class HeartbeatOptions(Options, frozen=True, kw_only=True):
    """Options of an address."""

    every_ms: Annotated[float, msgspec.Meta(ge=20.0, le=10_000.0)] = 250.0
    patience_ms: Annotated[float, msgspec.Meta(ge=500.0, le=60_000.0)] = 1000.0
    """A line that has not turned for so long is dead; it turns at least four times a second."""
    line: Annotated[int, msgspec.Meta(ge=0, le=4095)] | None = None
    """GPIO: offset of the pin."""
    active_low: bool = False


def open_heartbeat(url: str) -> HeartbeatOutput:
    """Opens and starts what an address names (see the head of this file).

    A device that is not there is no error: each beat is tried once.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`, `driver.no_pins`.
    """
    address, options = parse_address(url, HeartbeatOptions, schemes=("modbus", "mqtt", "gpio"))
    write, end = _connect(address, options)
    output = HeartbeatOutput(write, every_s=options.every_ms / 1000.0, patience_s=options.patience_ms / 1000.0, end=end)
    log.info("heartbeat at %s", address.shown)
    output.start()
    return output


def _connect(address: Address, options: HeartbeatOptions) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Returns what writes a beat, and what closes the device."""
    if address.scheme == "gpio":
        line = options.line
        if line is None:
            raise ConfigError("driver.bad_option", "A heartbeat needs its pin.", expected="line=OFFSET", got="none")
        pins = GpiodPins(address.path or f"/dev/{address.host}", [line], active_low=options.active_low)
        return lambda n: pins.set(line, active=n % 2 == 1), pins.release
    if address.scheme == "mqtt":
        out = TopicOut(*address.broker(options, "heartbeat"), address.topic())
        out.start()
        return lambda n: out.send(msgspec.json.encode(HeartbeatMessage(sequence=n))), out.close
    table, place = address.register(("coil", "holding"))
    port = ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0)
    if table == "coil":
        return lambda n: port.write_coil(place, active=n % 2 == 1), port.close
    # 0 is what stands there before the first beat and after the last one.
    return lambda n: port.write(place, [n and (n - 1) % (_COUNTS - 1) + 1]), port.close
