"""The control plane signs assignments: in one transaction, nothing unreleased, the same versions never twice."""

import importlib
import itertools
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import typer
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from control_plane.database.engine import open_database, reading, writing
from control_plane.database.migrate import migrate
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.trust import TrustMetadata
from control_plane.fleet.forgetting import forget
from control_plane.trust import ceremony
from control_plane.trust import metadata as md
from control_plane.trust.online_signer import OnlineSigner
from models.errors import ConfigError, ConflictError, InputError, SortlineError, TrustError
from models.messages import Desired, decode
from models.signed_set import ASSIGN, parse_set, version_of
from models.topics import TRUST_TOPIC, bin_of, bin_topic
from tests.simulators.trust_repository import NOW, PASSPHRASE, Device, Repository, Signed


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path / 'plane.sqlite'}"
    migrate(url)
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "keys")


@pytest.fixture
def assignments(engine: Engine, repository: Repository) -> OnlineSigner:
    found = OnlineSigner(repository.folder)
    with writing(engine) as session:
        found.take_folder(session, NOW)
        session.commit()
    return found


def release(engine: Engine, repository: Repository, assignments: OnlineSigner, content: bytes = b"model") -> str:
    digest = repository.release(content)
    with writing(engine) as session:
        assignments.take_targets(session, repository.parts["targets"], repository.now)
        assignments.sign_changes(session, repository.now)
        session.commit()
    return digest


def assign(engine: Engine, assignments: OnlineSigner, wanted: dict[str, Desired], now=NOW) -> None:
    with writing(engine) as session:
        for agent_id, desired in wanted.items():
            assignments.assign(session, agent_id, desired, now)
        assignments.sign_changes(session, now)
        session.commit()


def published(engine: Engine, assignments: OnlineSigner, agent_id: str) -> tuple[Signed, bytes]:
    with reading(engine) as session:
        bins = {bin_of(agent_id): assignments.bin(session, agent_id)}
        return Signed(assignments.current_set(session), bins), assignments.document(session, agent_id)


def versions(data: Signed) -> dict[str, int]:
    found = parse_set(data.set)
    common = {role: version_of(found.part(role)) for role in ("timestamp", "snapshot", "targets", ASSIGN)}
    return common | {name: version_of(data) for name, data in data.bins.items()}


def test_an_assignment_is_accepted_by_its_agent(
    engine: Engine, repository: Repository, assignments: OnlineSigner, tmp_path: Path
) -> None:
    digest = release(engine, repository, assignments)
    agents = {f"line-{n}": Desired(generation=n, bundle=digest) for n in (1, 2, 3)}
    assign(engine, assignments, agents)
    for agent_id, desired in agents.items():
        offered, document = published(engine, assignments, agent_id)
        outcome = Device(repository.anchor, tmp_path / agent_id, agent_id).verify(offered, document)
        assert outcome.error is None
        assert outcome.assignment.desired == desired


def test_many_assignments_are_one_version_and_none_is_no_version(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    digest = release(engine, repository, assignments)
    before = versions(published(engine, assignments, "line-1")[0])
    assign(engine, assignments, {f"line-{n}": Desired(generation=1, bundle=digest) for n in range(40)})
    after = versions(published(engine, assignments, "line-1")[0])
    more = {name: before[name] + 1 for name in ("timestamp", "snapshot", bin_of("line-1"))}
    assert after == before | more, "the role that delegates to the bins has nothing new to say"
    assign(engine, assignments, {})
    assert versions(published(engine, assignments, "line-1")[0]) == after


def test_one_changed_agent_is_one_bin_and_the_set_and_nothing_else_is_published(
    engine: Engine, repository: Repository, assignments: OnlineSigner, tmp_path: Path
) -> None:
    known: dict[str, int] = {}

    def news() -> list[str]:
        with reading(engine) as session:
            found = assignments.news(session, known)
        known.update({topic: version for topic, version, _ in found})
        return [topic for topic, _, _ in found]

    digest = release(engine, repository, assignments)
    agents = {f"line-{n}": Desired(generation=1, bundle=digest) for n in range(300)}
    assign(engine, assignments, agents)
    everything = news()
    assert everything[-1] == TRUST_TOPIC
    assert set(everything) == {TRUST_TOPIC} | {bin_topic(bin_of(agent)) for agent in agents}
    assert news() == []
    assign(engine, assignments, {"line-7": Desired(generation=2, bundle=digest)})
    assert news() == [bin_topic(bin_of("line-7")), TRUST_TOPIC]
    for agent_id in ("line-7", "line-8"):
        device = Device(repository.anchor, tmp_path / agent_id, agent_id)
        assert device.verify(*published(engine, assignments, agent_id)).error is None
    # An hour later only what proves freshness is signed and sent again; the bins follow after a third of their life.
    assign(engine, assignments, {}, NOW + timedelta(hours=2))
    assert news() == [TRUST_TOPIC]
    assign(engine, assignments, {}, NOW + timedelta(days=11))
    assert sorted(news()) == sorted(everything)


def test_a_bin_that_was_emptied_stays_listed_and_agents_go_on(
    engine: Engine, repository: Repository, assignments: OnlineSigner, tmp_path: Path
) -> None:
    digest = release(engine, repository, assignments)
    with writing(engine) as session:
        session.add(Agent(id="line-1", generation=1, desired_bundle=digest))
        session.add(Agent(id="line-9", generation=1, desired_bundle=digest))
        assignments.sign_changes(session, NOW)
        session.commit()
    devices = {name: Device(repository.anchor, tmp_path / name, name) for name in ("line-1", "line-9")}
    assert all(device.verify(*published(engine, assignments, name)).error is None for name, device in devices.items())
    document = published(engine, assignments, "line-1")[1]
    with writing(engine) as session:
        forget(session, "line-1", actor="maria", reason="scrapped", now=NOW)
        assignments.sign_changes(session, NOW)
        session.commit()
    offered, nothing = published(engine, assignments, "line-1")
    assert nothing == b""
    assert devices["line-1"].verify(offered, document).error.code == "trust.not_assigned"
    assert devices["line-9"].verify(*published(engine, assignments, "line-9")).error is None


def test_an_assignment_that_is_not_committed_was_never_signed(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    digest = release(engine, repository, assignments)
    before = published(engine, assignments, "line-1")
    with writing(engine) as session:
        assignments.assign(session, "line-1", Desired(generation=1, bundle=digest), NOW)
        assignments.sign_changes(session, NOW)
        session.rollback()
    assert published(engine, assignments, "line-1") == before


def test_two_replicas_cannot_sign_two_things_under_one_version(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    offered = published(engine, assignments, "line-1")[0]
    row = {"role": "timestamp", "version": versions(offered)["timestamp"], "data": b"other", "created_at": NOW}
    with writing(engine) as session, pytest.raises(IntegrityError):
        session.connection().execute(TrustMetadata.__table__.insert().values(**row))


def test_an_unreleased_bundle_is_not_assigned(engine: Engine, assignments: OnlineSigner) -> None:
    with pytest.raises(ConflictError, match="release it first") as caught:
        assign(engine, assignments, {"line-1": Desired(generation=1, bundle="a" * 64)})
    assert caught.value.code == "trust.not_released"


def test_without_keys_nothing_is_assigned_and_nothing_published(engine: Engine, tmp_path: Path) -> None:
    empty = OnlineSigner(ceremony.TrustFolder(tmp_path / "nothing"))
    with writing(engine) as session:
        empty.take_folder(session, NOW)
        assert not empty.sign_changes(session, NOW)
        assert empty.current_set(session) == b""
        assert empty.news(session, {}) == []
        assert empty.status(session, NOW) == []
    with pytest.raises(ConflictError, match="keys init"):
        assign(engine, empty, {"line-1": Desired(generation=1, bundle="a" * 64)})


def test_timestamp_and_snapshot_are_signed_again_every_hour_and_assign_after_a_third_of_its_life(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    first = versions(published(engine, assignments, "")[0])
    assign(engine, assignments, {}, NOW + timedelta(minutes=59))
    assert versions(published(engine, assignments, "")[0]) == first
    assign(engine, assignments, {}, NOW + timedelta(minutes=61))
    hourly = versions(published(engine, assignments, "")[0])
    assert hourly == first | {"timestamp": first["timestamp"] + 1, "snapshot": first["snapshot"] + 1}
    assign(engine, assignments, {}, NOW + timedelta(days=11))
    assert versions(published(engine, assignments, "")[0])[ASSIGN] == first[ASSIGN] + 1


def test_online_versions_are_pruned_and_offline_ones_kept(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    for hour in range(2, 30, 2):
        assign(engine, assignments, {}, NOW + timedelta(hours=hour))
    with reading(engine) as session:
        rows = session.exec(select(TrustMetadata.role, TrustMetadata.version).order_by(col(TrustMetadata.role))).all()
    assert sum(role == "timestamp" for role, _ in rows) == 5
    assert ("root", 1) in rows


def test_offline_metadata_is_verified_before_it_is_kept(
    engine: Engine, repository: Repository, assignments: OnlineSigner, tmp_path: Path
) -> None:
    stranger = Repository(tmp_path / "stranger")
    stranger.release()
    for data in (stranger.parts["targets"], b"{}", b"", repository.anchor):
        with writing(engine) as session, pytest.raises(InputError) as caught:
            assignments.take_targets(session, data, NOW)
        assert caught.value.code in {"trust.not_enough_signatures", "trust.no_metadata"}
    with writing(engine) as session, pytest.raises(InputError, match="does not follow"):
        assignments.take_root(session, stranger.anchor, NOW)
    with writing(engine) as session, pytest.raises(InputError, match="does not follow"):
        assignments.take_targets(session, repository.parts["targets"], NOW)


def test_rotated_online_keys_come_into_force_with_their_root(
    engine: Engine, repository: Repository, assignments: OnlineSigner, tmp_path: Path
) -> None:
    digest = release(engine, repository, assignments)
    assign(engine, assignments, {"line-1": Desired(generation=1, bundle=digest)})
    device = Device(repository.anchor, tmp_path / "device")
    assert device.verify(*published(engine, assignments, "line-1")).error is None
    release_keys = [repository.release_key]
    ceremony.rotate(repository.folder, "online", repository.keys(1, 3), NOW, release_signers=release_keys)
    with writing(engine) as session:
        assignments.take_folder(session, NOW)
        session.commit()
    outcome = device.verify(*published(engine, assignments, "line-1"))
    assert outcome.error is None
    assert outcome.facts["root_version"] == "2"
    (repository.folder.path / "online").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="No private key"):
        assign(engine, assignments, {}, NOW + timedelta(hours=3))


@pytest.mark.slow
def test_a_bin_that_grows_too_large_is_reported_first_and_then_refused(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    digest = release(engine, repository, assignments)
    names = (name for n in itertools.count() if bin_of(name := f"line-{n:050}") == bin_of("line-1"))
    crowd = {name: Desired(generation=1, bundle=digest) for name in itertools.islice(names, 900)}

    def summary(agents: int) -> str:
        assign(engine, assignments, dict(itertools.islice(crowd.items(), agents)))
        with reading(engine) as session:
            assignments.look(session, NOW)
        return assignments.kind

    assert summary(500) == "ok"
    assert summary(600) == f"signatures: bin {assignments.fill['bin']:.0%} full (sortline keys status)"
    assert 0.8 <= assignments.fill["bin"] < 1.0
    last = next(reversed(crowd))
    with pytest.raises(TrustError) as caught:
        summary(900)
    assert caught.value.code == "trust.oversize"
    assert published(engine, assignments, last)[1] == b""


def test_a_changed_row_is_signed_once_and_a_cleared_one_is_a_recall(
    engine: Engine, repository: Repository, assignments: OnlineSigner
) -> None:
    digest = release(engine, repository, assignments)
    with writing(engine) as session:
        agent = Agent(id="line-1", generation=3, desired_bundle=digest)
        session.add(agent)
        session.flush()
        assert not assignments.is_sealed(session, agent)
        assert assignments.sign_changes(session, NOW)
        assert assignments.is_sealed(session, agent)
        assert not assignments.sign_changes(session, NOW)
        agent.generation, agent.desired_bundle = 4, ""
        session.add(agent)
        session.flush()
        assert not assignments.is_sealed(session, agent)
        assert assignments.sign_changes(session, NOW)
        recall = decode(assignments.document(session, "line-1"), Desired)
        assert (recall.generation, recall.bundle) == (4, ""), "nothing is desired any more, and that is signed"
        agent.generation, agent.desired_bundle = 5, "f" * 64
        session.add(agent)
        assert not assignments.sign_changes(session, NOW), "the bundle is not released"
        assert not assignments.is_sealed(session, agent)


def test_renewals_that_need_offline_keys_are_reported_in_time(engine: Engine, assignments: OnlineSigner) -> None:
    def summary(now: datetime) -> str:
        assign(engine, assignments, {}, now)
        with reading(engine) as session:
            assignments.look(session, now)
        return assignments.kind

    assert summary(NOW) == "ok"
    assert summary(NOW + timedelta(days=240)) == "ok"
    assert summary(NOW + timedelta(days=250)) == "signatures: targets renew (sortline keys status)"
    assert "targets expired" in summary(NOW + timedelta(days=366))


def test_development_keys_say_so(tmp_path: Path, engine: Engine) -> None:
    folder = ceremony.TrustFolder(tmp_path / "dev")
    keys = tmp_path / "dev" / "development"
    ceremony.initialise(folder, [keys / "root-1.pem"], keys / "release.pem", None, NOW)
    with pytest.raises(ConflictError, match="rotate"):
        ceremony.initialise(folder, [keys / "root-9.pem"], keys / "release-9.pem", None, NOW)
    assignments = OnlineSigner(folder)
    with writing(engine) as session:
        assignments.take_folder(session, NOW)
        assert assignments.development(session)
        assert {row.role for row in assignments.status(session, NOW)} >= {"root", ASSIGN}


def test_a_folder_follows_the_control_plane_and_no_stranger(repository: Repository, tmp_path: Path) -> None:
    copy = ceremony.TrustFolder(tmp_path / "copy")
    copy.write("1.root.json", repository.anchor)
    repository.release()
    ceremony.rotate(repository.folder, "online", repository.keys(1, 2), NOW, release_signers=[repository.release_key])
    roots, targets = repository.folder.roots(), repository.folder.targets
    assert ceremony.follow(copy, roots, targets) == ["root 2", "targets 3"]
    assert (copy.root, copy.targets) == (roots[-1], targets)
    assert ceremony.follow(copy, roots, targets) == []
    stranger = Repository(tmp_path / "stranger")
    for content in (b"1", b"2", b"3"):
        stranger.release(content)
    with pytest.raises(InputError, match="not signed by enough"):
        ceremony.follow(copy, stranger.folder.roots(), stranger.folder.targets)


def test_a_stale_folder_can_neither_bring_a_withdrawn_bundle_back_nor_lose_a_release(
    repository: Repository, tmp_path: Path
) -> None:
    """Renewed twice while the control plane went on, a folder has a higher number and old content."""
    folder, key = repository.folder, repository.release_key
    kept, bad = repository.release(b"kept"), repository.release(b"bad")
    shutil.copytree(folder.path, tmp_path / "stale")
    stale = ceremony.TrustFolder(tmp_path / "stale")
    plane = ceremony.withdraw(folder.targets, folder.root, bad, key, NOW)
    assert (md.released_in(plane), md.withdrawn_in(plane)) == ([kept], [bad])
    for _ in range(2):
        stale.write("targets.json", ceremony.renew_targets(stale.targets, stale.root, [key], NOW))
    assert md.read_targets(stale.targets).signed.version > md.read_targets(plane).signed.version
    with pytest.raises(InputError) as caught:
        md.check_next_targets(stale.targets, plane, folder.root)
    assert caught.value.code == "trust.not_built_on"
    with pytest.raises(ConflictError) as diverged:
        ceremony.follow(stale, stale.roots(), plane)
    assert (diverged.value.code, bad[:12] in str(diverged.value)) == ("trust.diverged", True)
    version = md.read_targets(plane).signed.version
    assert ceremony.follow(stale, stale.roots(), plane, discard=True) == [f"targets {version}"]
    renewed = ceremony.renew_targets(stale.targets, stale.root, [key], NOW)
    assert md.check_next_targets(renewed, plane, folder.root).signed.version == version + 1
    assert (md.released_in(renewed), md.withdrawn_in(renewed)) == ([kept], [bad]), "it stays withdrawn"
    assert ceremony.released_changes(plane, renewed) == ([], [])


def test_a_folder_that_is_ahead_of_the_control_plane_stays(repository: Repository) -> None:
    folder = repository.folder
    before = folder.targets
    repository.release(b"1")
    repository.release(b"2")
    ahead = folder.targets
    assert ceremony.follow(folder, folder.roots(), before) == []
    assert folder.targets == ahead
    assert md.check_next_targets(ahead, before, folder.root) is not None, "two signatures at once are one push"


def test_a_bundle_that_is_released_again_by_name_is_no_longer_withdrawn(repository: Repository) -> None:
    folder, key = repository.folder, repository.release_key
    digest = repository.release(b"model")
    gone = ceremony.withdraw(folder.targets, folder.root, digest, key, NOW)
    repository.parts["targets"] = gone
    assert repository.release(b"model") == digest
    assert (md.released_in(folder.targets), md.withdrawn_in(folder.targets)) == ([digest], [])


def test_ceremonies_refuse_what_makes_no_sense(repository: Repository) -> None:
    folder, keys = repository.folder, repository.keys(1, 2)

    def refused(code: str, role: str, **options: object) -> None:
        with pytest.raises(SortlineError) as caught:
            ceremony.rotate(folder, role, keys, NOW, **options)
        assert caught.value.code == code

    refused("keys.unknown_role", "leaf")
    refused("keys.unknown_role", "release")
    refused("keys.unknown_key", "root", retire="ffff", new=repository.release_key)
    refused("trust.not_enough_signatures", "online", release_signers=keys)
    with pytest.raises(ConflictError, match="No root waits"):
        ceremony.add_signature(folder, keys)
    with pytest.raises(InputError, match="not released"):
        ceremony.withdraw(repository.parts["targets"], folder.root, "a" * 64, repository.release_key, NOW)
    with pytest.raises(InputError, match="Name the root keys"):
        ceremony.initialise(ceremony.TrustFolder(repository.root / "x"), [], Path("y"), lambda _: PASSPHRASE, NOW)


def test_keys_status_fails_when_a_bin_is_nearly_full(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    keys = importlib.import_module("control_plane.cli.keys")  # the folder's `keys` is the group of commands
    found = {"development": False, "roles": [], "fill": {"set": 0.79, "bin": 0.8}}
    keys = importlib.import_module("control_plane.cli.keys")
    monkeypatch.setattr(keys, "_remote_status", lambda _server: found)
    with pytest.raises(typer.Exit) as caught:
        keys.status()
    assert caught.value.exit_code == 1
    printed = capsys.readouterr().err
    assert "bin 80% full" in printed
    assert "set" not in printed
    found["fill"]["bin"] = 0.5
    keys.status()
