"""Valves on the box's own pins: opened at once, closed by a timing thread after the width of the pulse."""

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from edge_agent.devices.drivers.address import load_extra
from edge_agent.interfaces import Shot
from models.errors import ConfigError, UnavailableError

log = logging.getLogger("sortline.drivers")
_RETRY_S: Final = 0.01
_IDLE_S: Final = 0.5


class Pins(Protocol):
    """Output lines of a GPIO chip; setting one takes microseconds. Raises OSError."""

    def set(self, line: int, *, active: bool) -> None:
        """Opens or closes a valve."""

    def release(self) -> None:
        """Gives the lines back."""


class GpiodPins:
    """Lines of a chip through libgpiod v2.

    Args:
        chip: Path of the character device.
        lines: Offsets of the lines.
        active_low: The valve opens when the pin is low.

    Raises:
        ConfigError: `driver.missing_library`, `driver.no_pins`.
    """

    def __init__(self, chip: str, lines: Iterable[int], *, active_low: bool = False) -> None:
        gpiod = load_extra("gpiod", "gpio")
        if not hasattr(gpiod, "request_lines"):
            raise ConfigError(
                "driver.missing_library",
                "This device needs a library that is not installed: pip install 'sortline[gpio]'.",
                expected="gpiod 2",
                got="gpiod 1",
            )
        line = load_extra("gpiod.line", "gpio")
        self._active, self._inactive = line.Value.ACTIVE, line.Value.INACTIVE
        settings = gpiod.LineSettings(
            direction=line.Direction.OUTPUT, output_value=line.Value.INACTIVE, active_low=active_low
        )
        try:
            self._request: Any = gpiod.request_lines(
                chip, consumer="sortline", config={tuple(sorted(set(lines))): settings}
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                "driver.no_pins", "The valves' pins cannot be taken.", expected=f"free lines of {chip}", got=error
            ) from error

    def set(self, line: int, *, active: bool) -> None:
        """See `Pins`."""
        self._request.set_value(line, self._active if active else self._inactive)

    def release(self) -> None:
        """See `Pins`."""
        self._request.release()


class ValveTimer:
    """When each open valve closes. A valve that is fired again while open stays open until the later end."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []
        self._end_of: dict[int, float] = {}

    def open(self, line: int, until_s: float) -> None:
        """Notes the end of a pulse."""
        self._end_of[line] = max(until_s, self._end_of.get(line, until_s))
        heapq.heappush(self._ends, (until_s, line))

    def due(self, at_s: float) -> list[int]:
        """Takes the valves whose time has come."""
        lines = []
        while self._ends and self._ends[0][0] <= at_s:
            end_s, line = heapq.heappop(self._ends)
            if self._end_of.get(line) == end_s:
                del self._end_of[line]
                lines.append(line)
        return lines

    def wait_s(self, at_s: float) -> float:
        """Seconds until the next valve may close."""
        return min(max(self._ends[0][0] - at_s, 0.0), _IDLE_S) if self._ends else _IDLE_S


class GpioEjector:
    """Fires a valve directly; implements `Ejector`.

    Args:
        pins: The lines.
        valves: Line by (lane, outlet).
        pulse_s: How long a valve stays open.
        clock: Monotonic seconds.
    """

    ahead_mm = 0.0
    """Wants shots when they are due."""

    def __init__(
        self,
        pins: Pins,
        valves: Mapping[tuple[int, str], int],
        *,
        pulse_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pins, self._valves, self._pulse_s, self._clock = pins, dict(valves), pulse_s, clock
        self._timer = ValveTimer()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()
        """fired, closed, unknown_outlet, close_failed"""

    def fire(self, shot: Shot, at_s: float) -> None:
        """Opens the valve now.

        Raises:
            UnavailableError: `driver.no_valve`: the pin cannot be set, there is none, or the ejector is closed.
        """
        line = self._valves.get((shot.lane, shot.outlet))
        if line is None:
            self.counters["unknown_outlet"] += 1
            raise UnavailableError("driver.no_valve", "There is no such valve.", got=f"{shot.lane}:{shot.outlet}")
        with self._wake:
            if self._stopping:
                raise UnavailableError("driver.no_valve", "There is no such valve.", got="closed")
            # First the end, then the beginning: no error between the two can leave a valve open.
            self._timer.open(line, at_s + self._pulse_s)
            try:
                self._pins.set(line, active=True)
            except OSError as error:
                raise UnavailableError("driver.no_valve", "A valve cannot be set.", got=error) from error
            finally:
                self._wake.notify()
            self.counters["fired"] += 1

    def step(self, at_s: float) -> float:
        """Closes what is due; returns seconds until the next."""
        with self._wake:
            for line in self._timer.due(at_s):
                try:
                    self._pins.set(line, active=False)
                    self.counters["closed"] += 1
                except OSError:
                    self.counters["close_failed"] += 1
                    if self.counters["close_failed"] == 1:
                        log.exception("a valve does not close: line %s", line)
                    self._timer.open(line, at_s + _RETRY_S)
            return self._timer.wait_s(at_s)

    def start(self) -> None:
        """Starts the timing thread."""
        self._thread = threading.Thread(target=self._run, name="valves", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            self.step(self._clock())
            with self._wake:
                if not self._stopping:
                    self._wake.wait(self._timer.wait_s(self._clock()))

    def close(self) -> None:
        """Closes every valve and gives the pins back. May be called twice."""
        with self._wake:
            already, self._stopping = self._stopping, True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(1.0)
        if already:
            return
        for line in set(self._valves.values()):
            try:
                self._pins.set(line, active=False)
            except OSError:
                self.counters["close_failed"] += 1
        self._pins.release()
