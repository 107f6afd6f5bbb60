"""What others would run on the same frames: a loop as users write it, and Roboflow's `supervision` where installed."""

from collections.abc import Callable

import cv2
import numpy as np

from edge_agent.judging import Judge
from edge_agent.locate import Located


class PlainLoop:
    """OpenCV and ONNX Runtime, straight from the tutorials: difference from the first frame, contours, one crop and
    one inference per item in each frame, identities by the nearest centroid of the frame before."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._background: np.ndarray | None = None
        self._last: list[tuple[float, float, int]] = []
        self._ids = 0

    def process(self, image: np.ndarray) -> list[tuple[int, float]]:
        """(identity, defect probability) of each item in the frame."""
        if self._background is None:
            self._background = image.copy()
        grey = cv2.cvtColor(cv2.absdiff(image, self._background), cv2.COLOR_BGR2GRAY)
        mask = cv2.threshold(cv2.GaussianBlur(grey, (5, 5), 0), 26, 255, cv2.THRESH_BINARY)[1]
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        found, places = [], []
        side = self._judge.preprocess.view_px
        for contour in contours:
            x, y, width, height = cv2.boundingRect(contour)
            if width * height < 2000:
                continue
            view = cv2.resize(image[y : y + height, x : x + width], (side, side), interpolation=cv2.INTER_AREA)
            answer = self._judge.classifier.classify([view])
            identity = self._identity(x + width / 2, y + height / 2)
            places.append((x + width / 2, y + height / 2, identity))
            found.append((identity, 1.0 - float(answer.probabilities[0, 0])))
        self._last = places
        return found

    def _identity(self, x: float, y: float) -> int:
        near = [(abs(px - x) + abs(py - y), identity) for px, py, identity in self._last]
        if near and min(near)[0] < 80.0:
            return min(near)[1]
        self._ids += 1
        return self._ids


def supervision_tracker(frames_per_s: float) -> Callable[[list[Located]], list[tuple[int, int, float]]] | None:
    """Their ByteTrack on our places, or None where the package is missing."""
    try:
        import supervision  # noqa: PLC0415  a peer, never a dependency
    except ImportError:
        return None
    tracker = supervision.ByteTrack(frame_rate=int(frames_per_s), minimum_matching_threshold=0.95)

    def update(places: list[Located]) -> list[tuple[int, int, float]]:
        boxes = np.array([(p.left_px, p.top_px, p.right_px, p.bottom_px) for p in places], np.float32).reshape(-1, 4)
        given = supervision.Detections(
            xyxy=boxes,
            confidence=np.full(len(boxes), 0.9, np.float32),
            class_id=np.array([p.lane for p in places], int),
        )
        found = tracker.update_with_detections(given)
        centres = (found.xyxy[:, 0] + found.xyxy[:, 2]) / 2.0
        return [
            (int(identity), int(lane), float(x))
            for identity, lane, x in zip(found.tracker_id, found.class_id, centres, strict=True)
        ]

    return update
