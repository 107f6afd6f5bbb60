"""The spool and its uplink: nothing is lost, nothing is deleted too early, what had to go is counted."""

import sqlite3
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.spool import Spool
from edge_agent.uplink import Uplink
from models.messages import Ack, Event, RecordKind, decode_batch

BOOT, OLD = "0123456789abcdef", "fedcba9876543210"


def spool(root: Path, boot: str = BOOT, **options: int) -> Spool:
    return Spool(root, boot, **({"max_bytes": 50_000_000, "ballast_bytes": 4096} | options), wall_ms=lambda: 5)


class Plane:
    """The control plane at the other end of the link: takes batches, may lose them or their acknowledgements."""

    connected = True

    def __init__(self) -> None:
        self.received: list = []
        self.stored: dict[tuple[str, int], bytes] = {}
        self.lose = False

    def publish(self, _topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        if not self.lose:
            batch = decode_batch(payload)
            self.received.append(batch)
            for record in batch.records:
                self.stored[record.boot_id, record.seq] = record.payload
        return True

    def ack(self) -> Ack:
        last = self.received[-1].records[-1]
        return Ack(boot_id=last.boot_id, through_seq=last.seq)


def test_records_survive_a_restart_and_keep_their_keys(tmp_path: Path) -> None:
    first = spool(tmp_path, OLD)
    for number in range(5):
        first.append(RecordKind.WINDOW, f"old{number}".encode(), lifetime_items=number)
    first.close()
    second = spool(tmp_path)
    second.append(RecordKind.EVENT, b"new")
    assert second.lifetime_items == 4
    batch = second.next_batch(100)
    assert [(r.boot_id, r.seq) for r in batch] == [(OLD, n) for n in range(5)]
    assert second.acknowledge(Ack(boot_id=OLD, through_seq=4), 4) == 5
    assert [(r.boot_id, r.seq, r.payload) for r in second.next_batch(100)] == [(BOOT, 0, b"new")]
    second.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["append", "send", "lose", "ack", "stale", "reconnect", "wait"]), max_size=60))
def test_whatever_is_lost_or_repeated_every_record_arrives(tmp_path_factory: pytest.TempPathFactory, steps) -> None:
    held, plane, now, written = spool(tmp_path_factory.mktemp("spool")), Plane(), 0.0, 0
    uplink = Uplink(held, plane, "t", retry_s=1.0)
    for step in steps:
        now += 0.1
        if step == "append":
            held.append(RecordKind.WINDOW, str(written).encode())
            written += 1
        elif step == "wait":
            now += 500.0
        elif step == "reconnect":
            uplink.reset()
        elif step in {"send", "lose"}:
            plane.lose = step == "lose"
            uplink.tick(now)
        elif plane.received:
            ack = plane.ack()
            uplink.acknowledged(ack if step == "ack" else Ack(boot_id=OLD, through_seq=10**9))
    plane.lose = False
    for _ in range(50):
        now += 500.0
        uplink.tick(now)
        if plane.received:
            uplink.acknowledged(plane.ack())
    assert held.depth == 0
    assert sorted(plane.stored.values(), key=int) == [str(n).encode() for n in range(written)]
    held.close()


def test_an_acknowledgement_beyond_what_was_sent_deletes_only_that(tmp_path: Path) -> None:
    held, plane = spool(tmp_path), Plane()
    uplink = Uplink(held, plane, "t", retry_s=1.0)
    held.append(RecordKind.WINDOW, b"sent")
    uplink.tick(0.0)
    held.append(RecordKind.WINDOW, b"later")
    assert uplink.acknowledged(Ack(boot_id=BOOT, through_seq=10**9)) == 1
    assert [r.payload for r in held.next_batch(10)] == [b"later"]
    held.close()


def test_beyond_the_budget_the_oldest_windows_go_and_are_counted(tmp_path: Path) -> None:
    held = spool(tmp_path, max_bytes=1_000_000)
    held.append(RecordKind.EVENT, msgspec.msgpack.encode(Event(at_ms=1, code="keep.me")))
    for number in range(3000):
        held.append(RecordKind.WINDOW, f"{number:05d}".encode() + b"x" * 1000)
    assert held.used_bytes() < 1_500_000
    rows = sqlite3.connect(tmp_path / "spool.sqlite").execute("SELECT kind, payload FROM record").fetchall()
    windows = [payload for kind, payload in rows if kind == "window"]
    events = [msgspec.msgpack.decode(payload, type=Event) for kind, payload in rows if kind == "event"]
    gaps = [event for event in events if event.code == "spool.gap"]
    assert [event.code for event in events if event.code != "spool.gap"] == ["keep.me"]
    assert sum(int(gap.facts["records"]) for gap in gaps) == held.dropped == 3000 - len(windows)
    assert windows[-1].startswith(b"02999")
    held.close()


def test_a_broken_file_is_set_aside_and_a_new_one_begins(tmp_path: Path) -> None:
    first = spool(tmp_path)
    first.append(RecordKind.WINDOW, b"x")
    first.close()
    (tmp_path / "spool.sqlite").write_bytes(b"SQLite format 3\0" + b"rubbish" * 1000)
    second = spool(tmp_path)
    assert second.quarantined
    second.append(RecordKind.WINDOW, b"y")
    assert second.depth == 1
    assert list(tmp_path.glob("spool.sqlite.broken-*"))
    second.close()
