"""Keeps the identity of items from frame to frame, by lane and belt motion.

An item's belt coordinate (`item_mm`, see `edge_agent.interfaces`) stays the same while it travels, so a track needs no
motion model: an observation belongs to the track of its lane with the nearest coordinate, within a third of an
item. Each track is closed exactly once. Views are taken of whole items only, at most K of each, spaced evenly by
travel and thereby by roll.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import LineGeometry
from edge_agent.vision.segmentation import Detection

_SMOOTH: Final = 0.3
_MAX_TRACKS_PER_LANE: Final = 64
_NO_MORE_PX: Final = 1.0e9
"""A column that no item reaches; it marks an item that has all the views it will get."""


@dataclass(slots=True)
class Track:
    """One item while it is in sight, with the views taken of it and the model's answers."""

    item_id: int
    lane: int
    item_mm: float
    length_mm: float
    last_x_px: float
    last_frame: int
    last_captured_s: float
    last_belt_mm: float
    observations: int = 1
    next_view_px: float = 0.0
    """The next view is taken when the item's centre has passed this column."""
    viewed_s: float = 0.0
    """Exposure time of the frame from which its newest view was cut."""
    views: list[NDArray[np.uint8]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    weight_g: float | None = None
    """Weight measured by a load cell; None where there is none."""
    weighed_frame: int = -1
    """Number of the frame from which on the weight was known."""
    judge: object = None
    """The judge that took the item's first view and finishes the item, also when the bundle is swapped meanwhile."""

    @property
    def scalars(self) -> dict[str, float | None]:
        """What is known of the item besides its picture, by the names that a bundle may declare.

        `weight_g` comes from a load cell; `length_mm` is the largest extent along the belt in the picture so far.
        """
        return {"weight_g": self.weight_g, "length_mm": self.length_mm}

    @property
    def complete(self) -> bool:
        """Whether its last view was offered, so that the verdict need not wait until the item has left the picture."""
        return self.next_view_px >= _NO_MORE_PX

    def end_views(self) -> None:
        """Takes no further view of the item: it is judged by the views it has."""
        self.next_view_px = _NO_MORE_PX


class Tracker:
    """The tracks of one camera.

    Args:
        geometry: Geometry of the line.
        next_id: Returns a new item id at each call.
    """

    def __init__(self, geometry: LineGeometry, next_id: Callable[[], int]) -> None:
        self._geometry = geometry
        self._next_id = next_id
        self._tracks: list[list[Track]] = [[] for _ in geometry.lanes]
        self.overflow = 0
        """Number of observations refused because a lane held too many tracks (a flooded image)."""

    def update(
        self, found: list[Detection], frame_number: int, captured_s: float, belt_mm: float
    ) -> tuple[list[tuple[Track, Detection]], list[Track]]:
        """Assigns the items of one frame to tracks and closes tracks that have passed.

        Returns:
            Pairs (track, place) of whole items seen in this frame, and the tracks that are now closed: their last
            whole view lies behind them.
        """
        scale = self._geometry.mm_per_px
        seen: list[tuple[Track, Detection]] = []
        for place in found:
            if not place.whole:
                continue
            item_mm = belt_mm - place.x_px * scale
            track = self._nearest(place.lane, item_mm)
            if track is None or track.last_frame == frame_number:
                track = self._start(place, item_mm)
            else:
                track.item_mm += _SMOOTH * (item_mm - track.item_mm)
                track.length_mm = max(track.length_mm, (place.right_px - place.left_px) * scale)
                track.observations += 1
            if track is not None:
                track.last_frame, track.last_x_px = frame_number, place.x_px
                track.last_captured_s, track.last_belt_mm = captured_s, belt_mm
                seen.append((track, place))
        return seen, self._close_passed(belt_mm)

    def _nearest(self, lane: int, item_mm: float) -> Track | None:
        best = min(self._tracks[lane], key=lambda t: abs(t.item_mm - item_mm), default=None)
        if best is None or abs(best.item_mm - item_mm) > max(best.length_mm, 40.0) / 3.0:
            return None
        return best

    def _start(self, place: Detection, item_mm: float) -> Track | None:
        lane = self._tracks[place.lane]
        if len(lane) >= _MAX_TRACKS_PER_LANE:
            self.overflow += 1
            return None
        length_mm = (place.right_px - place.left_px) * self._geometry.mm_per_px
        track = Track(self._next_id(), place.lane, item_mm, length_mm, place.x_px, -1, 0.0, 0.0)
        lane.append(track)
        return track

    def _close_passed(self, belt_mm: float) -> list[Track]:
        """Removes and returns the tracks whose item can no longer be seen whole: its front has reached the edge."""
        scale, width = self._geometry.mm_per_px, self._geometry.width_px
        closed: list[Track] = []
        for lane in self._tracks:
            passed = [t for t in lane if (belt_mm - t.item_mm + t.length_mm / 2.0) / scale >= width - 2]
            for track in passed:
                lane.remove(track)
            closed.extend(passed)
        return closed

    def close_passed(self, belt_mm: float) -> list[Track]:
        """Closes the items that left the picture while no frame could be used."""
        return self._close_passed(belt_mm)

    def close_all(self) -> list[Track]:
        """Closes all tracks that are left (the camera ended or was lost)."""
        left = [track for lane in self._tracks for track in lane]
        for lane in self._tracks:
            lane.clear()
        return left

    @property
    def tracks(self) -> list[Track]:
        """The tracks in sight, by lane, in the order in which they came."""
        return [track for lane in self._tracks for track in lane]

    def restore(self, tracks: Iterable[Track]) -> None:
        """Continues with tracks that were read from `tracks` before; the objects are taken over."""
        self._tracks = [[] for _ in self._geometry.lanes]
        for track in tracks:
            self._tracks[track.lane].append(track)

    @property
    def open(self) -> int:
        """Number of items in sight."""
        return sum(len(lane) for lane in self._tracks)


class ViewPicker:
    """Chooses the observations that become views: at most `max_views` per item, evenly spaced by travel.

    The stretch on which an item is whole is divided into `max_views` cells, and the first observation in each cell
    becomes a view. The one in the last cell completes the track.

    Args:
        geometry: Geometry of the line.
        max_views: Number of views per item (K of the bundle).
    """

    def __init__(self, geometry: LineGeometry, max_views: int) -> None:
        self._width = geometry.width_px
        self._max_views = max_views

    def wants(self, track: Track, place: Detection, *, last: bool = False) -> bool:
        """Returns whether this observation becomes a view, and records it as taken.

        Args:
            track: The item.
            place: Where it is seen.
            last: No later frame will show the item whole: the view is taken wherever it is, and completes the item.
        """
        if track.complete or len(track.views) >= self._max_views:
            return False
        if last:
            track.end_views()
            return True
        if place.x_px < track.next_view_px:
            return False
        length_px = place.right_px - place.left_px
        stretch = max(self._width - length_px, 1.0)
        step = stretch / self._max_views
        # The next one comes one step on, counted from the grid, so that a late first view does not shift the rest.
        done = int((place.x_px - length_px / 2.0) / step) + 1
        last = done >= self._max_views or len(track.views) + 1 >= self._max_views
        track.next_view_px = _NO_MORE_PX if last else length_px / 2.0 + done * step
        return True
