"""Pins of the box itself: valves that open at once and are closed by a timing thread, and inputs that report edges."""

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Final, Literal, Protocol, TypeAlias

from edge_agent.devices.drivers.address import load_extra
from edge_agent.interfaces import Shot
from models.errors import ConfigError, UnavailableError

log = logging.getLogger("sortline.drivers")
SafeState: TypeAlias = Literal["hold", "off", "eject"]
"""State of the outputs after the line has ended; what each device can do is in `ejectors`."""
_RETRY_S: Final = 0.01
_IDLE_S: Final = 0.5


class Pins(Protocol):
    """Output lines of a GPIO chip; setting one takes microseconds. Raises OSError."""

    def set(self, line: int, *, active: bool) -> None:
        """Opens or closes a valve."""

    def release(self) -> None:
        """Gives the lines back."""


def _load_gpiod() -> tuple[Any, Any]:
    """Returns the modules `gpiod` and `gpiod.line`.

    Raises:
        ConfigError: `driver.missing_library`.
    """
    gpiod = load_extra("gpiod", "gpio")
    if not hasattr(gpiod, "request_lines"):
        raise ConfigError(
            "driver.missing_library",
            "This device needs a library that is not installed: pip install 'sortline[gpio]'.",
            expected="gpiod 2",
            got="gpiod 1",
        )
    return gpiod, load_extra("gpiod.line", "gpio")


def _request(gpiod: Any, chip: str, lines: Iterable[int], settings: Any) -> Any:
    """Takes lines of a chip.

    Raises:
        ConfigError: `driver.no_pins`.
    """
    try:
        return gpiod.request_lines(chip, consumer="sortline", config={tuple(sorted(set(lines))): settings})
    except (OSError, ValueError) as error:
        raise ConfigError(
            "driver.no_pins", "The pins cannot be taken.", expected=f"free lines of {chip}", got=error
        ) from error


class GpiodEdges:
    """Input lines of a chip through libgpiod v2; a thread of its own waits for edges.

    Args:
        chip: Path of the character device.
        lines: Offsets of the lines.
        deliver: Called with the offset of a line that became active, and when (monotonic seconds, from the kernel).
        active_low: The input is active when the pin is low.
        debounce_ms: A change that lasts shorter is ignored by the kernel; 0 = none is.

    Raises:
        ConfigError: `driver.missing_library`, `driver.no_pins`.
    """

    def __init__(
        self,
        chip: str,
        lines: Iterable[int],
        deliver: Callable[[int, float], None],
        *,
        active_low: bool = False,
        debounce_ms: float = 0.0,
    ) -> None:
        gpiod, line = _load_gpiod()
        settings = gpiod.LineSettings(
            direction=line.Direction.INPUT,
            edge_detection=line.Edge.RISING,
            active_low=active_low,
            debounce_period=timedelta(milliseconds=debounce_ms),
        )
        self._request = _request(gpiod, chip, lines, settings)
        self._deliver = deliver
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.counters: Counter[str] = Counter()
        """edges, failed"""

    def step(self, wait_s: float = _IDLE_S) -> None:
        """Waits for edges and delivers them; a failing chip is counted and asked again later."""
        try:
            if not self._request.wait_edge_events(wait_s):
                return
            events = self._request.read_edge_events()
        except OSError as error:
            self.counters["failed"] += 1
            if self.counters["failed"] == 1:
                log.warning("inputs cannot be read: %s", error)
            self._stopping.wait(_IDLE_S)
            return
        for event in events:
            self.counters["edges"] += 1
            self._deliver(event.line_offset, event.timestamp_ns / 1e9)

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="inputs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.step()

    def close(self) -> None:
        """Ends the thread and gives the lines back. May be called twice."""
        already = self._stopping.is_set()
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2.0 * _IDLE_S)
        if not already:
            self._request.release()


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
        gpiod, line = _load_gpiod()
        self._active, self._inactive = line.Value.ACTIVE, line.Value.INACTIVE
        settings = gpiod.LineSettings(
            direction=line.Direction.OUTPUT, output_value=line.Value.INACTIVE, active_low=active_low
        )
        self._request = _request(gpiod, chip, lines, settings)

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
        """Returns seconds until the next valve may close."""
        return min(max(self._ends[0][0] - at_s, 0.0), _IDLE_S) if self._ends else _IDLE_S


class GpioEjector:
    """Fires a valve directly; implements `Ejector`.

    Args:
        pins: The lines.
        valves: Line by (lane, outlet).
        pulse_s: How long a valve stays open.
        safe: State in which `close` leaves the valves.
        clock: Monotonic seconds.
    """

    ahead_mm = 0.0
    """Takes shots when they are due."""

    def __init__(
        self,
        pins: Pins,
        valves: Mapping[tuple[int, str], int],
        *,
        pulse_s: float,
        safe: SafeState = "off",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._safe = safe
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
        """Leaves the valves in the safe state and gives the pins back. May be called twice."""
        with self._wake:
            already, self._stopping = self._stopping, True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(1.0)
        if already:
            return
        for line in set(self._valves.values()) if self._safe != "hold" else ():
            try:
                self._pins.set(line, active=self._safe == "eject")
            except OSError:
                self.counters["close_failed"] += 1
        self._pins.release()
