"""Decodes the pictures of a folder, and refuses what a decoder would complete with grey or show nearly black.

Decoders accept a file that was cut off and fill the rest with grey: such a picture is damaged, not an image of the
belt. Whether a file is whole is read from its own structure (end marker, chunks with their sums, stated size). Pictures
of more than eight bits are scaled by the bits that carry the picture: a camera of twelve bits writes files of sixteen,
whose upper bits are empty.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Image
from models.errors import CameraError

SUFFIXES: Final = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Behind a scan's header, FF 00 is a stuffed byte and FF D0 to FF D7 are restart markers (ITU-T T.81, B.1.1)."""
_DEPTHS: Final = (10, 12, 14, 16)
"""Bits that cameras of more than eight bits give (GenICam pixel formats Mono10 to Mono16)."""
_SAMPLED: Final = 8
"""Pictures of a folder from which the depth is read."""


def is_whole(data: bytes) -> bool:
    """Returns whether a picture file ends where its own structure says; True for formats without such a statement."""
    if data.startswith(_JPEG):
        return _whole_jpeg(data)
    if data.startswith(_PNG):
        return _whole_png(data)
    if data.startswith(b"BM") and len(data) >= 14:
        # Some writers leave the size 0.
        return len(data) >= int.from_bytes(data[2:6], "little")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return True


def _whole_jpeg(data: bytes) -> bool:
    """Walks the segments up to the end marker. A thumbnail's end marker lies inside a segment and does not count."""
    at = 2
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        marker, at = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return True
        if marker != 0x01:
            if at + 2 > len(data):
                return False
            at += int.from_bytes(data[at : at + 2], "big")
    return False


def _whole_png(data: bytes) -> bool:
    """Walks the chunks and their sums up to IEND."""
    at = len(_PNG)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body, end = data[at + 4 : at + 8 + length], at + 12 + length
        if end > len(data) or zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if body[:4] == b"IEND":
            return True
        at = end
    return False


class PictureReader:
    """Decodes the pictures of one folder, all at the same depth.

    Args:
        paths: The pictures in order.
        depth_bits: Bits that carry the picture; 0 = read from the pictures themselves.

    Raises:
        CameraError: `camera.unsupported_depth` for pictures of floating-point or 32-bit numbers.
    """

    def __init__(self, paths: Sequence[Path], *, depth_bits: int = 0) -> None:
        self.paths = tuple(paths)
        self.depth_bits = depth_bits or self._measured_depth()
        self.clipped = 0
        """Number of pictures that hold values beyond `depth_bits`."""

    def __iter__(self) -> Iterator[Image | None]:
        """Yields each picture in order, uint8 (H, W, 3) BGR; None for one that is damaged."""
        for path in self.paths:
            yield self._picture(path)

    def _measured_depth(self) -> int:
        """Eight for eight-bit files; else the smallest usual depth that holds the largest value of a sample."""
        places = np.linspace(0, len(self.paths) - 1, min(len(self.paths), _SAMPLED)).astype(int)
        largest, deep = 0, False
        for at in dict.fromkeys(places.tolist()):
            raw = _decoded(self.paths[at])
            if raw is not None and raw.dtype != np.uint8:
                deep = True
                largest = max(largest, int(raw.max()))
        return next(bits for bits in _DEPTHS if largest < 1 << bits) if deep else 8

    def _picture(self, path: Path) -> Image | None:
        raw = _decoded(path)
        if raw is None or raw.dtype == np.uint8:
            return raw
        bits = max(self.depth_bits, 9)
        self.clipped += bool(int(raw.max()) >> bits)
        # Level 2**bits becomes 256, as a shift to the right would make it.
        return np.asarray(cv2.convertScaleAbs(raw, alpha=256.0 / (1 << bits), beta=-0.5), np.uint8)


def _decoded(path: Path) -> NDArray[Any] | None:
    """Returns uint8 or uint16 (H, W, 3) BGR, or None where the file is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not is_whole(data):
        return None
    try:
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    if raw is None:
        return None
    if raw.dtype not in (np.uint8, np.uint16):
        raise CameraError(
            "camera.unsupported_depth",
            f"{path.name} holds numbers whose range is not known; write pictures of 8 or 16 bits.",
            expected="uint8 or uint16",
            got=str(raw.dtype),
        )
    return raw
