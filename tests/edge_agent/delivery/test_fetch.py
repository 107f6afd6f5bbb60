"""Delivery: in any order, with wrong chunks, losses and power cuts, a bundle arrives whole or not at all."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.delivery.fetch import Fetch, collect_garbage
from models.bundle import MODEL, blobs_of, describe, read_bundle
from models.chunking import CHUNK_BYTES
from models.errors import BundleError, CapacityError
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files


class Blobs:
    """The blobs of one bundle as the broker holds them: digest -> bytes."""

    def __init__(self, directory: Path) -> None:
        self.bundle = read_bundle(directory)
        self.store = dict(blobs_of(self.bundle.manifest, lambda entry: (directory / entry.path).read_bytes()))


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    directory = tmp_path_factory.mktemp("source") / "bundle"
    tiny_bundle(directory, padding=5 * CHUNK_BYTES)
    return Blobs(directory)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fetch(root: Path, digest: str, clock: Clock | None = None, *, window: int = 4) -> Fetch:
    return Fetch(root, digest, window=window, reserve_bytes=0, clock=clock or Clock())


def run(found: Fetch, blobs: Blobs, limit: int = 1000) -> None:
    for _ in range(limit):
        wanted = found.wanted()
        if found.done or not wanted:
            return
        found.receive(blobs.store[wanted[0]], wanted[0])


def test_a_bundle_arrives_whole(tmp_path: Path, blobs: Blobs) -> None:
    found = fetch(tmp_path, blobs.bundle.digest)
    assert found.wanted() == [blobs.bundle.digest]
    run(found, blobs)
    assert found.done
    assert read_bundle(tmp_path / "slots" / blobs.bundle.digest).digest == blobs.bundle.digest
    assert list((tmp_path / "fetch").iterdir()) == []


def test_no_more_than_the_window_is_wanted_at_a_time(tmp_path: Path, blobs: Blobs) -> None:
    found = fetch(tmp_path, blobs.bundle.digest, window=3)
    found.receive(blobs.bundle.manifest.encoded(), found.wanted()[0])
    assert len(found.wanted()) == 3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.slow
def test_any_order_duplicates_wrong_chunks_and_power_cuts_end_in_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, blobs: Blobs, data: st.DataObject
) -> None:
    root, clock = tmp_path_factory.mktemp("agent"), Clock()
    found = fetch(root, blobs.bundle.digest, clock)
    for _ in range(200):
        clock.now += 400.0
        wanted = found.wanted()
        if found.done:
            break
        topic = data.draw(st.sampled_from(wanted))
        what = data.draw(st.sampled_from(["good", "good", "good", "lie", "stranger", "cut", "torn"]))
        if what == "good":
            found.receive(blobs.store[topic], data.draw(st.sampled_from([topic, None])))
        elif what == "lie":
            assert not found.receive(blobs.store[topic][:-1] + b"?", topic)
        elif what == "stranger":
            assert not found.receive(b"x", data.draw(st.sampled_from(["x", "zz", "", None])))
        elif what == "torn":
            parts = [p for p in (root / "fetch").glob("*.part") if p.stat().st_size]
            if parts:
                raw = bytearray(parts[0].read_bytes())
                raw[len(raw) // 2 :] = b"\0" * (len(raw) - len(raw) // 2)
                parts[0].write_bytes(bytes(raw))
                found = fetch(root, blobs.bundle.digest, clock)
        else:
            found = fetch(root, blobs.bundle.digest, clock)
    slot = root / "slots" / blobs.bundle.digest
    if found.done:
        assert read_bundle(slot, digest=blobs.bundle.digest).manifest == blobs.bundle.manifest
    else:
        assert not slot.exists()
    shutil.rmtree(root)


def test_a_poisoned_chunk_is_asked_for_again_after_a_growing_pause(tmp_path: Path, blobs: Blobs) -> None:
    clock = Clock()
    found = fetch(tmp_path, blobs.bundle.digest, clock, window=1)
    found.receive(blobs.bundle.manifest.encoded(), found.wanted()[0])
    topic = found.wanted()[0]
    pauses = []
    for _ in range(4):
        assert not found.receive(b"poison", topic)
        waited = 0.0
        while topic not in found.wanted():
            clock.now += 0.25
            waited += 0.25
        pauses.append(waited)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]
    assert found.fault is not None
    assert found.fault.code == "delivery.poisoned_chunk"
    assert found.counters["poisoned"] == 4
    run(found, blobs)
    assert found.done


def test_resuming_fetches_only_what_is_missing(tmp_path: Path, blobs: Blobs) -> None:
    first = fetch(tmp_path, blobs.bundle.digest)
    first.receive(blobs.bundle.manifest.encoded())
    for _ in range(4):
        topic = first.wanted()[0]
        first.receive(blobs.store[topic], topic)
    second = fetch(tmp_path, blobs.bundle.digest)
    run(second, blobs)
    assert second.done
    assert second.counters["chunks"] == len(blobs.store) - 1 - 4


def test_files_another_slot_has_are_not_fetched_again(tmp_path: Path, blobs: Blobs) -> None:
    run(fetch(tmp_path, blobs.bundle.digest), blobs)
    other = tmp_path / "other"
    files = tiny_files(padding=5 * CHUNK_BYTES) | {"card.md": b"# another card\n"}
    from models.bundle import write_bundle

    write_bundle(other, "tiny", files)
    changed = Blobs(other)
    found = fetch(tmp_path, changed.bundle.digest)
    run(found, changed)
    assert found.done
    assert found.counters["chunks"] == 1
    assert found.counters["reused_bytes"] > 5 * CHUNK_BYTES


def test_a_slot_that_was_damaged_is_not_reused(tmp_path: Path, blobs: Blobs) -> None:
    run(fetch(tmp_path, blobs.bundle.digest), blobs)
    model = tmp_path / "slots" / blobs.bundle.digest / MODEL
    model.write_bytes(b"x" * model.stat().st_size)
    (tmp_path / "slots" / blobs.bundle.digest).rename(tmp_path / "slots" / "broken")
    found = fetch(tmp_path, blobs.bundle.digest)
    run(found, blobs)
    assert found.counters["bytes"] > 5 * CHUNK_BYTES
    read_bundle(tmp_path / "slots" / blobs.bundle.digest)


def test_a_full_disk_refuses_before_anything_is_changed(tmp_path: Path, blobs: Blobs) -> None:
    found = Fetch(tmp_path, blobs.bundle.digest, window=4, reserve_bytes=2**62, clock=Clock())
    with pytest.raises(CapacityError) as caught:
        found.receive(blobs.bundle.manifest.encoded(), found.wanted()[0])
    assert caught.value.code == "delivery.disk_full"
    assert list((tmp_path / "slots").iterdir()) == []
    assert not list((tmp_path / "fetch").glob("*.part"))


def test_right_bytes_that_are_no_bundle_are_refused_for_good(tmp_path: Path) -> None:
    from models.bundle import sha256

    manifest = describe("tiny", {"../escape": b"x"}).encoded()
    found = fetch(tmp_path, sha256(manifest))
    with pytest.raises(BundleError) as caught:
        found.receive(manifest)
    assert caught.value.code == "bundle.unsafe_path"


def test_garbage_goes_and_what_is_named_stays(tmp_path: Path, blobs: Blobs) -> None:
    run(fetch(tmp_path, blobs.bundle.digest), blobs)
    (tmp_path / "slots" / "old").mkdir()
    (tmp_path / "slots" / ".x.partial").mkdir()
    assert sorted(collect_garbage(tmp_path, {blobs.bundle.digest})) == [".x.partial", "old"]
    assert [p.name for p in (tmp_path / "slots").iterdir()] == [blobs.bundle.digest]


def test_a_changed_head_moves_only_the_chunks_around_it(tmp_path: Path, blobs: Blobs) -> None:
    """One byte more in the middle of the model: the file is new, nearly all of its chunks are not."""
    from models.bundle import write_bundle

    run(fetch(tmp_path, blobs.bundle.digest), blobs)
    files = tiny_files(padding=5 * CHUNK_BYTES)
    at = len(files[MODEL]) // 2
    # Not a graph any more, which is no matter to delivery: only the self-test reads it.
    write_bundle(tmp_path / "other", "tiny", files | {MODEL: files[MODEL][:at] + b"!" + files[MODEL][at:]})
    changed = Blobs(tmp_path / "other")
    found = fetch(tmp_path, changed.bundle.digest)
    run(found, changed)
    assert found.done
    assert 1 <= found.counters["chunks"] <= 4
    read_bundle(tmp_path / "slots" / changed.bundle.digest, digest=changed.bundle.digest)


def test_where_links_are_refused_chunks_are_copied(
    tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from models.bundle import write_bundle

    run(fetch(tmp_path, blobs.bundle.digest), blobs)
    write_bundle(tmp_path / "other", "tiny", tiny_files(padding=5 * CHUNK_BYTES) | {"card.md": b"# new\n"})
    changed, link = Blobs(tmp_path / "other"), os.link

    def refuse(source: Path, target: Path) -> None:
        if "slots" in Path(source).parts[-3:] and ".part" not in str(target):
            raise OSError(1, "no links here")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    found = fetch(tmp_path, changed.bundle.digest)
    run(found, changed)
    assert found.done
    assert found.counters["chunks"] == 1
    assert found.counters["reused_bytes"] > 5 * CHUNK_BYTES


def test_claimed_space_is_not_asked_for_twice(tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume on a disk that has become full goes on: its space was claimed before."""
    from edge_agent.delivery import fetch as module

    first = fetch(tmp_path, blobs.bundle.digest)
    first.receive(blobs.bundle.manifest.encoded())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 65_536))
    second = Fetch(tmp_path, blobs.bundle.digest, window=4, reserve_bytes=0, clock=Clock())
    run(second, blobs)
    assert second.done
