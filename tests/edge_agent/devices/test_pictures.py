"""Pictures of a folder: what was cut off is damaged, and deep pictures are scaled by the bits they really have."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.devices.pictures import PictureReader, is_whole
from models.errors import CameraError

RNG = np.random.default_rng(5)
IMAGE = cv2.GaussianBlur(RNG.integers(0, 256, (60, 90, 3), np.uint8), (0, 0), 2.0)


def encoded(suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, IMAGE, list(options))[1].tobytes()


WHOLE = {
    "jpeg": encoded(".jpg"),
    "progressive": encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restart-markers": encoded(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    "png": encoded(".png"),
    "bmp": encoded(".bmp"),
    "webp": encoded(".webp"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_that_was_cut_anywhere_is_damaged(kind: str, tmp_path: Path) -> None:
    data = WHOLE[kind]
    assert is_whole(data)
    assert is_whole(data + b"\0" * 100), "bytes behind the end do no harm"
    cuts = sorted({*range(20, len(data) - 2, max(1, len(data) // 40)), len(data) - 2, len(data) - 1})
    for cut in cuts:
        (tmp_path / "1").write_bytes(data[:cut])
        assert list(PictureReader([tmp_path / "1"], depth_bits=8)) == [None], cut


def test_a_thumbnails_end_is_not_the_end_of_the_picture() -> None:
    thumbnail = cv2.imencode(".jpg", IMAGE[::4, ::4])[1].tobytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    photo = WHOLE["jpeg"][:2] + segment + WHOLE["jpeg"][2:]
    assert is_whole(photo)
    assert not is_whole(photo[: len(photo) - 40])


def test_a_png_with_a_flipped_bit_is_damaged(tmp_path: Path) -> None:
    data = bytearray(WHOLE["png"])
    data[len(data) // 2] ^= 4
    (tmp_path / "1.png").write_bytes(data)
    assert list(PictureReader([tmp_path / "1.png"])) == [None]


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_deep_pictures_are_scaled_by_their_real_depth(bits: int, suffix: str, tmp_path: Path) -> None:
    paths = []
    for number in range(5):
        # The first pictures are darker than the brightest one.
        deep = IMAGE.astype(np.uint16) << (bits - 8)
        deep = deep // 2 if number < 3 else deep
        paths.append(tmp_path / f"{number}{suffix}")
        cv2.imwrite(str(paths[-1]), deep)
    reader = PictureReader(paths)
    assert reader.depth_bits == bits
    pictures = [picture for picture in reader if picture is not None]
    assert len(pictures) == 5
    assert np.abs(pictures[4].astype(int) - IMAGE).max() <= 1
    assert np.abs(pictures[0].astype(int) - IMAGE // 2).max() <= 1
    assert reader.clipped == 0


def test_a_depth_that_is_configured_holds_and_what_exceeds_it_is_counted(tmp_path: Path) -> None:
    dark = (IMAGE.astype(np.uint16) << 4) // 8
    cv2.imwrite(str(tmp_path / "1.png"), dark)
    assert PictureReader([tmp_path / "1.png"]).depth_bits == 10, "nothing in the picture needs more"
    reader = PictureReader([tmp_path / "1.png"], depth_bits=12)
    assert np.abs(next(iter(reader)).astype(int) - IMAGE // 8).max() <= 1
    cv2.imwrite(str(tmp_path / "2.png"), IMAGE.astype(np.uint16) << 8)
    reader = PictureReader([tmp_path / "2.png"], depth_bits=12)
    assert next(iter(reader)).max() == 255
    assert reader.clipped == 1


def test_floating_point_pictures_are_refused_with_the_reason(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "1.tif"), IMAGE.astype(np.float32) / 255.0)
    with pytest.raises(CameraError) as caught:
        PictureReader([tmp_path / "1.tif"])
    assert caught.value.code == "camera.unsupported_depth"
    assert "float32" in str(caught.value.got)
