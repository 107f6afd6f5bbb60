"""Opens videos, devices and streams with OpenCV; motion JPEG is taken packet by packet and decoded here.

OpenCV scales a frame of another size to that of the first one, and a decoder fills a frame that was cut off with grey;
neither gives a sign of it (OpenCV 5.0). A packet of motion JPEG is a picture file, so that its size and its end can be
checked. Other codecs give whole frames only, and are taken as OpenCV gives them.
"""

from typing import Any, Final, Protocol

import cv2
import numpy as np

from edge_agent.devices.pictures import is_whole

_RAW: Final = [cv2.CAP_PROP_FORMAT, -1]
"""OpenCV then gives packets as they stand in the stream."""
_PROBED: Final = 5
"""First packets among which one must be a whole picture."""


class Capture(Protocol):
    """The part of `cv2.VideoCapture` that is used."""

    def read(self) -> tuple[bool, Any]:
        """Returns whether there is a next image, and the image; (True, None) for one that is damaged."""

    def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
        """Returns whether the device is open."""

    def get(self, what: int) -> float:
        """Returns a property."""

    def release(self) -> None:
        """Releases the device."""


class MotionJpegCapture:
    """A capture that decodes the packets of a motion JPEG stream itself."""

    def __init__(self, packets: Capture) -> None:
        self._packets = packets

    def read(self) -> tuple[bool, Any]:
        """See `Capture`."""
        ok, packet = self._packets.read()
        return (ok and packet is not None), decoded(packet) if ok else None

    def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
        """See `Capture`."""
        return self._packets.isOpened()

    def get(self, what: int) -> float:
        """See `Capture`."""
        return self._packets.get(what)

    def release(self) -> None:
        """See `Capture`."""
        self._packets.release()


def decoded(packet: Any) -> Any:
    """Returns the picture of a packet, uint8 (H, W, 3) BGR, or None when it is damaged."""
    data = np.ascontiguousarray(packet, np.uint8).ravel()
    if not is_whole(data.tobytes()):
        return None
    try:
        return cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error:
        return None


def open_capture(source: str) -> Capture:
    """Opens a file, a device number or path, or a URL; the capture says whether that worked."""
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened() or int(capture.get(cv2.CAP_PROP_FOURCC)) != cv2.VideoWriter.fourcc(*"MJPG"):
        return capture
    if capture.getBackendName() != "FFMPEG":
        return capture
    size = (int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)))
    # Some cameras serve one connection at a time.
    capture.release()
    packets = cv2.VideoCapture(source, cv2.CAP_FFMPEG, _RAW)
    if _are_pictures(packets, size):
        if "://" in source:
            return MotionJpegCapture(packets)
        packets.release()
        return MotionJpegCapture(cv2.VideoCapture(source, cv2.CAP_FFMPEG, _RAW))
    packets.release()
    return cv2.VideoCapture(source)


def _are_pictures(packets: Capture, size: tuple[int, int]) -> bool:
    """Returns whether one of the first packets is a picture of the stated size; interlaced streams hold half ones."""
    for _ in range(_PROBED):
        ok, packet = packets.read()
        if not ok or packet is None:
            return False
        picture = decoded(packet)
        if picture is not None:
            return bool(picture.shape[:2] == size)
    return False
