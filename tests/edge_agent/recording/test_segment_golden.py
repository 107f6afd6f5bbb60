"""The segment format as it was first released: the golden file is read, and written again byte for byte."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.recording.replay import Replay
from edge_agent.recording.segments import (
    Checkpoint,
    Decision,
    End,
    FrameHead,
    Head,
    Kept,
    TrackState,
    framed,
    opening,
    read_segment,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "segments-v1.slr"
DIGEST = "ab" * 32
PICTURE = (np.arange(16 * 16 * 3, dtype=np.uint32).reshape(16, 16, 3) * 7 % 251).astype(np.uint8)
BELT = np.full((4, 4, 3), 40.5, np.float32)


def records() -> list[tuple[Head, bytes]]:
    """One record of each kind, as the recorder writes them."""
    track = TrackState(
        item_id=3,
        lane=1,
        item_mm=-120.5,
        length_mm=75.25,
        last_x_px=9.5,
        last_frame=40,
        last_captured_s=1.25,
        last_belt_mm=1000.0,
        observations=2,
        next_view_px=12.0,
        views=1,
        digest=DIGEST,
        probabilities=np.float32([0.75, 0.25]).tobytes(),
        embeddings=np.float32([0.5, -1.0, 2.0]).tobytes(),
        features=np.zeros(15, np.float32).tobytes(),
        weight_g=181.5,
        weighed_frame=39,
    )
    point = Checkpoint(
        run="18f0-77",
        index=41,
        continuous=False,
        width_px=16,
        height_px=16,
        mm_per_px=0.625,
        lanes=((0, 8), (8, 16)),
        outlets_mm={"reject": 700.0},
        ids=3,
        last_number=40,
        tracks=(track,),
        about={"machine": "x86_64", "threads": "1"},
    )
    head = FrameHead(index=41, number=41, captured_s=1.375, belt_mm=1125.0, digest=DIGEST, variety="gala", lot="B-1182")
    decision = Decision(
        index=41,
        item_id=3,
        lane=1,
        item_mm=-120.5,
        klass="rot",
        grade="reject",
        wanted="reject",
        outlet="pass",
        defect=0.25,
        probabilities=np.float32([0.75, 0.25]).tobytes(),
        view_probabilities=np.float32([[0.75, 0.25]]).tobytes(),
        views=1,
        digest=DIGEST,
        weight_g=181.5,
        weighed_frame=39,
    )
    png = cv2.imencode(".png", PICTURE)[1].tobytes() if os.environ.get("SORTLINE_UPDATE_GOLDEN") else stored_png()
    return [(point, BELT.tobytes()), (head, png), (decision, b""), (Kept(reason="camera.frozen"), b""), (End(), b"")]


def stored_png() -> bytes:
    """The picture as the golden file holds it: another release of OpenCV may compress it otherwise."""
    return next(e for e in read_segment(GOLDEN).entries if isinstance(e.head, FrameHead)).payload()


@pytest.fixture(scope="module", autouse=True)
def _golden_file() -> None:
    """`SORTLINE_UPDATE_GOLDEN=1` writes the file; only for a new version of the format."""
    if os.environ.get("SORTLINE_UPDATE_GOLDEN"):
        GOLDEN.write_bytes(opening() + b"".join(framed(head, payload) for head, payload in records()))


def test_every_record_of_the_golden_segment_is_read_as_it_was_written() -> None:
    segment = read_segment(GOLDEN)
    assert segment.torn == ""
    assert [(entry.head, entry.payload()) for entry in segment.entries] == records()


def test_the_golden_segment_is_written_again_byte_for_byte() -> None:
    assert opening() + b"".join(framed(head, payload) for head, payload in records()) == GOLDEN.read_bytes()


def test_the_golden_segment_plays(tmp_path: Path) -> None:
    (tmp_path / "00000000.slr").write_bytes(GOLDEN.read_bytes())
    source = Replay(tmp_path)
    frame = source.read(0.0)
    assert frame is not None
    assert np.array_equal(frame.image, PICTURE)
    assert (frame.number, frame.captured_s, frame.belt_mm) == (41, 1.375, 1125.0)
    assert source.bundles == {DIGEST: 1}
    assert source.kept == ["camera.frozen"]
    assert source.stretches[0].ended
