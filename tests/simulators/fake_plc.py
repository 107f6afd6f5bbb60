"""A PLC in memory and a clock for drivers, without processes."""

from collections.abc import Sequence

from edge_agent.devices.drivers.pulses import PulseEncoder
from models.errors import UnavailableError

HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"pulses": 1}',
    b'{"pulses": NaN, "at_ms": 1}',
    b'{"pulses": 1.5, "at_ms": 1}',
    b'{"pulses": true, "at_ms": 1}',
    b'{"pulses": "1", "at_ms": 1}',
    b'{"pulses": -1, "at_ms": 1}',
    b'{"pulses": 4294967296, "at_ms": 1}',
    b'{"pulses": 1, "at_ms": 1e999}',
    b'{"pulses": 1, "at_ms": 99999999999999999999}',
    b'{"x":' + b"[" * 1000,
    b'{"pulses": 1, "at_ms": 1, "x": "' + b"a" * 2000 + b'"}',
]
"""Messages no driver may believe or break at."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakePlc:
    """Registers in memory; `broken` requests fail, each costs `takes_s`."""

    def __init__(self, clock: Clock) -> None:
        self.words = [0] * 0x10000
        self.clock, self.takes_s = clock, 0.0
        self.broken = 0
        self.writes: list[tuple[int, list[int]]] = []
        self.closed = 0

    def _request(self) -> None:
        self.clock.now_s += self.takes_s
        if self.broken:
            self.broken -= 1
            raise UnavailableError("driver.no_answer", "The device does not answer.")

    def read(self, _table: str, first: int, count: int) -> list[int]:
        self._request()
        return self.words[first : first + count]

    def write(self, first: int, values: Sequence[int]) -> None:
        self.words[first : first + len(values)] = values  # also when the answer is lost
        self.writes.append((first, list(values)))
        self._request()

    def close(self) -> None:
        self.closed += 1


def broken(*_: object) -> None:
    raise RuntimeError("a driver's bug")


def encoder_at(clock: Clock, *pulses: int, every_s: float = 0.01, **options: object) -> PulseEncoder:
    """An encoder that has just been fed."""
    encoder = PulseEncoder(**({"mm_per_pulse": 0.1, "clock": clock} | options))
    for k, count in enumerate(pulses):
        clock.now_s += every_s * bool(k)
        assert encoder.feed(count, clock.now_s)
    return encoder
