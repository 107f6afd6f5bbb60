"""A picture of an agent's camera is kept by content, named by an event, bounded, and never holds up its batch."""

from collections import Counter
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from control_plane.fleet.spooled import PICTURE, PictureShelf, rows_of
from control_plane.registry.store import Store
from models.bundle import sha256
from models.messages import MAX_PICTURE_BYTES, Batch, Event, Evidence, Record, RecordKind, encode_batch

JPEG = cv2.imencode(".jpg", np.full((40, 60, 3), 90, np.uint8))[1].tobytes()
BOOT = "0" * 16


def batch(*payloads: tuple[RecordKind, bytes]) -> bytes:
    records = tuple(Record(boot_id=BOOT, seq=n, kind=kind, payload=data) for n, (kind, data) in enumerate(payloads))
    return encode_batch(Batch(records=records))


def evidence(jpeg: bytes = JPEG) -> tuple[RecordKind, bytes]:
    found = {"schema_version": 1, "at_ms": 1_790_000_000_000, "code": "optics.dirty", "quantity": "dirt", "jpeg": jpeg}
    return RecordKind.EVIDENCE, msgspec.msgpack.encode(found)


def test_a_picture_becomes_an_event_that_names_it_and_lies_in_the_store(tmp_path: Path) -> None:
    (row,) = rows_of(batch(evidence()))
    store, counters = Store(tmp_path), Counter[str]()
    PictureShelf(store.put, counters).keep("line-1", row)
    assert row.values["code"] == PICTURE
    assert row.values["facts"] == {
        "sha256": sha256(JPEG),
        "quantity": "dirt",
        "side": "both",
        "about": "optics.dirty",
    }
    assert store.get(sha256(JPEG)) == JPEG
    assert not counters


@pytest.mark.parametrize(
    "jpeg", [b"<svg onload=alert(1)>", b"\xff\xd8", b"", b"\xff\xd8\xff" + bytes(MAX_PICTURE_BYTES)]
)
def test_what_is_no_picture_is_refused_and_its_neighbour_is_not(jpeg: bytes) -> None:
    event = RecordKind.EVENT, msgspec.msgpack.encode(Event(at_ms=1, code="a.b"))
    bad, good = rows_of(batch(evidence(jpeg), event))
    assert bad.refused in {"evidence.no_jpeg", "message.malformed"}
    assert bad.picture == b""
    assert (good.values["code"], good.refused) == ("a.b", "")


def test_an_agent_gone_wild_fills_no_disk_and_another_is_not_held_back(tmp_path: Path) -> None:
    now, store, counters = [0.0], Store(tmp_path), Counter[str]()
    shelf = PictureShelf(store.put, counters, lambda: now[0])
    for _ in range(100):
        (row,) = rows_of(batch(evidence()))
        shelf.keep("wild", row)
    assert counters["pictures_too_many"] == 70
    assert "sha256" not in row.values["facts"], "the event names no picture that is not there"
    (row,) = rows_of(batch(evidence()))
    shelf.keep("calm", row)
    assert row.values["facts"]["sha256"] == sha256(JPEG)
    now[0] = 61.0
    (row,) = rows_of(batch(evidence()))
    shelf.keep("wild", row)
    assert row.values["facts"]["sha256"]


def test_a_full_disk_costs_the_picture_and_not_the_batch() -> None:
    def full(_data: bytes) -> str:
        raise OSError(28, "No space left on device")

    counters = Counter[str]()
    (row,) = rows_of(batch(evidence()))
    PictureShelf(full, counters).keep("line-1", row)
    assert counters["pictures_not_kept"] == 1
    assert "sha256" not in row.values["facts"]


def test_the_message_of_an_agent_is_what_is_read() -> None:
    sent = Evidence(at_ms=1, code="optics.dirty", quantity="dirt", jpeg=JPEG)
    (row,) = rows_of(batch((RecordKind.EVIDENCE, msgspec.msgpack.encode(sent))))
    assert row.picture == JPEG
