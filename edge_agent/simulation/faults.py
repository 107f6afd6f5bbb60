"""Describes the faults of the simulated line, set directly or by a schedule.

A schedule reads like `30s brightness=0.7 blur_px=1.5; 60s clear`: at 30 s after the start these knobs are set (the
others stay), and at 60 s the line is healthy again.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from models.errors import ConfigError


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
