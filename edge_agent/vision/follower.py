"""Follows items through frames without judging them: finds them, keeps their identity, chooses their views.

`LineCore` does the same on the line, with a model and an ejector behind it.
"""

from edge_agent.interfaces import Frame, LineGeometry
from edge_agent.vision.segmentation import FLOODED, Detection, Locator
from edge_agent.vision.tracking import Track, Tracker, ViewPicker


class ItemFollower:
    """The items of one camera, by the locator, tracker and view picker of the line.

    Args:
        geometry: Geometry of the line.
        max_views: Largest number of views per item.
    """

    def __init__(self, geometry: LineGeometry, max_views: int) -> None:
        self.locator = Locator(geometry)
        self.tracker = Tracker(geometry, self._next_id)
        self._picker = ViewPicker(geometry, max_views)
        self.items = 0
        """Number of items seen so far."""

    def _next_id(self) -> int:
        self.items += 1
        return self.items

    def take(self, frame: Frame) -> tuple[list[tuple[Track, Detection]], list[Track]]:
        """Takes one frame of the geometry's size.

        Returns:
            Pairs (track, place) that should become views, in the order of the frame; and the tracks that are closed.
            A caller that takes a view appends it to `track.views`.
        """
        places = self.locator.find(frame.image)
        if self.locator.coverage > FLOODED:
            places = []
        seen, closed = self.tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
        return [(track, place) for track, place in seen if self._picker.wants(track, place)], closed
