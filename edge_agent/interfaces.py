"""The seams between the line and the world: camera, encoder, ejector.

Hardware, replay and simulation implement these small protocols side by side; the line process uses nothing
else of them. Geometry and belt position have one meaning, stated here.

Coordinates: items move towards growing x in the image. `belt_mm` is the distance the belt has run. An item whose
centre is at pixel column x in a frame taken at `belt_mm` has the belt coordinate
`item_mm = belt_mm - x * mm_per_px`, which stays the same while it travels: it identifies the item, and it is
in front of an outlet `outlet_mm` behind column 0 when `belt_mm == item_mm + outlet_mm`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
"""uint8 (height, width, 3), BGR."""
Mask: TypeAlias = NDArray[np.uint8]
"""uint8 (height, width), 255 on the item, 0 elsewhere."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One exposure of the camera."""

    image: Image
    number: int
    """Counts the exposures of the camera from 0; a gap in it is a dropped frame."""
    captured_s: float
    """`time.monotonic()` at the exposure, seconds."""
    belt_mm: float
    """Encoder position at the exposure, millimetres."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows `[top_px, bottom_px)` of the image that show one lane."""

    top_px: int
    bottom_px: int


@dataclass(frozen=True, slots=True)
class LineGeometry:
    """The places of lanes and outlets. Outlets are named by the recipe; each is `outlets_mm[name]` behind column 0.

    An outlet that is not listed needs no ejection: the item stays on the belt.
    """

    width_px: int
    height_px: int
    mm_per_px: float
    lanes: tuple[Lane, ...]
    outlets_mm: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shot:
    """One ejection: the item `item_id`, now in front of `outlet` of `lane`, leaves the belt."""

    lane: int
    outlet: str
    item_id: int
    target_mm: float
    """Belt position at which the item's centre is in front of the outlet."""
    joined: bool = False
    """Closer to the shot before than the ejector's pitch: the driver keeps the valve open instead of opening it."""
    blind: bool = False
    """Fired where nothing was seen (fail-safe `eject-all`): there may be no item, and no photo-eye need confirm it."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """The photo-eye behind an ejector saw an item leave."""

    lane: int
    outlet: str
    belt_mm: float
    """Belt position when it was seen."""


class FrameSource(Protocol):
    """A camera, a recording or a simulation. One thread reads it."""

    def read(self, timeout_s: float) -> Frame | None:
        """Returns the freshest frame not given yet, or None when there was none within `timeout_s`.

        Raises:
            CameraError: `camera.ended` when a recording is over, `camera.absent`, `camera.corrupt`, ...: see
                `edge_agent.devices.cameras`.
        """

    def close(self) -> None:
        """Lets go of the device. May be called twice."""


class Encoder(Protocol):
    """Position of the belt. Any thread may ask; it never blocks."""

    def position_mm(self, at_s: float) -> float:
        """Belt position at the monotonic time `at_s` (now, or shortly before or after it), millimetres."""

    def speed_mm_s(self) -> float:
        """Returns present belt speed, millimetres per second; 0 when it stands."""


class Ejector(Protocol):
    """Valves, a PLC, or the simulation. Called by the ejection thread only."""

    def fire(self, shot: Shot, at_s: float) -> None:
        """Fires at the monotonic time `at_s`, which is now; returns at once."""


class AheadEjector(Ejector, Protocol):
    """A device that times the last millimetres itself and therefore takes shots ahead of time."""

    ahead_mm: float
    """Returns how far before its target a shot should be announced."""

    def announce(self, shot: Shot, position_mm: float) -> bool:
        """Takes a shot while the belt is at `position_mm`; False when it will not be fired. Never blocks."""


class BeltControl(Protocol):
    """Stops the belt for the fail-safe. Any thread calls it; it never blocks. Requests are repeated until taken."""

    def stop(self, reason: str) -> None:
        """Asks the belt to stand; `reason` is a code such as `camera.frozen`."""

    def run(self) -> None:
        """Withdraws the request to stand."""


class Heartbeat(Protocol):
    """An output that changes while the line is healthy. Called by the sorting thread at each turn; never blocks."""

    def turned(self) -> None:
        """Notes that the sorting thread turns."""


class ItemScalars(Protocol):
    """A sensor beside the belt that gives one number per item, such as a load cell. Never blocks."""

    def value_for(self, item_mm: float) -> float | None:
        """Returns the value of the item with this belt coordinate; None when it is not known."""


class Confirmation(Protocol):
    """Photo-eyes or a second camera behind the ejectors. Called by the sorting thread once per frame."""

    def sightings(self, until_s: float) -> list[Sighting]:
        """Returns what was seen since the last call and not after the monotonic time `until_s`; never blocks."""
