"""Alternatives on the same frames: a loop as users write it, and Roboflow's tracker where it is installed."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from edge_agent.vision.judge import Judge
from edge_agent.vision.segmentation import Detection

TRACKER = Path(__file__).with_name("peer_tracker.py")


@dataclass(frozen=True, slots=True)
class Found:
    """One item in one frame, as the plain loop finds it."""

    identity: int
    x_px: float
    y_px: float
    defect: float


class PlainLoop:
    """OpenCV and ONNX Runtime, straight from the tutorials.

    Difference from a picture of the empty belt, contours, one masked crop and one inference per item in each frame,
    identities by the nearest centroid of the frame before.
    """

    def __init__(self, judge: Judge, empty_belt: np.ndarray) -> None:
        self._judge = judge
        self._background = empty_belt
        self._last: list[tuple[float, float, int]] = []
        self._ids = 0

    def process(self, image: np.ndarray) -> list[Found]:
        """The items of a frame."""
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
            cut = (slice(y, y + height), slice(x, x + width))
            crop = cv2.bitwise_and(image[cut], image[cut], mask=mask[cut])
            view = np.asarray(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
            answer = self._judge.classifier.classify([view])
            at = (x + width / 2, y + height / 2)
            identity = self._identity(*at)
            places.append((*at, identity))
            found.append(Found(identity, *at, 1.0 - float(answer.probabilities[0, 0])))
        self._last = places
        return found

    def _identity(self, x: float, y: float) -> int:
        near = [(abs(px - x) + abs(py - y), identity) for px, py, identity in self._last]
        if near and min(near)[0] < 80.0:
            return min(near)[1]
        self._ids += 1
        return self._ids


@dataclass(frozen=True, slots=True)
class PeerTracks:
    """The result of the peer's tracker."""

    name: str
    ids: list[list[int]]
    """Per frame and place; -1 where it gave none."""
    seconds: float


def tracker_works(python: str) -> str:
    """Returns an empty text when this Python has the peer's tracker, else what to install."""
    if shutil.which(python) is None:
        return f"there is no Python {python}"
    done = subprocess.run([python, "-c", "import supervision"], capture_output=True, check=False)
    if done.returncode == 0:
        return ""
    return (
        f"Roboflow's trackers are not installed in {python}: "
        "pip install 'sortline[bench]' in an environment of its own, then --peers ENVIRONMENT/bin/python"
    )


def peer_tracks(python: str, places: list[list[Detection]], frames_per_s: float) -> PeerTracks:
    """Runs the peer's tracker on the same boxes, in its own process.

    Raises:
        RuntimeError: It failed.
    """
    boxes = [(p.left_px, p.top_px, p.right_px, p.bottom_px) for frame in places for p in frame]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.npz", Path(scratch) / "out.json"
        np.savez(
            source,
            counts=[len(frame) for frame in places],
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            frame_rate=frames_per_s,
        )
        done = subprocess.run([python, str(TRACKER), str(source), str(target)], capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace")[-1500:])
        result = json.loads(target.read_text(encoding="utf-8"))
    return PeerTracks(result["name"], result["ids"], float(result["seconds"]))
