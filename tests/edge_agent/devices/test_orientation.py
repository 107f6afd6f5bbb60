"""Orientation: eight ways to turn a picture, one meaning, and nothing where nothing is needed."""

from itertools import product
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from edge_agent.devices.hardware import open_hardware
from edge_agent.devices.orientation import TURN_FOR, OrientedCamera, composed, oriented, size_before
from edge_agent.devices.video_file import VideoFile
from edge_agent.line_config import LineConfig, Orientation
from models.errors import CameraError, ConfigError

ALL: tuple[Orientation, ...] = get_args(Orientation)
PICTURE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def test_two_orientations_after_each_other_are_one() -> None:
    for first, then in product(ALL, ALL):
        both = oriented(oriented(PICTURE, first), then)
        assert np.array_equal(both, oriented(PICTURE, composed(first, then))), (first, then)


def test_the_eight_orientations_differ_and_none_costs_nothing() -> None:
    assert len({oriented(PICTURE, name).tobytes() + bytes(oriented(PICTURE, name).shape) for name in ALL}) == 8
    assert oriented(PICTURE, "none") is PICTURE


def test_each_direction_of_travel_becomes_left_to_right() -> None:
    for direction, (dx, dy) in {
        "left-right": (1, 0),
        "right-left": (-1, 0),
        "top-bottom": (0, 1),
        "bottom-top": (0, -1),
    }.items():
        pictures = []
        for step in (0, 3):
            picture = np.zeros((21, 21, 3), np.uint8)
            picture[10 + dy * step, 10 + dx * step] = 255
            pictures.append(oriented(picture, TURN_FOR[direction]))
        (y0, x0), (y1, x1) = (np.argwhere(picture[:, :, 0])[0] for picture in pictures)
        assert (x1 - x0, y1 - y0) == (3, 0), direction


def test_the_size_before_a_turn_is_that_of_the_camera() -> None:
    for name in ALL:
        height, width = oriented(PICTURE, name).shape[:2]
        assert size_before(width, height, name) == (7, 5)


def test_a_camera_is_turned_at_its_door_and_only_if_needed(tmp_path: Path) -> None:
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((40, 60, 3), 50 * number, np.uint8))
    plain = LineConfig(camera=str(tmp_path), paced=False, encoder="nominal")
    assert isinstance(open_hardware(plain).source, VideoFile)
    turned = LineConfig(
        camera=str(tmp_path), paced=False, encoder="nominal", orientation="rotate-90", width_px=40, height_px=60
    )
    source = open_hardware(turned).source
    assert isinstance(source, OrientedCamera)
    assert source.read(1.0).image.shape == (60, 40, 3)
    wrong = LineConfig(
        camera=str(tmp_path), paced=False, encoder="nominal", orientation="rotate-90", width_px=60, height_px=40
    )
    with pytest.raises(CameraError) as caught:
        open_hardware(wrong).source.read(1.0)
    assert caught.value.code == "camera.wrong_size"
    with pytest.raises(ConfigError) as refused:
        open_hardware(LineConfig(orientation="mirror"), virtual=True)
    assert refused.value.code == "line.bad_picture"
