"""Recordings that are cut, changed or made up: the damage is named, and at most the last record is lost."""

import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.recording.recorder import encode_image
from edge_agent.recording.replay import Replay
from edge_agent.recording.segments import (
    MAX_PAYLOAD,
    Checkpoint,
    FrameHead,
    framed,
    opening,
)
from models.errors import CameraError, InputError


def mini(count: int = 3) -> tuple[bytes, list[int]]:
    """Returns a recording of tiny frames and the offsets at which its records end."""
    image = np.arange(16 * 24 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 24, 3)
    point = Checkpoint(
        run="r", index=0, continuous=False, width_px=24, height_px=16, mm_per_px=0.5, lanes=((0, 16),), outlets_mm={},
        ids=0, last_number=-1, tracks=(), about={},
    )  # fmt: skip
    data, ends = opening(), []
    for index in range(-1, count):
        head = FrameHead(
            index=index, number=index, captured_s=index / 30, belt_mm=index * 33.0, digest="", variety="", lot=""
        )
        data += framed(point) if index < 0 else framed(head, encode_image(image))
        ends.append(len(data))
    return data, ends


MINI, ENDS = mini()


@settings(max_examples=300, deadline=None)
@given(cut=st.integers(0, len(MINI)))
def test_a_truncation_anywhere_costs_at_most_the_last_record(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "00000000.slr").write_bytes(MINI[:cut])
    source = Replay(folder)
    assert source.frames == max(0, sum(end <= cut for end in ENDS) - 1)
    assert bool(source.torn) == (cut not in {len(opening()), *ENDS})
    for _ in range(source.frames):
        assert source.read(0.0) is not None
    with pytest.raises(CameraError):
        source.read(0.0)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(MINI) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_always_noticed(at: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flip")
    data = bytearray(MINI)
    data[at] ^= 1 << bit
    (folder / "00000000.slr").write_bytes(data)
    if at >= ENDS[-2]:
        source = Replay(folder)
        assert source.torn
        assert source.frames == 2
        return
    with pytest.raises(InputError) as caught:
        Replay(folder)
    assert caught.value.code in {"recording.corrupt", "recording.wrong_version", "recording.malformed"}
    assert caught.value.expected is not None
    assert caught.value.got is not None


@settings(max_examples=100, deadline=None)
@given(tail=st.binary(min_size=1, max_size=4000) | st.integers(1, 5000).map(bytes))
def test_garbage_behind_the_last_record_is_a_torn_tail(tail: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tail")
    (folder / "00000000.slr").write_bytes(MINI + tail)
    source = Replay(folder)
    assert source.frames == 3
    assert len(source.torn) == 1


def test_an_unknown_version_and_an_oversize_record_are_named(tmp_path: Path) -> None:
    path = tmp_path / "00000000.slr"
    path.write_bytes(MINI[:8] + struct.pack("<I", 7) + MINI[12:])
    with pytest.raises(InputError) as caught:
        Replay(tmp_path)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("recording.wrong_version", 1, 7)
    prefix = struct.pack("<4sIII", b"SLr1", 10, MAX_PAYLOAD + 1, 0)
    path.write_bytes(MINI + prefix + struct.pack("<I", zlib.crc32(prefix)) + bytes(100))
    with pytest.raises(InputError) as caught:
        Replay(tmp_path)
    assert caught.value.code == "recording.oversize"
    assert str(MAX_PAYLOAD) in str(caught.value)


POINT = msgspec.structs.asdict(
    Checkpoint(
        run="r", index=0, continuous=False, width_px=24, height_px=16, mm_per_px=0.5, lanes=((0, 16),), outlets_mm={},
        ids=0, last_number=-1, tracks=(), about={},
    )
)  # fmt: skip


def head_of(index: int, **changes: object) -> FrameHead:
    plain = {"index": index, "number": 0, "captured_s": 0.0, "belt_mm": 0.0, "digest": "", "variety": "", "lot": ""}
    return FrameHead(**(plain | changes))


@pytest.mark.parametrize(
    "records",
    [
        framed(head_of(0), b""),
        framed(Checkpoint(**POINT)) + framed(head_of(4), b""),
        framed(Checkpoint(**POINT)) + framed(head_of(0, belt_mm=float("nan")), b""),
        framed(Checkpoint(**(POINT | {"lanes": ((0, 99),)}))),
        framed(Checkpoint(**(POINT | {"lanes": ((5, 6),)}))),
        framed(Checkpoint(**(POINT | {"width_px": 0}))),
        framed(Checkpoint(**(POINT | {"width_px": 16_384, "height_px": 16_384}))),
        framed({"type": "frame", "index": -1}),  # type: ignore[arg-type]
        framed([1, 2, 3]),  # type: ignore[arg-type]
    ],
)
def test_malformed_records_with_valid_checksums_are_refused(records: bytes, tmp_path: Path) -> None:
    (tmp_path / "00000000.slr").write_bytes(opening() + records)
    with pytest.raises(InputError) as caught:
        Replay(tmp_path)
    assert caught.value.code == "recording.malformed"


def test_a_frame_that_is_no_image_or_of_another_size_is_a_camera_fault(tmp_path: Path) -> None:
    big = encode_image(np.zeros((64, 64, 3), np.uint8))
    good = encode_image(np.zeros((16, 24, 3), np.uint8))
    for payload, code in (
        (b"no image", "camera.corrupt"),
        (b"", "camera.corrupt"),
        (good[:40], "camera.corrupt"),
        (big, "camera.wrong_size"),
    ):
        data = opening() + framed(Checkpoint(**POINT)) + framed(head_of(0), payload)
        (tmp_path / "00000000.slr").write_bytes(data)
        with pytest.raises(CameraError) as caught:
            Replay(tmp_path).read(0.0)
        assert caught.value.code == code


def test_a_file_that_changes_under_the_replay_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "00000000.slr"
    path.write_bytes(MINI)
    source = Replay(tmp_path)
    path.write_bytes(MINI[: ENDS[0]] + bytes(len(MINI) - ENDS[0]))
    with pytest.raises(InputError) as caught:
        source.read(0.0)
    assert caught.value.code == "recording.corrupt"
    path.unlink()
    with pytest.raises(InputError) as caught:
        source.read(0.0)
    assert caught.value.code == "recording.unreadable"
    with pytest.raises(InputError) as caught:
        Replay(tmp_path)
    assert caught.value.code == "recording.absent"
