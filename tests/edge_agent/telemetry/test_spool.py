"""The spool and its uplink: nothing is lost, nothing is deleted too early, what had to go is counted."""

import contextlib
import sqlite3
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.telemetry.spool import Spool
from edge_agent.telemetry.uplink import Uplink
from models.errors import CapacityError
from models.messages import Ack, Gap, RecordKind, decode_batch

BOOT, OLD = "0123456789abcdef", "fedcba9876543210"


def spool(root: Path, boot: str = BOOT, **options: int) -> Spool:
    found = Spool(root, boot, **({"max_bytes": 50_000_000, "ballast_bytes": 4096} | options), wall_ms=lambda: 5)
    found._database.execute("PRAGMA synchronous=OFF")  # thousands of commits; power cuts are tested elsewhere
    return found


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
        return self.ack_of(-1)

    def ack_of(self, number: int) -> Ack:
        records = self.received[number].records
        return Ack(boot_id=records[0].boot_id, from_seq=records[0].seq, through_seq=records[-1].seq)


def test_records_survive_a_restart_and_keep_their_keys(tmp_path: Path) -> None:
    first = spool(tmp_path, OLD)
    for number in range(5):
        first.append(RecordKind.WINDOW, f"old{number}".encode(), lifetime_items=number)
    first.close()
    second = spool(tmp_path)
    second.append(RecordKind.EVENT, b"new")
    assert second.lifetime_items == 4
    batch = second.read(after=0, most=100)
    assert [(r.boot_id, r.seq) for r in batch.records] == [(OLD, n) for n in range(5)]
    assert second.forget(OLD, 0, 4, first_id=batch.first_id, last_id=batch.last_id) == 5
    assert [(r.boot_id, r.seq, r.payload) for r in second.read(after=0, most=100).records] == [(BOOT, 0, b"new")]
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
            ack = plane.ack_of(-1 - written % len(plane.received))
            uplink.acknowledged(ack if step == "ack" else Ack(boot_id=OLD, from_seq=0, through_seq=10**9))
    plane.lose = False
    for _ in range(50):
        now += 500.0
        uplink.tick(now)
        for number in range(len(plane.received)):
            uplink.acknowledged(plane.ack_of(number))
    assert held.depth == 0
    assert sorted(plane.stored.values(), key=int) == [str(n).encode() for n in range(written)]
    held.close()


def test_an_acknowledgement_beyond_what_was_sent_deletes_only_that(tmp_path: Path) -> None:
    held, plane = spool(tmp_path), Plane()
    uplink = Uplink(held, plane, "t", retry_s=1.0)
    held.append(RecordKind.WINDOW, b"sent")
    uplink.tick(0.0)
    held.append(RecordKind.WINDOW, b"later")
    assert uplink.acknowledged(Ack(boot_id=BOOT, from_seq=0, through_seq=10**9)) == 1
    assert [r.payload for r in held.read(after=0, most=10).records] == [b"later"]
    held.close()


def drain(held: Spool, plane: Plane) -> None:
    """Sends everything to the control plane."""
    uplink, now = Uplink(held, plane, "t", retry_s=1.0), 0.0
    while True:
        now += 1.0
        before = len(plane.received)
        uplink.tick(now)
        if len(plane.received) == before:
            return
        for number in range(before, len(plane.received)):
            uplink.acknowledged(plane.ack_of(number))


def reported_lost(plane: Plane) -> set[tuple[str, int]]:
    """Returns the numbers that were reported as lost to the control plane."""
    gaps = [msgspec.msgpack.decode(r.payload, type=Gap) for b in plane.received for r in b.records if r.kind == "gap"]
    return {(g.boot_id, n) for g in gaps for r in g.ranges for n in range(r.first, r.last + 1)}


def test_beyond_the_budget_the_gap_is_exact_and_the_last_alarms_stay(tmp_path: Path) -> None:
    old = spool(tmp_path, OLD, max_bytes=1_000_000)
    for number in range(300):
        old.append(RecordKind.WINDOW, b"%05d" % number + b"x" * 1000)
    old.close()
    held, plane = spool(tmp_path, max_bytes=1_000_000), Plane()
    for number in range(3000):
        kind = RecordKind.EVENT if number % 100 == 50 else RecordKind.WINDOW
        held.append(kind, b"%05d" % number + b"x" * 1000)
        assert held.used_bytes() < 1_400_000
    drain(held, plane)
    assert held.depth == 0
    gaps = {key for b in plane.received for r in b.records if r.kind == "gap" for key in [(r.boot_id, r.seq)]}
    stored = set(plane.stored) - gaps
    used = {(OLD, n) for n in range(300)} | {(BOOT, n) for n in range(held._seq)}
    assert stored | gaps | reported_lost(plane) == used
    assert not stored & reported_lost(plane)
    assert len(reported_lost(plane)) == held.dropped > 2000
    kinds = [r.kind for b in plane.received for r in b.records]
    assert kinds.count(RecordKind.EVENT) == 30
    assert (BOOT, 2999) in stored
    counts = [msgspec.msgpack.decode(r.payload, type=Gap) for b in plane.received for r in b.records if r.kind == "gap"]
    assert sum(sum(gap.records.values()) for gap in counts) == held.dropped
    held.close()


def test_alarms_go_before_windows_without_starving_them(tmp_path: Path) -> None:
    held, plane = spool(tmp_path, max_bytes=1_000_000), Plane()
    for number in range(800):
        held.append(RecordKind.WINDOW, b"%05d" % number + b"x" * 600)
    for number in range(3000):
        held.append(RecordKind.EVENT, b"%05d" % number + b"x" * 600)
    drain(held, plane)
    kinds = [r.kind for b in plane.received for r in b.records]
    assert kinds.count(RecordKind.WINDOW) == 800
    assert 50 < kinds.count(RecordKind.EVENT) < 1000
    held.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["window", "event", "drop", "restart", "send", "lost"]), max_size=80))
def test_every_number_is_waiting_acknowledged_or_in_a_gap(tmp_path_factory: pytest.TempPathFactory, steps) -> None:
    root, plane, boots = tmp_path_factory.mktemp("spool"), Plane(), [OLD]
    held, used = spool(root, OLD), set()
    uplink, now = Uplink(held, plane, "t", retry_s=1.0), 0.0
    for step in steps:
        now += 0.4
        if step in {"window", "event"}:
            held.append(RecordKind(step), b"x" * 100)
        elif step == "drop":
            held._bytes["event"] += len(boots)  # whichever kind comes: eviction itself is what is looked at
            if held._database.execute("SELECT 1 FROM record WHERE kind = 'window'").fetchone():
                held._evict()
        elif step == "restart":
            used |= {(boots[-1], n) for n in range(held._seq)}
            held.close()
            boots.append(f"{len(boots):016x}")
            held = spool(root, boots[-1])
            uplink = Uplink(held, plane, "t", retry_s=1.0)
        else:
            before = len(plane.received)
            uplink.tick(now)
            if step == "send":
                for number in range(before, len(plane.received)):
                    uplink.acknowledged(plane.ack_of(number))
    drain(held, plane)
    used |= {(boots[-1], n) for n in range(held._seq)}
    assert held.depth == 0
    assert set(plane.stored) | reported_lost(plane) == used
    held.close()


def test_records_after_a_partition_go_ahead_of_those_that_waited(tmp_path: Path) -> None:
    held, plane = spool(tmp_path), Plane()
    for number in range(5000):
        held.append(RecordKind.WINDOW, b"%05d" % number)
    uplink = Uplink(held, plane, "t", retry_s=10.0)
    uplink.tick(0.0)
    assert len(plane.received) == 4
    held.append(RecordKind.EVENT, b"now")
    uplink.acknowledged(plane.ack_of(0))
    uplink.tick(0.1)
    assert [r.payload for r in plane.received[4].records] == [b"now"]
    held.close()


def test_a_full_disk_releases_the_ballast_and_counts_what_it_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own limit plays the full disk: the same error, the same code path."""
    held, plane = spool(tmp_path, ballast_bytes=1_000_000), Plane()
    for number in range(100):
        held.append(RecordKind.WINDOW, b"%05d" % number + b"x" * 2000)
    pages = held._database.execute("PRAGMA page_count").fetchone()[0]
    held._database.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(200):
        held.append(RecordKind.WINDOW, b"%05d" % number + b"x" * 2000)
    assert not (tmp_path / "ballast").exists()
    assert held.dropped > 0
    monkeypatch.setattr(held, "_evict", lambda: None)
    refused = 0
    for _ in range(50):
        try:
            held.append(RecordKind.WINDOW, b"y" * 2000)
        except CapacityError:
            refused += 1
    assert refused
    monkeypatch.undo()
    held._database.execute("PRAGMA max_page_count = 1000000")
    held.append(RecordKind.EVENT, b"room again")
    drain(held, plane)
    assert (tmp_path / "ballast").stat().st_size == 1_000_000
    assert len(reported_lost(plane)) == held.dropped >= refused
    assert set(plane.stored) | reported_lost(plane) == {(BOOT, n) for n in range(held._seq)}
    held.close()


class RefusesCommits:
    """A connection whose next COMMIT fails and leaves the transaction open, as SQLite may."""

    def __init__(self, inner: sqlite3.Connection, times: int) -> None:
        self.inner, self.times = inner, times

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.times:
            self.times -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return self.inner.execute(statement, *values)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_commit_that_fails_leaves_nothing_behind(tmp_path: Path, times: int) -> None:
    held, plane = spool(tmp_path), Plane()
    held.append(RecordKind.WINDOW, b"before")
    held._database = RefusesCommits(held._database, times)
    with contextlib.suppress(CapacityError):
        held.append(RecordKind.WINDOW, b"in between")
    held.append(RecordKind.WINDOW, b"after")
    drain(held, plane)
    assert set(plane.stored) | reported_lost(plane) == {(BOOT, n) for n in range(held._seq)}
    held.close()


@pytest.mark.slow
def test_a_day_without_connection_fits_and_drains(tmp_path: Path) -> None:
    """864,000 records of 150 bytes (10 a second for 24 hours): at most 256 MB, none dropped, all arrive once."""
    held, plane = spool(tmp_path, max_bytes=256_000_000), Plane()
    for start in range(0, 864_000, 4_000):  # many at once only to be quick: the log must not remember the size of it
        held._database.execute("BEGIN")
        held._database.executemany(
            "INSERT INTO record (boot_id, seq, kind, payload) VALUES (?, ?, 'window', ?)",
            ((BOOT, number, b"%08d" % number + b"x" * 142) for number in range(start, start + 4_000)),
        )
        held._database.execute("COMMIT")
    held._seq = 864_000
    held.append(RecordKind.EVENT, b"connected")
    assert held.used_bytes() < 256_000_000
    assert sum(p.stat().st_size for p in tmp_path.glob("spool.sqlite*")) < 256_000_000
    assert held.dropped == 0
    drain(held, plane)
    assert held.depth == 0
    assert len(plane.stored) == 864_001
    assert sum(len(batch.records) for batch in plane.received) == 864_001
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


def test_a_full_disk_at_the_start_never_sets_the_spool_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = spool(tmp_path, OLD)
    first.append(RecordKind.WINDOW, b"kept")
    first.close()
    connect = Spool._connect

    def refuse(self: Spool) -> sqlite3.Connection:
        if (tmp_path / "ballast").exists():
            raise sqlite3.OperationalError("database or disk is full")
        return connect(self)

    monkeypatch.setattr(Spool, "_connect", refuse)
    second = spool(tmp_path)
    assert not second.quarantined
    assert [r.payload for r in second.read(after=0, most=10).records] == [b"kept"]
    second.close()
