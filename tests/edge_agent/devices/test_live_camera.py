"""Live cameras: size, times and the end of the reader; stalls and hangs are tested beside the camera's health."""

import threading

import numpy as np
import pytest

from edge_agent.devices.cameras import ConstantSpeedEncoder
from edge_agent.devices.live_camera import LiveCamera
from edge_agent.interfaces import Frame
from models.errors import CameraError


class Device:
    """A capture that hands over one picture per `give`, with the time the camera states."""

    def __init__(self) -> None:
        self.ready = threading.Semaphore(0)
        self.pictures: list[tuple[np.ndarray | None, float]] = []
        self.stamp_ms = 0.0
        self.released = False
        self.open = True

    def give(self, image: np.ndarray | None, stamp_ms: float = 0.0) -> None:
        self.pictures.append((image, stamp_ms))
        self.ready.release()

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, _what: int) -> float:
        return self.stamp_ms

    def release(self) -> None:
        self.released = True

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.ready.acquire()
        image, self.stamp_ms = self.pictures.pop(0)
        return self.open, image


class Bench:
    """A camera over such a device, with a clock that the test moves."""

    def __init__(self, **options: object) -> None:
        self.now = 50.0
        self.device = Device()
        self.camera = LiveCamera(
            "7",
            encoder=ConstantSpeedEncoder(1000.0, 50.0),
            clock=self._clock,
            opener=lambda _source: self.device,
            **options,
        )

    def _clock(self) -> float:
        # Every look at the clock takes a millisecond more than a buffer would: the frames are fresh.
        self.now += 0.02
        return self.now

    def frame(self, image: np.ndarray, stamp_ms: float = 0.0) -> Frame:
        self.device.give(image, stamp_ms)
        frame = self.camera.read(20.0)
        assert frame is not None
        return frame

    def end(self) -> None:
        ender = threading.Thread(target=self.camera.close)
        ender.start()
        self.device.open = False
        self.device.give(None)
        ender.join()


def picture(width: int = 60, height: int = 40) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def test_a_frame_of_another_size_is_refused_from_the_first_one_on_and_the_reader_goes_on() -> None:
    bench = Bench(size_px=(60, 40))
    for _ in range(3):
        bench.device.give(picture(120, 80))
        with pytest.raises(CameraError) as caught:
            bench.camera.read(20.0)
        assert caught.value.code == "camera.wrong_size"
        assert "60 x 40" in str(caught.value.expected)
    assert bench.frame(picture()).number == 3
    assert (bench.camera.frames_bad, bench.camera.counters.reopened) == (3, 0)
    bench.end()


def test_a_damaged_frame_is_counted_and_no_end() -> None:
    bench = Bench()
    bench.device.give(None)
    assert bench.frame(picture()).number == 1
    assert (bench.camera.frames_bad, bench.camera.counters.corrupt) == (1, 1)
    bench.end()


def test_grey_frames_become_colour_and_raw_numbers_are_refused() -> None:
    bench = Bench()
    assert bench.frame(picture()[:, :, 0]).image.shape == (40, 60, 3)
    bench.device.give(picture()[:, :, 0].astype(np.uint16))
    with pytest.raises(CameraError) as caught:
        bench.camera.read(20.0)
    assert caught.value.code == "camera.unsupported_depth"
    bench.end()


def test_a_camera_without_a_clock_is_taken_at_arrival() -> None:
    bench = Bench()
    before = bench.now
    frame = bench.frame(picture())
    assert before < frame.captured_s <= bench.now
    assert frame.belt_mm == pytest.approx((frame.captured_s - 50.0) * 1000.0)
    bench.end()


def test_closing_waits_for_the_reader_so_that_the_process_can_end() -> None:
    bench = Bench()
    bench.frame(picture())
    bench.end()
    assert bench.device.released
    assert not any(reader.is_alive() for reader in bench.camera._readers)
