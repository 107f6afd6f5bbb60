"""Recordings: a lost frame keeps its time, damage keeps its place and is counted, the size of pictures is checked."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.devices.cameras import open_camera
from edge_agent.devices.video_file import VideoFile
from edge_agent.interfaces import Frame
from models.errors import CameraError
from tests.simulators.matroska import write_video

SPEED = 1000.0
LEVELS = [20 + 8 * k for k in range(24)]


def flat(level: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.full((size[1], size[0], 3), level, np.uint8)


def play(path: Path, **options: object) -> tuple[list[Frame], VideoFile, list[str]]:
    """All frames of a recording, the camera, and the codes of its errors but the end."""
    camera = open_camera(str(path), belt_mm_s=SPEED, paced=False, **options)
    frames, codes = [], []
    while True:
        try:
            frame = camera.read(1.0)
        except CameraError as error:
            if error.code == "camera.ended":
                return frames, camera, codes
            codes.append(error.code)
            continue
        assert frame is not None
        frames.append(frame)


def film(path: Path, times_ms: list[int]) -> None:
    write_video(path, [flat(level) for level in LEVELS[: len(times_ms)]], times_ms)


@pytest.mark.parametrize(
    ("times_ms", "expected_ms", "mended"),
    [
        pytest.param([0, 40, 80, 120, 160], [0, 40, 80, 120, 160], 0, id="steady"),
        pytest.param([0, 31, 80, 95, 170], [0, 31, 80, 95, 170], 0, id="variable-rate"),
        pytest.param([0, 200, 240, 280, 400], [0, 200, 240, 280, 400], 0, id="hole-at-the-start-and-the-end"),
        pytest.param([500, 540, 580, 620], [0, 40, 80, 120], 0, id="does-not-begin-at-0"),
    ],
)
def test_the_belt_follows_the_files_own_timestamps(
    times_ms: list[int], expected_ms: list[int], mended: int, tmp_path: Path
) -> None:
    film(tmp_path / "line.mkv", times_ms)
    frames, camera, codes = play(tmp_path / "line.mkv")
    assert [round(frame.belt_mm) for frame in frames] == expected_ms
    assert [frame.number for frame in frames] == list(range(len(times_ms)))
    assert [int(frame.image.mean().round()) for frame in frames] == pytest.approx(LEVELS[: len(times_ms)], abs=2)
    assert (camera.counters.times_mended, camera.frames_bad, codes) == (mended, 0, [])


@pytest.mark.parametrize(
    "times_ms",
    [
        pytest.param([0, 40, 40, 120, 160, 200, 240, 280], id="doubled"),
        pytest.param([0, 0, 80, 80, 160, 160, 240, 240], id="in-pairs"),
        pytest.param([1000, 1040, 1080, 1120, 160, 200, 240, 280], id="back"),
    ],
)
def test_impossible_timestamps_never_stop_the_belt_or_run_it_back(times_ms: list[int], tmp_path: Path) -> None:
    film(tmp_path / "line.mkv", times_ms)
    frames, camera, _ = play(tmp_path / "line.mkv")
    steps = np.diff([frame.belt_mm for frame in frames])
    assert len(frames) >= 7
    assert steps.min() > 20.0
    assert steps.max() < 90.0
    assert camera.counters.times_mended >= 1


def avi(path: Path, count: int = 20) -> bytes:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    rng = np.random.default_rng(1)
    for _ in range(count):
        writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_frames_that_a_cut_file_promised_are_counted_as_bad(share: float, tmp_path: Path) -> None:
    data = avi(tmp_path / "whole.avi")
    frames, camera, _ = play(tmp_path / "whole.avi")
    assert (len(frames), camera.frames_bad) == (20, 0)
    (tmp_path / "cut.avi").write_bytes(data[: int(share * len(data))])
    frames, camera, _ = play(tmp_path / "cut.avi")
    assert 3 <= len(frames) < 20
    assert camera.frames_bad == 20 - len(frames)


def test_a_container_without_a_frame_count_promises_nothing(tmp_path: Path) -> None:
    film(tmp_path / "line.mkv", [0, 10, 20, 30, 400])
    _, camera, _ = play(tmp_path / "line.mkv")
    assert camera.frames_bad == 0


def pictures(folder: Path, count: int = 12) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        cv2.imwrite(str(folder / f"frame{number}.jpg"), flat(LEVELS[number]))


def test_a_damaged_picture_keeps_its_number_and_its_time(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "frame0.jpg").write_bytes(b"")
    (tmp_path / "frame5.jpg").write_bytes(b"no picture")
    half = (tmp_path / "frame6.jpg").read_bytes()
    (tmp_path / "frame6.jpg").write_bytes(half[: len(half) - 20])
    (tmp_path / "._frame7.jpg").write_bytes(b"a companion of another system")
    frames, camera, codes = play(tmp_path, frames_per_s=25.0)
    kept = [1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert [frame.number for frame in frames] == kept
    assert [round(frame.belt_mm) for frame in frames] == [40 * number for number in kept]
    assert (camera.frames_bad, codes) == (3, [])


def test_ten_damaged_pictures_in_a_row_are_no_recording(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(1, 11):
        (tmp_path / f"frame{number}.jpg").write_bytes(b"")
    _, _, codes = play(tmp_path)
    assert codes == ["camera.corrupt"]


def test_a_picture_of_another_size_is_refused_each_time_and_the_rest_goes_on(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in (3, 8):
        cv2.imwrite(str(tmp_path / f"frame{number}.jpg"), flat(90, (128, 96)))
    frames, camera, codes = play(tmp_path)
    assert codes == ["camera.wrong_size"] * 2
    assert [frame.number for frame in frames] == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert (camera.counters.wrong_size, camera.frames_bad) == (2, 2)


def test_the_size_of_the_geometry_counts_from_the_first_frame_on(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    frames, _, codes = play(tmp_path, size_px=(32, 24))
    assert (frames, codes) == ([], ["camera.wrong_size"] * 4)
    frames, _, codes = play(tmp_path, size_px=(64, 48))
    assert (len(frames), codes) == (4, [])


def test_a_change_of_size_and_a_cut_picture_within_motion_jpeg_are_seen(tmp_path: Path) -> None:
    images = [flat(level) for level in LEVELS[:9]]
    images[4] = flat(90, (128, 96))
    write_video(tmp_path / "line.mkv", images, [40 * k for k in range(9)], cut={6: 0.6})
    frames, camera, codes = play(tmp_path / "line.mkv")
    assert codes == ["camera.wrong_size"]
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 5, 7, 8]
    assert [round(frame.belt_mm) for frame in frames] == [0, 40, 80, 120, 200, 280, 320]
    assert (camera.counters.wrong_size, camera.counters.corrupt) == (1, 1)


def test_at_camera_speed_late_frames_are_dropped_and_holes_are_no_drops(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "frame4.jpg").write_bytes(b"")
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    camera = open_camera(
        str(tmp_path), belt_mm_s=SPEED, frames_per_s=25.0, paced=True, clock=lambda: now[0], sleep=sleep
    )
    numbers = []
    while True:
        try:
            frame = camera.read(0.01)
        except CameraError:
            break
        if frame is None:
            continue
        assert frame.captured_s == pytest.approx(100.0 + 0.04 * frame.number)
        numbers.append(frame.number)
        if frame.number == 6:
            now[0] += 0.125
    assert numbers == [0, 1, 2, 3, 5, 6, 9, 10, 11]
    assert (camera.frames_dropped, camera.frames_bad) == (2, 1)


def test_a_loop_goes_on_in_time_where_the_recording_ended(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    camera = open_camera(str(tmp_path), belt_mm_s=SPEED, frames_per_s=25.0, paced=False, loop=True)
    frames = [camera.read(1.0) for _ in range(7)]
    assert [frame.number for frame in frames] == list(range(7))
    assert [round(frame.belt_mm) for frame in frames] == [40 * k for k in range(7)]
    camera.close()
    with pytest.raises(CameraError) as caught:
        camera.read(1.0)
    assert caught.value.code == "camera.ended"


def test_an_mp4_whose_sample_times_are_rewritten_plays_at_them(tmp_path: Path) -> None:
    path = tmp_path / "line.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (64, 48))
    for level in LEVELS[:6]:
        writer.write(flat(level))
    writer.release()
    data = bytearray(path.read_bytes())
    at = data.find(b"stts")
    count, samples, step = struct.unpack(">III", data[at + 8 : at + 20])
    assert (count, samples) == (1, 6)
    # The same table with another step: a file that claims 25 frames a second and holds frames of another time.
    data[at + 16 : at + 20] = struct.pack(">I", step // 2)
    path.write_bytes(data)
    frames, _, _ = play(path)
    assert [round(frame.belt_mm) for frame in frames][:5] == [0, 20, 40, 60, 80]
