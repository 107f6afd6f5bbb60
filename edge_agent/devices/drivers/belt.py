"""Stops the belt for a fail-safe: a request in a register of the PLC, or a message.

    modbus://plc:502/holding/300
    mqtt://broker:1883/line1/belt

Modbus: the register holds 1 while the belt shall stand, else 0. MQTT: `{"stop": true, "reason": "camera.frozen",
"sequence": 7}`, QoS 1, not retained. Both repeat the request every `every_ms`, so that a PLC notices an agent that is
gone: its request is no longer repeated. Nothing is written before the first request, so a restarted agent does not
start a belt that its predecessor stopped. Whether the belt may run again is for the machine's own safety chain.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Annotated

import msgspec

from edge_agent.devices.drivers.address import Options, parse_address
from edge_agent.devices.drivers.modbus import ModbusPort
from edge_agent.devices.drivers.mqtt import TopicOut
from models.errors import ConfigError, UnavailableError

log = logging.getLogger("sortline.drivers")


class BeltMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What is published."""

    stop: bool
    reason: str
    sequence: int


class RepeatedRequest:
    """Repeats a request to a device; see `edge_agent.interfaces.BeltControl`.

    Args:
        send: Sends the request; raises UnavailableError when the device does not answer.
        every_s: From one repetition to the next.
        end: Closes the device.
    """

    def __init__(
        self, send: Callable[[BeltMessage], None], *, every_s: float = 0.5, end: Callable[[], None] = lambda: None
    ) -> None:
        self._send, self._every_s, self._end = send, every_s, end
        self._requested: BeltMessage | None = None
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()
        """sent, no_answer"""

    def stop(self, reason: str) -> None:
        """See `BeltControl`."""
        self._request(stop=True, reason=reason)

    def run(self) -> None:
        """See `BeltControl`."""
        self._request(stop=False, reason="")

    def _request(self, *, stop: bool, reason: str) -> None:
        sequence = self._requested.sequence + 1 if self._requested else 1
        self._requested = BeltMessage(stop=stop, reason=reason, sequence=sequence)
        self._wake.set()

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._repeat, name="belt", daemon=True)
        self._thread.start()

    def _repeat(self) -> None:
        failing = False
        while not self._closing:
            self._wake.wait(self._every_s if self._requested else None)
            self._wake.clear()
            request = self._requested
            if request is None:
                continue
            try:
                self._send(request)
            except UnavailableError as error:
                self.counters["no_answer"] += 1
                if not failing:
                    log.warning("%s", error)
                failing = True
            else:
                failing = False
                self.counters["sent"] += 1

    def close(self) -> None:
        """Ends the thread; the last request stands. May be called twice."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(1.0)
        self._end()


class BeltOptions(Options, frozen=True, kw_only=True):
    """Options of an address."""

    every_ms: Annotated[float, msgspec.Meta(ge=50.0, le=10_000.0)] = 500.0


def open_belt(url: str) -> RepeatedRequest:
    """Opens and starts what an address names. A device that is not there is no error: the request is repeated.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`.
    """
    address, options = parse_address(url, BeltOptions, schemes=("modbus", "mqtt"))
    every_s = options.every_ms / 1000.0
    if address.scheme == "mqtt":
        out = TopicOut(*address.broker(options, "belt"), address.topic())
        out.start()
        control = RepeatedRequest(lambda m: out.send(msgspec.json.encode(m)), every_s=every_s, end=out.close)
    else:
        table, register = address.register()
        if table != "holding":
            raise ConfigError(
                "driver.bad_url", "A request is written.", expected="/holding/NUMBER, counted from 0", got=address.shown
            )
        port = ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0)
        control = RepeatedRequest(lambda m: port.write(register, [int(m.stop)]), every_s=every_s, end=port.close)
    control.start()
    return control
