"""Opens the camera a configuration names: a video file, a folder of pictures, a V4L2 device or a network stream."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent.devices.live_camera import LiveCamera, absent
from edge_agent.devices.pictures import SUFFIXES
from edge_agent.devices.video_file import PictureFolder, Video, VideoFile


class ConstantSpeedEncoder:
    """Belt position from the time alone: right while the belt runs at its nominal speed.

    Args:
        speed_mm_s: Nominal belt speed.
        origin_s: Time at which the position is 0.
    """

    def __init__(self, speed_mm_s: float, origin_s: float = 0.0) -> None:
        self._speed = speed_mm_s
        self._origin_s = origin_s

    def position_mm(self, at_s: float) -> float:
        """See `Encoder`."""
        return (at_s - self._origin_s) * self._speed

    def speed_mm_s(self) -> float:
        """See `Encoder`."""
        return self._speed


def open_camera(
    source: str,
    *,
    belt_mm_s: float,
    frames_per_s: float = 30.0,
    paced: bool = True,
    loop: bool = False,
    stall_s: float = 1.0,
    size_px: tuple[int, int] | None = None,
    depth_bits: int = 0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> VideoFile | LiveCamera:
    """Opens the camera that `source` names.

    Args:
        source: A video file, a folder of pictures, a device (`/dev/video0` or `0`), or an `rtsp://`, `http://` URL.
        belt_mm_s: Nominal belt speed, for the belt position of frames that carry no other.
        frames_per_s: Rate of a folder, and of a video that does not state its rate.
        paced: Whether recordings play at camera speed (late frames are dropped); False gives every frame at once.
        loop: Whether recordings start again at their end.
        stall_s: A live camera without a frame for so long is stalled.
        size_px: Width and height that every frame must have; None = those of the first frame.
        depth_bits: Bits that carry the pictures of a folder; 0 = read from the pictures.
        clock: Monotonic clock in seconds.
        sleep: Function that waits.

    Raises:
        CameraError: `camera.absent` when there is nothing to open; `camera.corrupt`; `camera.unsupported_depth`.
    """
    path = Path(source)
    encoder = ConstantSpeedEncoder(belt_mm_s, clock() if paced or is_live(source) else 0.0)
    if is_live(source):
        return LiveCamera(
            source, encoder=encoder, size_px=size_px, frames_per_s=frames_per_s, stall_s=stall_s, clock=clock
        )
    exposures: PictureFolder | Video
    if path.is_dir():
        # A hidden file is no picture: file systems of other computers leave companions such as `._1.png`.
        names = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        if not names:
            raise absent(source, f"pictures ({', '.join(sorted(SUFFIXES))})", "none")
        exposures = PictureFolder(sorted(names, key=lambda p: _natural(p.name)), frames_per_s, depth_bits=depth_bits)
    elif path.is_file():
        exposures = Video(path, frames_per_s)
    else:
        raise absent(source, "a file, folder, device or URL", "nothing there")
    return VideoFile(exposures, encoder=encoder, size_px=size_px, paced=paced, loop=loop, clock=clock, sleep=sleep)


def is_live(source: str) -> bool:
    """Returns whether this names a device or a stream, not a recording."""
    return source.isdigit() or "://" in source or source.startswith("/dev/")


def _natural(name: str) -> list[int | str]:
    """Returns a sort key that places `frame9` before `frame10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
