"""A control plane is copied while it works and goes on elsewhere; agents that have seen more than the copy follow."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from sqlmodel import select

from control_plane.backup import restore as restoring
from control_plane.backup.archive import MANIFEST, read_archive
from control_plane.backup.restore import Restored, check_finished, restore
from control_plane.backup.save import Saved, save
from control_plane.database.audit import audit, broken_audit_entry
from control_plane.database.engine import open_database, reading, writing
from control_plane.database.tables.agents import Agent, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import Rollout, RolloutState
from control_plane.fleet.desired_state import DesiredChange, assign
from control_plane.registry.versions import find_version
from control_plane.rollouts.records import Order, create_rollout
from control_plane.services import Services, open_services
from models.errors import ConfigError, ConflictError, InputError, SortlineError
from models.messages import encode
from models.topics import BIN_BITS, Channel, bin_of
from models.trust import Outcome, verify
from tests.control_plane.fleet.test_fleet import batch, register_tiny, reported, say, window
from tests.simulators.plane import make_services
from tests.simulators.postgres import empty


def backup_of(services: Services, folder: Path) -> Saved:
    return save(services.config, folder, None, utc_now())


def bring_back(services: Services, source: Path, root: Path) -> tuple[Services, Restored]:
    """The machine and its database are gone; another one goes on from the backup."""
    services.engine.dispose()
    if services.config.database:
        empty(services.config.database)
    config = msgspec.structs.replace(services.config, data_dir=str(root))
    found = restore(config, source, actor="t", now=utc_now())
    return open_services(config), found


@pytest.fixture
def again(
    services: Services, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[Path], tuple[Services, Restored]]:
    def run(source: Path) -> tuple[Services, Restored]:
        found = bring_back(services, source, tmp_path / "new machine")
        request.addfinalizer(found[0].engine.dispose)
        return found

    return run


@dataclass
class Box:
    """What an agent remembers of signed metadata."""

    name: str
    anchor: bytes
    scratch: Path
    trusted: bytes = b""
    looks: int = field(default=0)

    def look(self, services: Services) -> Outcome:
        self.looks += 1
        with reading(services.engine) as session:
            signed, own = services.signer.current_set(session), services.signer.bin(session, self.name)
            document = services.signer.document(session, self.name)
        outcome = verify(
            signed,
            own,
            document,
            agent_id=self.name,
            anchor=self.anchor,
            trusted=self.trusted,
            now=utc_now(),
            scratch=self.scratch / str(self.looks),
        )
        self.trusted = outcome.trusted
        return outcome


def give(services: Services, agent_id: str, bundle: str) -> int:
    with writing(services.engine) as session:
        generation = assign(session, agent_id, DesiredChange(bundle=bundle))
        services.signer.sign_changes(session, utc_now())
        session.commit()
    return generation


def box_of(services: Services, tmp_path: Path, name: str = "line-1") -> Box:
    say(services, Channel.REPORTED, encode(reported()), name)
    return Box(name, (services.config.trust_folder / "1.root.json").read_bytes(), tmp_path / "scratch" / name)


def test_what_was_saved_is_there_again_and_grows_on(
    services: Services, tmp_path: Path, again: Callable[[Path], tuple[Services, Restored]]
) -> None:
    digest = register_tiny(services, tmp_path / "tiny")
    say(services, Channel.REPORTED, encode(reported()))
    say(services, Channel.BATCH, batch(window(7), window(8)))
    with reading(services.engine) as session:
        before = session.exec(select(WindowRow).order_by(WindowRow.seq)).all()
    saved = backup_of(services, tmp_path / "backup")
    assert not saved.damaged
    say(services, Channel.BATCH, batch(window(9), first=2))  # is lost
    plane, found = again(tmp_path / "backup")
    with reading(plane.engine) as session:
        rows = session.exec(select(WindowRow).order_by(WindowRow.seq)).all()
        assert [row.model_dump() for row in rows] == [row.model_dump() for row in before]
        assert find_version(session, "tiny")[1].bundle == digest
        assert broken_audit_entry(session) is None
    assert plane.store.write_directory(digest, tmp_path / "out").is_dir()
    assert (found.files, found.made_at) == (saved.files, saved.made_at)
    register_tiny(plane, tmp_path / "second", bias=1.0)  # numbers go on: nothing collides
    with reading(plane.engine) as session:
        assert find_version(session, "tiny")[1].number == 2


def test_an_agent_that_has_seen_more_than_the_copy_follows_again(
    services: Services, tmp_path: Path, again: Callable[[Path], tuple[Services, Restored]]
) -> None:
    digest = register_tiny(services, tmp_path / "tiny")
    box = box_of(services, tmp_path)
    give(services, "line-1", digest)
    assert box.look(services).error is None
    backup_of(services, tmp_path / "backup")
    late = next(name for n in range(99) if bin_of(name := f"late-{n}") != bin_of("line-1"))
    box_of(services, tmp_path, late)
    give(services, late, digest)  # a bin that the copy does not know
    generation = max(give(services, "line-1", digest) for _ in range(5))
    seen = box.look(services)
    assert seen.assignment is not None
    assert seen.assignment.desired.generation == generation
    stale = msgspec.json.decode(box.trusted)
    plane, found = again(tmp_path / "backup")
    # What it runs stays: the assignment of the copy is older than the agent's, and the signatures hold.
    outcome = box.look(plane)
    assert outcome.error is None
    assert outcome.assignment is not None
    assert outcome.assignment.desired.generation < generation
    # A new one is newer than all that went before, also for an agent that has not reported here yet.
    assert give(plane, "line-1", digest) > max(generation, found.succession.floor)
    outcome = box.look(plane)
    assert outcome.error is None
    assert outcome.assignment is not None
    assert outcome.assignment.desired.generation > generation
    # Without the jump the same agent refuses: this is what the restore cures.
    with reading(plane.engine) as session:
        newest = plane.signer._versions(session)
    assert len([role for role in newest if role.startswith("assign-bin")]) == 1 << BIN_BITS
    assert newest["snapshot"] > found.succession.floor
    assert stale != msgspec.json.decode(box.trusted)


def test_a_copy_brought_back_by_hand_is_refused_by_agents(services: Services, tmp_path: Path) -> None:
    """The counterpart: the same history, without what `after_restore` does."""
    digest = register_tiny(services, tmp_path / "tiny")
    box = box_of(services, tmp_path)
    give(services, "line-1", digest)
    with reading(services.engine) as session:
        signed, own = services.signer.current_set(session), services.signer.bin(session, "line-1")
        document = services.signer.document(session, "line-1")
    give(services, "line-1", digest)
    assert box.look(services).error is None
    outcome = verify(
        signed,
        own,
        document,
        agent_id="line-1",
        anchor=box.anchor,
        trusted=box.trusted,
        now=utc_now(),
        scratch=tmp_path / "scratch" / "by hand",
    )
    assert outcome.error is not None
    assert outcome.error.code == "trust.rollback"


def test_one_backup_restored_twice_is_newer_the_second_time(services: Services, tmp_path: Path) -> None:
    digest = register_tiny(services, tmp_path / "tiny")
    box = box_of(services, tmp_path)
    give(services, "line-1", digest)
    backup_of(services, tmp_path / "backup")
    generations = []
    for life, days in (("first", 0), ("second", 1)):
        services.engine.dispose()
        if services.config.database:
            empty(services.config.database)
        config = msgspec.structs.replace(services.config, data_dir=str(tmp_path / life))
        restore(config, tmp_path / "backup", actor="t", now=utc_now() + timedelta(days=days) - timedelta(days=1))
        plane = open_services(config)
        generations += [give(plane, "line-1", digest) for _ in range(3)]
        assert box.look(plane).error is None
        plane.engine.dispose()
    assert generations == sorted(set(generations))


def test_rollouts_that_were_under_way_wait_for_a_person(
    services: Services, tmp_path: Path, again: Callable[[Path], tuple[Services, Restored]]
) -> None:
    register_tiny(services, tmp_path / "tiny")
    say(services, Channel.REPORTED, encode(reported()))
    states = (RolloutState.RUNNING, RolloutState.ROLLING_BACK, RolloutState.COMPLETED)
    with writing(services.engine) as session:
        for state in states:
            create_rollout(session, Order(reference="tiny"), actor="t", now=utc_now()).state = state
        session.commit()
    backup_of(services, tmp_path / "backup")
    plane, found = again(tmp_path / "backup")
    with reading(plane.engine) as session:
        rows = session.exec(select(Rollout).order_by(Rollout.id)).all()
    assert [row.state for row in rows] == [RolloutState.PAUSED, RolloutState.ROLLED_BACK, RolloutState.COMPLETED]
    assert "restored from a backup" in rows[0].reason
    assert (found.succession.paused, found.succession.ended) == ((rows[0].id,), (rows[1].id,))


def test_a_backup_under_writes_is_as_the_database_was_at_one_moment(
    services: Services, tmp_path: Path, again: Callable[[Path], tuple[Services, Restored]]
) -> None:
    """Each turn changes two tables and the chain of the audit trail in one transaction."""
    stop, turns = threading.Event(), threading.Event()
    say(services, Channel.REPORTED, encode(reported()))

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with writing(services.engine) as session:
                agent = session.get(Agent, "line-1")
                agent.labels_assigned = {"turn": str(number)}
                session.add(agent)
                audit(session, "t", "turn", str(number), {}, utc_now())
                session.commit()
            turns.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert turns.wait(60)
        backup_of(services, tmp_path / "backup")
    finally:
        stop.set()
        writer.join()
    plane, _ = again(tmp_path / "backup")
    with reading(plane.engine) as session:
        assert broken_audit_entry(session) is None
        entries = session.connection().exec_driver_sql("SELECT count(*) FROM audit WHERE action = 'turn'").scalar()
        assert session.get(Agent, "line-1").labels_assigned == {"turn": str(entries)}


@pytest.fixture
def plane(tmp_path: Path) -> Services:
    """On SQLite alone, with one bundle: what these tests look at does not depend on the database."""
    found = make_services(tmp_path / "plane")
    register_tiny(found, tmp_path / "tiny")
    yield found
    found.engine.dispose()


def refused(plane: Services, source: Path, root: Path, kind: type[SortlineError], code: str) -> str:
    config = msgspec.structs.replace(plane.config, data_dir=str(root))
    with pytest.raises(kind) as caught:
        restore(config, source, actor="t", now=utc_now())
    assert caught.value.code == code
    return str(caught.value)


def test_a_damaged_backup_is_refused_before_anything_is_written(plane: Services, tmp_path: Path) -> None:
    source, target = tmp_path / "backup", tmp_path / "new"
    backup_of(plane, source)
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in (files[0], files[len(files) // 2], files[-1]):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert f"changed {path.relative_to(source)}" in refused(plane, source, target, InputError, "backup.damaged")
        path.unlink()
        assert "missing" in refused(plane, source, target, InputError, "backup.damaged")
        path.write_bytes(data)
    (source / "trust" / "2.root.json").write_bytes(b"{}")
    assert "not listed" in refused(plane, source, target, InputError, "backup.damaged")
    assert not target.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "store/../../outside"])
def test_a_manifest_never_leads_out_of_the_backup(plane: Services, tmp_path: Path, name: str) -> None:
    source = tmp_path / "backup"
    backup_of(plane, source)
    manifest, _ = read_archive(source)
    files = (msgspec.structs.replace(manifest.files[0], path=name), *manifest.files[1:])
    (source / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
    refused(plane, source, tmp_path / "new", InputError, "backup.unreadable")


def test_a_backup_that_was_interrupted_is_none(plane: Services, tmp_path: Path) -> None:
    backup_of(plane, tmp_path / "backup")
    (tmp_path / "backup" / MANIFEST).unlink()  # is written last
    refused(plane, tmp_path / "backup", tmp_path / "new", InputError, "backup.absent")


def test_nothing_that_is_there_is_overwritten(plane: Services, tmp_path: Path) -> None:
    backup_of(plane, tmp_path / "backup")
    with pytest.raises(ConflictError, match="not empty"):
        backup_of(plane, tmp_path / "backup")
    before = {path: path.stat().st_mtime_ns for path in plane.config.root.rglob("*")}
    refused(plane, tmp_path / "backup", plane.config.root, ConflictError, "backup.not_empty")
    assert {path: path.stat().st_mtime_ns for path in plane.config.root.rglob("*")} == before


def test_a_restore_that_was_cut_off_keeps_the_server_from_starting_and_is_repeated(
    plane: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_of(plane, tmp_path / "backup")
    config = msgspec.structs.replace(plane.config, data_dir=str(tmp_path / "new"))

    def cut(*_: object) -> None:
        raise OSError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(restoring, "migrate", cut)
        with pytest.raises(OSError, match="power"):
            restore(config, tmp_path / "backup", actor="t", now=utc_now())
    with pytest.raises(ConfigError) as caught:
        check_finished(config.root)
    assert caught.value.code == "backup.unfinished"
    restore(config, tmp_path / "backup", actor="t", now=utc_now())
    check_finished(config.root)
    found = open_services(config)
    with reading(found.engine) as session:
        assert find_version(session, "tiny")[1].number == 1
    found.engine.dispose()


def test_a_blob_that_the_disk_has_changed_is_left_out_and_named(plane: Services, tmp_path: Path) -> None:
    blob = next(path for path in (plane.config.root / "store").rglob("*") if path.is_file())
    blob.write_bytes(blob.read_bytes() + b"!")
    saved = backup_of(plane, tmp_path / "backup")
    assert saved.damaged == (blob.name,)
    assert blob.name not in (tmp_path / "backup" / MANIFEST).read_text()
    read_archive(tmp_path / "backup")


def test_another_kind_of_database_and_a_newer_program_are_refused_by_name(plane: Services, tmp_path: Path) -> None:
    source = tmp_path / "backup"
    backup_of(plane, source)
    config = msgspec.structs.replace(plane.config, data_dir=str(tmp_path / "new"), database="postgresql://none/none")
    with pytest.raises(ConflictError, match="another kind"):
        restore(config, source, actor="t", now=utc_now())
    manifest, _ = read_archive(source)
    (source / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, revision="9999")))
    refused(plane, source, tmp_path / "new", InputError, "backup.newer")


def test_secrets_that_the_configuration_names_are_not_in_the_backup_and_are_listed(
    plane: Services, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    server = msgspec.structs.replace(plane.config.server, token_file=str(tmp_path / "token"))
    saved = save(msgspec.structs.replace(plane.config, server=server), tmp_path / "backup", None, utc_now())
    assert saved.elsewhere == (str(tmp_path / "token"),)


def test_a_backup_is_readable_by_its_owner_alone(plane: Services, tmp_path: Path) -> None:
    backup_of(plane, tmp_path / "backup")
    modes = {path.stat().st_mode & 0o077 for path in [tmp_path / "backup", *(tmp_path / "backup").rglob("*.pem")]}
    assert modes == {0}
    assert datetime.fromisoformat(read_archive(tmp_path / "backup")[0].made_at).tzinfo is not None
    database = open_database(f"sqlite:///{tmp_path / 'backup' / 'database.sqlite'}")
    with reading(database) as session:
        assert find_version(session, "tiny")[1].number == 1
    database.dispose()
