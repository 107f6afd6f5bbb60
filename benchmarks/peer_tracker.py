"""A peer's tracker on boxes from a file: run by whatever Python has it installed, which need not be the project's.

    PYTHON benchmarks/peer_tracker.py IN.npz OUT.json

IN.npz: `counts` (F,) boxes per frame, `boxes` (N, 4) left, top, right, bottom, `frame_rate`. OUT.json: name, ids per
frame (-1 where the tracker gave none to a box), seconds. Imports nothing of the project.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

MATCHING = 0.95
"""Loosest overlap that is matched (1 - IoU): items move most of their length between two frames."""
Update = Callable[[np.ndarray], list[int]]


def open_tracker(frame_rate: float) -> tuple[str, Update]:
    """Roboflow's ByteTrack: in their `trackers` where that is installed, else in `supervision` before 0.30.

    With the settings that suit a belt best: each box counts from its first frame on, and loose overlaps are matched.
    """
    warnings.filterwarnings("ignore")
    import supervision  # noqa: PLC0415  the peer

    if find_spec("trackers") is not None:
        import trackers  # noqa: PLC0415  its successor

        new = trackers.ByteTrackTracker(
            frame_rate=frame_rate, minimum_iou_threshold=1.0 - MATCHING, minimum_consecutive_frames=1
        )
        return f"trackers {version('trackers')} ByteTrack", _updater(supervision, new.update)
    old = supervision.ByteTrack(frame_rate=round(frame_rate), minimum_matching_threshold=MATCHING)
    return f"supervision {version('supervision')} ByteTrack", _updater(supervision, old.update_with_detections)


def _updater(supervision: object, track: Callable[[object], object]) -> Update:
    def update(boxes: np.ndarray) -> list[int]:
        given = supervision.Detections(  # type: ignore[attr-defined]
            xyxy=boxes, confidence=np.full(len(boxes), 0.9, np.float32), class_id=np.arange(len(boxes))
        )
        found = track(given)
        ids = [-1] * len(boxes)
        # The class of a box is its row here, so that its identity finds the way back.
        for row, identity in zip(found.class_id, found.tracker_id, strict=True):  # type: ignore[attr-defined]
            ids[int(row)] = int(identity)
        return ids

    return update


def main() -> int:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    data = np.load(source)
    name, update = open_tracker(float(data["frame_rate"]))
    frames = np.split(data["boxes"].astype(np.float32), np.cumsum(data["counts"])[:-1])
    ids: list[list[int]] = []
    seconds = 0.0
    for boxes in frames:
        started = time.perf_counter()
        ids.append(update(boxes))
        seconds += time.perf_counter() - started
    target.write_text(json.dumps({"name": name, "ids": ids, "seconds": seconds}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
