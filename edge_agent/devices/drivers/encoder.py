"""Encoders of real belts: a PLC's register pair polled over Modbus, or an MQTT topic; both feed a `PulseEncoder`.

modbus://plc:502/input/100?mm_per_pulse=0.1&bits=32&words=big&poll_ms=10
mqtt://broker:1883/line1/encoder?mm_per_pulse=0.1       {"pulses": 123456, "at_ms": 1712345678901}
"""

import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from edge_agent.config import BrokerConfig
from edge_agent.devices.drivers.address import Finite, Milliseconds, Options, Positive, Table, parse_address
from edge_agent.devices.drivers.modbus import ModbusPort, RegisterPoller, Registers, WordOrder, unsigned
from edge_agent.devices.drivers.mqtt import SenderClock, TopicFeed
from edge_agent.devices.drivers.pulses import PulseEncoder


class EncoderOptions(Options, frozen=True, kw_only=True):
    """Options of an encoder's address."""

    mm_per_pulse: Finite
    bits: Literal[16, 32] = 32
    words: WordOrder = "big"
    """Which register of a pair comes first: the high one (`big`) or the low one."""
    poll_ms: Annotated[float, msgspec.Meta(ge=1.0, le=10_000.0)] = 10.0
    stale_ms: Milliseconds = 250.0
    extrapolate_ms: Milliseconds = 100.0
    max_mm_s: Positive = 5000.0


class _DeviceEncoder(PulseEncoder):
    """A `PulseEncoder` with the options of an address."""

    def __init__(self, options: EncoderOptions, clock: Callable[[], float]) -> None:
        super().__init__(
            mm_per_pulse=options.mm_per_pulse,
            bits=options.bits,
            stale_ms=options.stale_ms,
            extrapolate_ms=options.extrapolate_ms,
            max_mm_s=options.max_mm_s,
            clock=clock,
        )


class ModbusEncoder(_DeviceEncoder):
    """Polls a counter of one or two registers in a thread of its own.

    Args:
        registers: The PLC; used by this encoder alone.
        table: `input` or `holding`.
        address: First register.
        options: Options of the address.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        registers: Registers,
        table: Table,
        address: int,
        options: EncoderOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(options, clock)
        self._words: WordOrder = options.words
        self.poller = RegisterPoller(
            registers,
            table,
            address,
            options.bits // 16,
            every_s=options.poll_ms / 1000.0,
            deliver=self._take,
            slow_s=options.stale_ms / 1000.0,
            clock=clock,
        )

    def _take(self, words: list[int], at_s: float) -> None:
        self.feed(unsigned(words, self._words), at_s)

    def start(self) -> None:
        """Begins to poll."""
        self.poller.start("encoder")

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self.poller.close()


class Pulses(msgspec.Struct, frozen=True):
    """The message of an encoder."""

    pulses: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    at_ms: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Time on the sender's clock, of any epoch; it grows."""


class MqttEncoder(_DeviceEncoder):
    """Takes counts from a topic.

    Args:
        broker: Address of the broker, user and password file.
        client_id: MQTT client id.
        topic: Exact topic.
        options: Options of the address.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        topic: str,
        options: EncoderOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(options, clock)
        self.sender_clock = SenderClock(options.stale_ms / 1000.0)
        self.feeder = TopicFeed(broker, client_id, topic, Pulses, deliver=self.take, clock=clock)

    def take(self, message: Pulses, received_s: float) -> None:
        """Feeds a message that arrived at `received_s`."""
        at_s = self.sender_clock.local_s(message.at_ms, received_s)
        if at_s is not None:
            self.feed(message.pulses, at_s)

    def start(self) -> None:
        """Connects."""
        self.feeder.start()

    def close(self) -> None:
        """Disconnects. May be called twice."""
        self.feeder.close()


def open_encoder(url: str, *, clock: Callable[[], float] = time.monotonic) -> ModbusEncoder | MqttEncoder:
    """Opens and starts the encoder of an address (see the head of this file).

    A device that is not there is no error: the encoder is stale until it answers.

    Raises:
        ConfigError: `driver.bad_url`, `driver.bad_option`, `driver.missing_library`.
    """
    address, options = parse_address(url, EncoderOptions, schemes=("modbus", "mqtt"))
    encoder: ModbusEncoder | MqttEncoder
    if address.scheme == "modbus":
        table, first = address.register()
        port = ModbusPort(address.host, address.port, unit=options.unit, timeout_s=options.timeout_ms / 1000.0)
        encoder = ModbusEncoder(port, table, first, options, clock=clock)
    else:
        encoder = MqttEncoder(*address.broker(options, "encoder"), address.topic(), options, clock=clock)
    encoder.start()
    return encoder
