"""The loop over frames survives a pause, leaves out frames of a wrong size, and ends when a camera stays away."""

import numpy as np
import pytest

from edge_agent.devices.frames import frames
from edge_agent.interfaces import Frame
from models.errors import CameraError


class Script:
    """A camera that does what a list says: a number is a frame at that second, a text an error, None silence."""

    def __init__(self, *steps: float | str | None) -> None:
        self.left = list(steps)

    def read(self, _timeout_s: float) -> Frame | None:
        if not self.left:
            raise CameraError("camera.ended", "over")
        step = self.left.pop(0)
        if isinstance(step, str):
            raise CameraError(f"camera.{step}", step)
        return None if step is None else Frame(np.zeros((4, 4, 3), np.uint8), int(step), float(step), 0.0)

    def close(self) -> None:
        self.left = []


def given(*steps: float | str | None, patience_s: float = 30.0, **options: float) -> list[float]:
    source = Script(*steps)
    return [f.captured_s for f in frames(source, patience_s=patience_s, sleep=lambda _s: None, **options)]


def test_a_pause_of_three_seconds_is_survived() -> None:
    assert given(0, 1, *[None] * 4, "stalled", *[None] * 8, "stalled", 5, 6) == [0, 1, 5, 6]


def test_a_camera_that_is_unplugged_and_comes_back_is_read_on() -> None:
    assert given(0, "absent", "absent", "failed", 4, 5) == [0, 4, 5]


def test_a_camera_that_is_absent_from_the_start_is_reported_at_once() -> None:
    for error in ("absent", "failed"):
        with pytest.raises(CameraError, match=error):
            given(error, 1, 2)


def test_a_camera_that_stays_away_ends_the_command() -> None:
    for steps, code in (
        ([None] * 200, "camera.stalled"),
        (["absent"] * 200, "camera.absent"),
        (["stuck"], "camera.stuck"),
    ):
        with pytest.raises(CameraError) as caught:
            given(0, *steps)
        assert caught.value.code == code


def test_without_patience_an_error_is_raised_and_silence_has_no_limit() -> None:
    assert given(0, *[None] * 500, 1, patience_s=0.0) == [0, 1]
    with pytest.raises(CameraError):
        given(0, "stalled", 1, patience_s=0.0)


def test_frames_of_a_wrong_size_are_left_out_but_not_all_of_them() -> None:
    for patience_s in (0.0, 30.0):
        assert given("wrong_size", 0, "wrong_size", 2, patience_s=patience_s) == [0, 2]
        with pytest.raises(CameraError) as caught:
            given(*["wrong_size"] * 6, patience_s=patience_s)
        assert caught.value.code == "camera.wrong_size"
    with pytest.raises(CameraError) as caught:
        given(0, *["wrong_size"] * 500)
    assert caught.value.code == "camera.wrong_size"


def test_time_and_number_are_limits() -> None:
    assert given(0, 1, 2, 3, seconds=2.0) == [0, 1, 2]
    assert given(0, 1, 2, 3, limit=2) == [0, 1]
    assert given() == []
