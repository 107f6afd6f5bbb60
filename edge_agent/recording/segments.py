"""Segment files of a recording: an append-only row of framed records (`.slr`).

A file begins with `SORTREC` + NUL and a version (u32), then records follow, little-endian:

    marker "SLr1" | head bytes u32 | payload bytes u32 | crc32 of head + payload u32 | crc32 of these 16 bytes u32
    head (MessagePack, one of the structs below) | payload (PNG of a frame, belt of a checkpoint, or nothing)

The first record of a file is a `Checkpoint`, so that each file can be replayed without the one before it. A damage
after which no whole record begins is a *torn tail*, as a power cut leaves it: the reader stops before it and reports
it. Damage with records behind it is corruption and an error. Sums and limits are checked before any content is used.
"""

import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import InputError

MAGIC: Final = b"SORTREC\0"
VERSION: Final = 1
SUFFIX: Final = ".slr"
KEPT: Final = ".kept"
MAX_HEAD: Final = 8 * 1024 * 1024
MAX_PAYLOAD: Final = 128 * 1024 * 1024
_MAX_PIXELS: Final = 64 * 1024 * 1024
_MIN_LANE_PX: Final = 8
_OPENING: Final = struct.Struct("<8sI")
_RECORD: Final = struct.Struct("<4sIII")
_SUM: Final = struct.Struct("<I")
_MARKER: Final = b"SLr1"
_PREFIX: Final = _RECORD.size + _SUM.size
_CHUNK: Final = 1024 * 1024

Count = Annotated[int, msgspec.Meta(ge=0)]
Pixels = Annotated[int, msgspec.Meta(ge=0, le=16_384)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]


class TrackState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One item in sight, without its pixels. The arrays are float32, row by row."""

    item_id: Count
    lane: Annotated[int, msgspec.Meta(ge=0, le=63)]
    item_mm: float
    length_mm: float
    last_x_px: float
    last_frame: int
    last_captured_s: float
    last_belt_mm: float
    observations: Count
    next_view_px: float
    views: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    digest: Text
    """Digest of the bundle that judges it; empty when none does yet."""
    probabilities: bytes
    embeddings: bytes
    features: bytes
    weight_g: float | None = None
    weighed_frame: int = -1


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="checkpoint"):
    """The line before its next frame: geometry and the core's state. The payload is the learnt belt, float32."""

    run: Text
    """Names one start of the recorder."""
    index: Count
    """Index of the frame that follows, counted over all frames offered in this run."""
    continuous: bool
    """Whether nothing was lost between the record before it and this one."""
    width_px: Annotated[int, msgspec.Meta(ge=8, le=16_384)]
    height_px: Annotated[int, msgspec.Meta(ge=8, le=16_384)]
    mm_per_px: Annotated[float, msgspec.Meta(gt=0.0)]
    lanes: Annotated[tuple[tuple[Pixels, Pixels], ...], msgspec.Meta(min_length=1, max_length=64)]
    outlets_mm: dict[str, float]
    ids: Count
    last_number: int
    tracks: Annotated[tuple[TrackState, ...], msgspec.Meta(max_length=4096)]
    about: dict[str, str]
    """Facts about the recording machine: versions, threads, directory of the bundle."""


class FrameHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="frame"):
    """One frame. The payload is its image as PNG."""

    index: Count
    number: Count
    captured_s: float
    belt_mm: float
    digest: Text
    """Digest of the bundle in force; empty when none was."""
    variety: Text
    lot: Text


class Decision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="decision"):
    """One verdict. Two decisions are the same only when every bit of them is."""

    index: Count
    """Index of the frame on which it was made."""
    item_id: Count
    lane: Count
    item_mm: float
    klass: Text
    grade: Text
    wanted: Text
    """Outlet that the verdict named."""
    outlet: Text
    """Outlet that the item took: the late one when the verdict came too late."""
    defect: float
    probabilities: bytes
    """Probability of the item for each class, float32 (C)."""
    view_probabilities: bytes
    """Probabilities of its views, float32 (V, C)."""
    views: Count
    digest: Text
    weight_g: float | None = None
    """Weight measured by the load cell, where the model takes one."""
    weighed_frame: int = -1
    """Number of the frame from which on the weight was known; -1 = it was not."""


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kept"):
    """Marks the segment as worth keeping."""

    reason: Text


class End(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="end"):
    """Marks that the run ended in order and that its last items were finished."""


Head: TypeAlias = Checkpoint | FrameHead | Decision | Kept | End
_DECODER: Final = msgspec.msgpack.Decoder(Head)
_ENCODER: Final = msgspec.msgpack.Encoder()


def opening() -> bytes:
    """Returns the first bytes of a segment file."""
    return _OPENING.pack(MAGIC, VERSION)


def framed(head: Head, payload: bytes = b"") -> bytes:
    """Returns a record as it stands in the file."""
    packed = _ENCODER.encode(head)
    prefix = _RECORD.pack(_MARKER, len(packed), len(payload), zlib.crc32(payload, zlib.crc32(packed)))
    return b"".join((prefix, _SUM.pack(zlib.crc32(prefix)), packed, payload))


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a record in its file, and its decoded head."""

    head: Head
    path: Path
    at: int
    """Offset of the head in the file, bytes."""
    head_bytes: int
    payload_bytes: int
    sum: int

    def payload(self) -> bytes:
        """Reads the payload and checks it again, as the file may have changed since it was indexed.

        Raises:
            InputError: `recording.corrupt`, `recording.unreadable`.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.at)
                body = stream.read(self.head_bytes + self.payload_bytes)
        except OSError as error:
            raise unreadable(self.path, error) from error
        found = zlib.crc32(body)
        if found != self.sum:
            raise _corrupt(self.path, self.at, f"crc32 {self.sum:08x}", f"{found:08x}")
        return body[self.head_bytes :]


@dataclass(slots=True)
class Segment:
    """One indexed file."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    torn: str = ""
    """Description of a torn tail; empty when the file ends with a whole record."""


def segment_files(folder: Path) -> list[tuple[int, Path, bool]]:
    """Returns the segments of a folder, oldest first, as (sequence, path, kept). Other files are ignored."""
    found: list[tuple[int, Path, bool]] = []
    for path in folder.iterdir():
        stem, _, suffix = path.name.partition(".")
        if stem.isdigit() and len(stem) == 8 and f".{suffix}" in {SUFFIX, KEPT + SUFFIX}:
            found.append((int(stem), path, f".{suffix}" == KEPT + SUFFIX))
    return sorted(found)


def read_segment(path: Path) -> Segment:
    """Indexes a file and checks every sum.

    Raises:
        InputError: `recording.malformed`, `recording.wrong_version`, `recording.oversize`, `recording.corrupt`,
            `recording.unreadable`.
    """
    segment = Segment(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(_OPENING.size)
            if _check_opening(path, first, size):
                segment.torn = f"{path.name}: ends at byte {size}, within its first {_OPENING.size}"
                return segment
            while (at := stream.tell()) < size:
                problem = _read_record(stream, segment, at, size)
                if problem:
                    segment.torn = f"{path.name}: {problem} at byte {at} of {size}"
                    break
    except OSError as error:
        raise unreadable(path, error) from error
    if segment.entries and not isinstance(segment.entries[0].head, Checkpoint):
        raise malformed(path, "a checkpoint as first record", type(segment.entries[0].head).__name__)
    return segment


def _check_opening(path: Path, first: bytes, size: int) -> bool:
    """Returns whether the file was torn within its opening."""
    if not MAGIC.startswith(first[:8]):
        raise malformed(path, f"a segment ({MAGIC[:7].decode()} ...)", first[:8])
    if size < _OPENING.size:
        return True
    version = _OPENING.unpack(first)[1]
    if version != VERSION:
        raise InputError(
            "recording.wrong_version",
            f"{path.name} was written in a version this program does not know.",
            expected=VERSION,
            got=version,
        )
    return False


def _read_record(stream: BinaryIO, segment: Segment, at: int, size: int) -> str:
    """Reads one record into the segment; returns a description of what is torn, or an empty string."""
    path = segment.path
    prefix = stream.read(_PREFIX)
    if len(prefix) < _PREFIX and _MARKER.startswith(prefix[:4]):
        return "a record's prefix ends"
    lengths = _lengths(prefix)
    if lengths is None:
        if not _record_follows(stream, at + 1):
            return "no record begins"
        raise _corrupt(path, at, "a record", prefix[:8])
    head_bytes, payload_bytes, expected = lengths
    if head_bytes > MAX_HEAD or payload_bytes > MAX_PAYLOAD:
        raise InputError(
            "recording.oversize",
            f"{path.name} holds a record larger than any the recorder writes.",
            expected=f"head <= {MAX_HEAD}, payload <= {MAX_PAYLOAD}",
            got=f"{head_bytes}, {payload_bytes}",
        )
    if at + _PREFIX + head_bytes + payload_bytes > size:
        return "a record ends"
    body = stream.read(head_bytes + payload_bytes)
    found = zlib.crc32(body)
    if found != expected:
        if not _record_follows(stream, at + _PREFIX):
            return "a record's sum does not hold"
        raise _corrupt(path, at, f"crc32 {expected:08x}", f"{found:08x}")
    try:
        head = _DECODER.decode(body[:head_bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise malformed(path, "a record of version 1", error) from error
    _check_numbers(path, head)
    segment.entries.append(Entry(head, path, at + _PREFIX, head_bytes, payload_bytes, expected))
    return ""


def _lengths(prefix: bytes) -> tuple[int, int, int] | None:
    """Returns head bytes, payload bytes and sum of a prefix, or None when these bytes are no prefix."""
    if len(prefix) < _PREFIX or prefix[:4] != _MARKER:
        return None
    if _SUM.unpack_from(prefix, _RECORD.size)[0] != zlib.crc32(prefix[: _RECORD.size]):
        return None
    _, head_bytes, payload_bytes, total = _RECORD.unpack_from(prefix)
    return head_bytes, payload_bytes, total


def _record_follows(stream: BinaryIO, start: int) -> bool:
    """Returns whether a record begins anywhere from `start` on; reads the rest of the file once, in pieces."""
    stream.seek(start)
    window = b""
    while piece := stream.read(_CHUNK):
        window += piece
        found = window.find(_MARKER)
        while found >= 0:
            if _lengths(window[found : found + _PREFIX]) is not None:
                return True
            found = window.find(_MARKER, found + 1)
        window = window[-(_PREFIX - 1) :]
    return False


def _check_numbers(path: Path, head: Head) -> None:
    """Refuses numbers that are not finite and lanes outside the image, which would break the line far from here."""
    numbers: list[float] = []
    match head:
        case FrameHead():
            numbers = [head.captured_s, head.belt_mm]
        case Checkpoint():
            numbers = [head.mm_per_px, *head.outlets_mm.values()]
            for track in head.tracks:
                numbers += [track.item_mm, track.length_mm, track.last_x_px, track.last_captured_s]
                numbers += [track.last_belt_mm, track.next_view_px]
            inside = all(top + _MIN_LANE_PX <= bottom <= head.height_px for top, bottom in head.lanes)
            if not inside or any(track.lane >= len(head.lanes) for track in head.tracks):
                raise malformed(path, f"lanes within {head.height_px} rows", head.lanes)
            if head.width_px * head.height_px > _MAX_PIXELS:
                raise malformed(path, f"<= {_MAX_PIXELS} pixels", f"{head.width_px} x {head.height_px}")
    if not all(map(math.isfinite, numbers)):
        raise malformed(path, "finite numbers", numbers)


def floats(data: bytes, columns: int, rows: int) -> list[NDArray[np.float32]]:
    """Returns the rows of a float32 array that was stored as bytes.

    Raises:
        InputError: `recording.malformed` when the size is another.
    """
    if len(data) != rows * columns * 4:
        raise InputError(
            "recording.malformed",
            "A checkpoint's array has another size than the checkpoint states.",
            expected=rows * columns * 4,
            got=len(data),
        )
    return list(np.frombuffer(data, np.float32).reshape(rows, columns).copy())


def malformed(path: Path, expected: object, got: object) -> InputError:
    """Returns the error for a file whose sums hold but whose content is impossible."""
    return InputError("recording.malformed", f"{path.name} is no recording.", expected=expected, got=got)


def unreadable(path: Path, error: OSError) -> InputError:
    """Returns the error for a file that the system refuses to read."""
    return InputError("recording.unreadable", f"{path} cannot be read.", expected="a readable recording", got=error)


def _corrupt(path: Path, at: int, expected: object, got: object) -> InputError:
    return InputError(
        "recording.corrupt",
        f"{path.name} is damaged at byte {at} and goes on behind it; restore it or remove it.",
        expected=expected,
        got=got,
    )
