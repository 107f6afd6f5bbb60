"""Live cameras that hang or hand out old frames: readers are bounded, and a backlog is thrown away."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from edge_agent.devices.cameras import ConstantSpeedEncoder
from edge_agent.devices.live_camera import READER, Backlog, LiveCamera
from models.errors import CameraError


class Hanging:
    """A capture that gives some frames, then blocks until it is released."""

    def __init__(self, frames: int) -> None:
        self.left, self.free = frames, threading.Event()

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, _what: int) -> float:
        return 0.0

    def release(self) -> None:
        self.free.set()

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.left == 0:
            self.free.wait(30.0)
            return False, None
        self.left -= 1
        return True, np.full((40, 60, 3), self.left, np.uint8)


@pytest.fixture
def opened() -> Iterator[list[Hanging]]:
    captures: list[Hanging] = []
    yield captures
    for capture in captures:
        capture.free.set()


def first_error(camera: LiveCamera, now: list[float]) -> str:
    for _ in range(1000):
        now[0] += 0.25
        try:
            camera.read(0.0)
        except CameraError as error:
            return error.code
    return ""


def test_readers_that_hang_are_never_more_than_the_limit(opened: list[Hanging]) -> None:
    now = [0.0]

    def opener(_source: str) -> Hanging:
        opened.append(Hanging(0))
        return opened[-1]

    camera = LiveCamera("7", encoder=ConstantSpeedEncoder(1000.0), max_readers=3, clock=lambda: now[0], opener=opener)
    codes, waits = [], []
    while "camera.stuck" not in codes:
        before_s = now[0]
        codes.append(first_error(camera, now))
        waits.append(now[0] - before_s)
    assert codes == ["camera.stalled", "camera.stalled", "camera.stuck"]
    assert sum(thread.name.startswith(READER) for thread in threading.enumerate()) <= 3
    assert waits == [1.25, 2.25, 4.25]  # the patience doubles, so that a driver gets time to come back
    camera.close()


def test_buffered_frames_are_distinguished_from_fresh_ones() -> None:
    period_s = 1.0 / 30.0
    backlog, now_s = Backlog(period_s, 0.0), 0.0
    found = []
    for took_s in (0.001, 0.002, 0.001, 0.030, 0.033, 0.004, 0.033, 1.0, 0.001, 0.001, 0.033, 0.033):
        found.append(backlog.holds(now_s, now_s + took_s))
        now_s += took_s
    # Opened: three old ones. A short wait in between is jitter. After a gap of a second: the two behind it are old.
    assert found == [True, True, True, False, False, False, False, False, True, True, False, False]


def test_a_source_without_a_pace_is_not_thrown_away_for_ever() -> None:
    backlog = Backlog(1.0 / 30.0, 0.0)
    found = [backlog.holds(n * 0.001, (n + 1) * 0.001) for n in range(2000)]
    assert found.count(True) == pytest.approx(1000, abs=2)
    assert not any(found[1100:])
