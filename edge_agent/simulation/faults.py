"""Describes the faults of the simulated line, set directly, by a schedule, or by a file while it runs.

A schedule reads like `30s brightness=0.7 blur_px=1.5; 60s clear`: at 30 s after the start these knobs are set (the
others stay), and at 60 s the line is healthy again.
"""

import difflib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from models.errors import ConfigError

log = logging.getLogger("sortline.simulation")


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state of everything that can be wrong; the defaults are a healthy line."""

    brightness: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)] = 1.0
    blue: Annotated[float, msgspec.Meta(ge=0.0, le=4.0)] = 1.0
    """Gain of the blue channel; a lamp that ages shifts colour."""
    green: Annotated[float, msgspec.Meta(ge=0.0, le=4.0)] = 1.0
    red: Annotated[float, msgspec.Meta(ge=0.0, le=4.0)] = 1.0
    blur_px: Annotated[float, msgspec.Meta(ge=0.0, le=20.0)] = 0.0
    dirt: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Opacity of smudges on the lens."""
    dirt_x: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = -1.0
    """Column of the middle of one smudge, as a share of the width; negative = smudges all over the picture."""
    dirt_y: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.5
    """Row of its middle, as a share of the height."""
    dirt_size: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.12
    """Radius of it, as a share of the width."""
    dirt_level: Annotated[float, msgspec.Meta(ge=0.0, le=255.0)] = 40.0
    """Grey level of the smudges: the belt's own (40), darker (dust), or brighter (grease that scatters the light)."""
    dirt_creep_s: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] = 0.0
    """The smudges take so long to reach their opacity; 0 = they are there at once."""
    flicker: Annotated[float, msgspec.Meta(ge=0.0, le=0.5)] = 0.0
    """Amplitude of a lamp that flickers at 100 Hz, as a share; a rolling shutter shows it as bands."""
    shift_x_px: Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)] = 0.0
    """The camera was knocked: the picture stands so far to the right."""
    shift_y_px: Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)] = 0.0
    """The same downwards."""
    drop_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    corrupt_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    freeze: bool = False
    """The camera repeats its last image while its frame numbers go on."""
    wrong_size: bool = False
    """The camera gives frames of half the size."""
    absent: bool = False
    """The camera is unplugged."""
    stopped: bool = False
    speed_factor: Annotated[float, msgspec.Meta(ge=0.0, le=3.0)] = 1.0
    defect_share: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = -1.0
    """Share of defective items among those that enter from now on; negative = as configured."""
    variety: str = ""
    """Variety of all items that enter from now on; empty = as configured."""
    valve_lane: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    """Lane whose valve has the faults below."""
    valve_miss: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Share of its shots that have no effect."""
    valve_slow_ms: Annotated[float, msgspec.Meta(ge=0.0, le=200.0)] = 0.0
    """Additional delay of its effect."""


NO_FAULTS: Final = Faults()
_STEP = re.compile(r"^(\d+(?:\.\d+)?)s\s+(.+)$")


@dataclass(frozen=True, slots=True)
class ScheduledFaults:
    """The faults that hold from `after_s` after the start on."""

    after_s: float
    trouble: Faults


def parse_fault_schedule(text: str) -> list[ScheduledFaults]:
    """Parses a schedule.

    Raises:
        ConfigError: `trouble.malformed`, `trouble.unknown_knob` with the nearest one.
    """
    found: list[tuple[float, str]] = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = _STEP.match(part)
        if not match:
            raise ConfigError(
                "trouble.malformed",
                "No step of a schedule.",
                expected="30s brightness=0.7 blur_px=1; 60s clear",
                got=part,
            )
        found.append((float(match[1]), match[2]))
    steps: list[ScheduledFaults] = []
    current = NO_FAULTS
    for after_s, knobs in sorted(found, key=lambda step: step[0]):
        current = NO_FAULTS if knobs == "clear" else _changed(current, knobs)
        steps.append(ScheduledFaults(after_s, current))
    return steps


def parse_faults(text: str) -> Faults:
    """Parses what holds now, such as `dirt=0.6 dirt_x=0.8`; `clear` or nothing is a healthy line.

    Raises:
        ConfigError: `trouble.malformed`, `trouble.unknown_knob` with the nearest one.
    """
    words = text.strip()
    return NO_FAULTS if words in {"", "clear"} else _changed(NO_FAULTS, words)


def _changed(current: Faults, text: str) -> Faults:
    values = msgspec.to_builtins(current)
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1, cutoff=0.3)
            raise ConfigError(
                "trouble.unknown_knob",
                f"There is no trouble called {name}" + (f"; did you mean {near[0]}?" if near else "."),
                expected=sorted(values),
                got=name,
            )
        values[name] = value or "true"
    try:
        return msgspec.convert(values, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError("trouble.malformed", f"A knob has an impossible value: {error}.", got=text) from error


class FaultsFile:
    """A file that names the faults that hold now; it may be written, replaced or removed at any time.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._due_s = 0.0

    def changed(self, elapsed_s: float) -> Faults | None:
        """Returns what the file says where it has changed since the last call, else None; looks twice a second.

        What cannot be read or is no list of faults changes nothing and is logged. A file that is gone is a healthy
        line.

        Args:
            elapsed_s: Time since the start.
        """
        if elapsed_s < self._due_s:
            return None
        self._due_s = elapsed_s + 0.5
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            return parse_faults(self._path.read_text(encoding="utf-8")[:2000])
        except FileNotFoundError:
            return NO_FAULTS
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            log.warning("%s changes nothing: %s", self._path, error)
            return None

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino
