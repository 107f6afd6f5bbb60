"""Writes Matroska videos of JPEG frames with any timestamps: variable rate, holes, doubled stamps, jumps back.

No encoder that is at hand writes such files, and real cameras do. EBML as in RFC 8794, Matroska as in RFC 9559.
"""

from pathlib import Path

import cv2
import numpy as np


def write_video(
    path: Path, images: list[np.ndarray], times_ms: list[int], *, quality: int = 92, cut: dict[int, float] | None = None
) -> None:
    """One cluster per frame, so that each has an absolute timestamp.

    Args:
        path: The file, `.mkv`.
        images: uint8 (H, W, 3) BGR.
        times_ms: Timestamp of each, milliseconds, 0 or more.
        quality: JPEG quality.
        cut: Share of its bytes that is left of a frame, by its place.
    """
    height, width = images[0].shape[:2]
    info = _element(0x1549A966, _uint(0x2AD7B1, 1_000_000) + _text(0x4D80, "test") + _text(0x5741, "test"))
    picture = _element(0xE0, _uint(0xB0, width) + _uint(0xBA, height))
    track = _uint(0xD7, 1) + _uint(0x73C5, 1) + _uint(0x83, 1) + _text(0x86, "V_MJPEG") + picture
    clusters = b"".join(
        _element(
            0x1F43B675,
            _uint(0xE7, at_ms) + _element(0xA3, b"\x81\x00\x00\x80" + _jpeg(image, quality, (cut or {}).get(at, 1.0))),
        )
        for at, (image, at_ms) in enumerate(zip(images, times_ms, strict=True))
    )
    head = _uint(0x4286, 1) + _uint(0x42F7, 1) + _uint(0x42F2, 4) + _uint(0x42F3, 8)
    head += _text(0x4282, "matroska") + _uint(0x4287, 4) + _uint(0x4285, 2)
    segment = info + _element(0x1654AE6B, _element(0xAE, track)) + clusters
    path.write_bytes(_element(0x1A45DFA3, head) + _element(0x18538067, segment))


def _jpeg(image: np.ndarray, quality: int, share: float) -> bytes:
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return data[: int(share * len(data))]


def _element(name: int, body: bytes) -> bytes:
    size = (len(body) | 1 << 56).to_bytes(8, "big")
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + size + body


def _uint(name: int, value: int) -> bytes:
    return _element(name, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))


def _text(name: int, value: str) -> bytes:
    return _element(name, value.encode())
