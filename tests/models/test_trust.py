"""Attacks on the signed set, with real keys (replay, mixing, freezing, theft, wrong clocks), and the ceremonies."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from tuf.api.metadata import Metadata

from control_plane.trust import ceremony
from control_plane.trust import metadata as md
from models import bundle, topics
from models.bundle import Manifest, sha256
from models.signed_set import ASSIGN, ROLES, make_set, version_of
from models.topics import bin_of
from tests.simulators.trust_repository import (
    MY_BIN,
    NOW,
    PASSPHRASE,
    Device,
    Repository,
    Signed,
    assigned,
    code,
    manifest,
    parse_desired,
    resigned,
)


def test_a_released_bundle_that_is_assigned_to_this_agent_is_accepted(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository, generation=7)
    outcome = device.verify(offered, document)
    assert outcome.error is None
    assert outcome.assignment.desired.generation == 7
    assert outcome.assignment.bundle_custom["name"] == "apples"
    assert outcome.facts["root_version"] == "1"
    assert "development" not in outcome.facts


def test_a_recall_needs_no_released_bundle_but_the_signature(repository: Repository, device: Device) -> None:
    document = repository.assign("line-1", "", 3, safe_state="eject-all")
    outcome = device.verify(repository.sign_changes(), document)
    assert outcome.error is None
    assert (outcome.assignment.desired.bundle, outcome.assignment.desired.safe_state) == ("", "eject-all")
    forged = document.replace(b"eject-all", b"pass-all")
    assert code(device.verify(repository.set(), forged)) == "trust.wrong_assignment"


def test_the_same_set_again_is_accepted(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    trusted = device.verify(offered, document).trusted
    again = device.verify(offered, document)
    assert again.assignment is not None
    assert again.trusted == trusted


def test_a_replay_of_the_whole_old_set_is_refused(repository: Repository, device: Device) -> None:
    old, old_document = assigned(repository)
    device.verify(old, old_document)
    new, document = assigned(repository, 2, b"better")
    assert device.verify(new, document).error is None
    assert code(device.verify(old, old_document)) == "trust.rollback"
    assert device.verify(new, document).error is None


def test_an_old_snapshot_under_a_new_timestamp_is_refused(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    old_snapshot = repository.parts["snapshot"]
    device.verify(offered, document)
    repository.sign_changes()
    device.verify(repository.set(), None)
    stolen = md.new_timestamp(9, old_snapshot, NOW)
    replay = repository.set(timestamp=md.sign(stolen, [repository.online("timestamp")]), snapshot=old_snapshot)
    assert code(device.verify(replay, document)) == "trust.rollback"


@pytest.mark.parametrize("role", ["snapshot", "targets", ASSIGN, MY_BIN])
def test_parts_of_two_sets_do_not_mix(repository: Repository, device: Device, role: str) -> None:
    assigned(repository)
    old = repository.parts[role]
    _, document = assigned(repository, 2, b"better")
    assert code(device.verify(repository.set(**{role: old}), document)) == "trust.mixed"


def test_a_set_that_is_held_back_is_noticed_as_frozen(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    assert device.verify(offered, document).error is None
    assert code(device.verify(offered, document, NOW + timedelta(days=7, minutes=1))) == "trust.frozen"
    repository.later(days=8)
    assert device.verify(repository.sign_changes(), document, repository.now).error is None


def test_a_stolen_control_plane_cannot_release_its_own_model(repository: Repository, device: Device) -> None:
    assigned(repository)
    thief = repository.online(ASSIGN)
    own = manifest(content=b"malware")
    document = repository.assign("line-1", _digest(own), 2)
    # Assigned, but not released:
    assert code(device.verify(repository.sign_changes(), document)) == "trust.not_released"
    # Targets of its own, signed with the keys it has:
    targets = md.read_targets(repository.parts["targets"]).signed
    entry = md.bundle_target(_digest(own), own.encoded(), {})
    forged = md.new_targets(targets.version + 1, {entry.path: entry}, md.assign_keys_of(targets), NOW)
    repository.parts["targets"] = md.sign(forged, [thief, repository.online("snapshot")])
    assert code(device.verify(repository.sign_changes(), document)) == "trust.unsigned"
    # The same under the delegated role, where the online key does count:
    assign = md.read_targets(repository.parts[ASSIGN])
    assign.signed.targets[entry.path] = entry
    repository.parts |= {"targets": repository.folder.targets, ASSIGN: md.sign(assign, [thief])}
    # (A device that saw the forgery waits for higher versions, or new online keys; this one did not.)
    fresh = Device(repository.anchor, device.scratch / "fresh")
    assert code(fresh.verify(repository.bind(), document)) == "trust.not_released"


@pytest.mark.parametrize("delegated", [["assign/*"], ["assign/*", "bundles/*"]])
def test_a_bin_cannot_release_a_bundle_whatever_is_delegated_to_it(
    repository: Repository, device: Device, delegated: list[str]
) -> None:
    """The thief picks a bundle that hashes into the bin: `assign` itself leaves the bins free to list anything."""
    assigned(repository)
    mine = int(bin_of("line-1")[-2:], 16)
    names = (manifest(content=str(n).encode()) for n in range(100_000))
    own = next(m for m in names if hashlib.sha256(f"bundles/{_digest(m)}".encode()).digest()[0] >> 2 == mine)
    document = repository.assign("line-1", _digest(own), 2)
    targets = md.read_targets(repository.parts["targets"])
    targets.signed.delegations.roles[ASSIGN].paths = delegated
    targets.signed.version += 1
    repository.parts["targets"] = md.sign(targets, [repository.release_key])
    repository.sign_changes()
    entry = md.bundle_target(_digest(own), own.encoded(), {})
    forged = md.read_targets(repository.parts[MY_BIN])
    forged.signed.targets[entry.path] = entry
    repository.parts[MY_BIN] = md.sign(forged, [repository.online(ASSIGN)])
    assert code(device.verify(repository.bind(), document)) == "trust.not_released"
    repository.release_manifest(own)
    assert device.verify(repository.bind(), document).error is None, "the release key may"


def _digest(found: Manifest) -> str:
    return sha256(found.encoded())


def test_another_agents_assignment_does_not_do(repository: Repository, device: Device) -> None:
    mine = repository.release(b"mine")
    other = repository.release(b"other")
    repository.assign("line-2", other, 5)
    repository.assign("line-1", mine, 5)
    offered = repository.sign_changes()
    assert code(device.verify(offered, repository.assignments["line-2"])) == "trust.wrong_assignment"
    del repository.assignments["line-1"]
    assert code(device.verify(repository.sign_changes(), repository.assignments["line-2"])) == "trust.not_assigned"


def test_a_changed_byte_in_the_assignment_is_refused(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    changed = document.replace(b'"trial_items":50', b'"trial_items":0 ')
    assert changed != document
    assert code(device.verify(offered, changed)) == "trust.wrong_assignment"


def test_a_withdrawn_bundle_does_not_start_again(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    assert device.verify(offered, document).error is None
    digest = parse_desired(document)
    key, root = repository.release_key, repository.folder.root
    repository.parts["targets"] = ceremony.withdraw(repository.parts["targets"], root, digest, key, NOW)
    assert code(device.verify(repository.sign_changes(), document)) == "trust.not_released"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", ASSIGN, MY_BIN])
def test_unsigned_metadata_is_refused(repository: Repository, device: Device, role: str) -> None:
    _, document = assigned(repository)
    repository.parts[role] = resigned(repository.parts[role], [])
    offered = {"timestamp": repository.set, "snapshot": repository.stamp}.get(role, repository.bind)()
    assert code(device.verify(offered, document)) == "trust.unsigned"


def test_a_root_rotated_by_one_of_two_needed_keys_is_refused(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    repository.later(days=1)
    thief = repository.online("timestamp")
    roles = md.roles_of(md.read_root(repository.anchor).signed) | {"targets": md.RoleKeys((thief.public_key,))}
    forged = md.new_root(2, roles, repository.now, development=False)
    roots = [repository.anchor, md.sign(forged, repository.keys(1))]
    forged_set = Signed(make_set(roots, {role: repository.parts[role] for role in ROLES}), repository.set().bins)
    assert code(device.verify(forged_set, document, repository.now)) == "trust.unsigned"
    assert device.verify(repository.stamp(), document, repository.now).error is None


def test_two_of_three_rotate_a_root_key_and_every_device_follows(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    assert device.verify(offered, document).error is None
    repository.later(days=30)
    new = ceremony.new_key(repository.root / "usb-4" / "root-4.pem", PASSPHRASE)
    lost = repository.keys(3)[0].public_key.keyid
    first = ceremony.rotate(repository.folder, "root", repository.keys(1), repository.now, retire=lost[:8], new=new)
    assert first.missing == 1
    assert version_of(repository.folder.root) == 1
    done = ceremony.add_signature(repository.folder, repository.keys(2))
    assert done.missing == 0
    outcome = device.verify(repository.sign_changes(), document, repository.now)
    assert outcome.error is None
    assert outcome.facts["root_version"] == "2"
    # A device that was off meanwhile and has only the first root follows, too.
    late = Device(repository.anchor, device.scratch / "late")
    assert late.verify(repository.set(), document, repository.now).error is None
    # The old key is worth nothing now: with it and one other a third root is one signature short.
    short = ceremony.rotate(repository.folder, "root", repository.keys(3, 1), repository.now)
    assert short.missing == 1


def test_after_a_theft_new_online_keys_lock_the_thief_out(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    old = {role: repository.online(role) for role in ("timestamp", "snapshot", ASSIGN)}
    # The thief pushes versions to the limit and signs a time far ahead.
    far = resigned(repository.parts["timestamp"], [old["timestamp"]], version=2**31, expires=NOW + timedelta(days=9999))
    assert device.verify(repository.set(timestamp=far), document).error is None
    ceremony.rotate(repository.folder, "online", repository.keys(1, 2), NOW, release_signers=[repository.release_key])
    repository.parts["targets"] = repository.folder.targets
    for role, stolen in old.items():
        assert repository.online(role).public_key.keyid != stolen.public_key.keyid
    outcome = device.verify(repository.sign_changes(), document)
    assert outcome.error is None, outcome.error
    assert int(outcome.facts["timestamp_version"]) < 2**31
    thiefs = repository.set(timestamp=resigned(repository.parts["timestamp"], [old["timestamp"]], version=99))
    assert code(device.verify(thiefs, document)) == "trust.unsigned"


def test_a_time_that_a_thief_signed_far_ahead_does_not_outlive_the_key(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    thief = repository.online("timestamp")
    extra = {"issued_at": "9999-01-01T00:00:00+00:00"}
    far = {"version": 50, "expires": datetime(9999, 6, 1, tzinfo=UTC), "unrecognized_fields": extra}
    poisoned = repository.set(timestamp=resigned(repository.parts["timestamp"], [thief], **far))
    assert code(device.verify(poisoned, document)) in {"trust.expired", "trust.frozen"}
    ceremony.rotate(repository.folder, "online", repository.keys(1, 2), NOW, release_signers=[repository.release_key])
    repository.parts["targets"] = repository.folder.targets
    assert device.verify(repository.sign_changes(), document).error is None


# -- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [datetime(1970, 1, 1, tzinfo=UTC), NOW - timedelta(days=3650)])
def test_a_clock_in_the_past_still_updates_and_still_notices_a_freeze(
    repository: Repository, device: Device, clock: datetime
) -> None:
    offered, document = assigned(repository)
    assert device.verify(offered, document, clock).error is None
    stale = repository.set()
    repository.later(days=10)
    fresh, newer = assigned(repository, 2, b"better")
    outcome = device.verify(fresh, newer, clock)
    assert outcome.error is None
    # The set just verified proves that it is at least ten days later than the stale one would like.
    assert datetime.fromisoformat(device.verify(fresh, newer, clock).facts["reference_time"]) == repository.now
    assert int(device.verify(fresh, newer, clock).facts["clock_behind_s"]) > 86400
    assert code(device.verify(stale, document, clock)) in {"trust.rollback", "trust.frozen"}


def test_a_set_that_proves_itself_stale_is_refused_by_a_machine_without_clock(
    repository: Repository, device: Device
) -> None:
    _, document = assigned(repository)
    repository.later(days=400)
    # Timestamp and snapshot are fresh, the release key has not renewed its targets for 400 days.
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert code(device.verify(repository.sign_changes(), document, epoch)) == "trust.expired"


def test_a_clock_in_the_future_refuses_the_change_and_recovers_when_it_is_set(
    repository: Repository, device: Device
) -> None:
    offered, document = assigned(repository)
    assert device.verify(offered, document).error is None
    newer, second = assigned(repository, 2, b"better")
    outcome = device.verify(newer, second, NOW + timedelta(days=3650))
    assert code(outcome) == "trust.expired"
    assert "clock is ahead" in str(outcome.error)
    assert device.verify(newer, second).error is None


def test_the_reference_time_is_what_the_library_uses(repository: Repository, device: Device) -> None:
    """python-tuf has no public way to give it: this fails when a new version moves the place."""
    offered, document = assigned(repository)
    far = repository.now + timedelta(days=6, hours=23)
    assert device.verify(offered, document, far).error is None
    assert code(device.verify(offered, document, far + timedelta(hours=2))) == "trust.frozen"


# -- ceremonies -------------------------------------------------------------------------------------------------------


def test_new_release_keys_sign_the_targets_again(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    new = ceremony.new_key(repository.root / "usb-r2" / "release.pem", PASSPHRASE)
    ceremony.rotate(repository.folder, "release", repository.keys(2, 3), NOW, new=new)
    repository.parts["targets"] = repository.folder.targets
    assert device.verify(repository.sign_changes(), document).error is None
    with pytest.raises(Exception, match="not signed by enough"):
        repository.release(b"with the old key")


def test_status_says_who_signs_and_when_it_must_be_renewed(repository: Repository) -> None:
    assigned(repository)

    def alarms(now: datetime) -> dict[str, str]:
        return {row.role: row.alarm for row in ceremony.status(repository.folder.root, repository.parts, now)}

    assert set(alarms(NOW).values()) == {""}
    assert alarms(NOW + timedelta(days=5)) | {"x": ""} == {
        "root": "",
        "targets": "",
        ASSIGN: "",
        "bins": "",
        "snapshot": "renew",
        "timestamp": "renew",
        "x": "",
    }
    assert alarms(NOW + timedelta(days=366))["targets"] == "expired"
    rows = {row.role: row for row in ceremony.status(repository.folder.root, repository.parts, NOW)}
    assert (len(rows["root"].keys), rows["root"].threshold) == (3, 2)


def test_keys_are_encrypted_private_and_never_overwritten(repository: Repository) -> None:
    path = repository.root_paths[0]
    assert b"ENCRYPTED" in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    for wrong, named in (("another passphrase", "does not open"), ("", "does not open")):
        with pytest.raises(Exception, match=named):
            ceremony.load_key(path, wrong)
    with pytest.raises(Exception, match="never overwritten"):
        ceremony.new_key(path, PASSPHRASE)
    with pytest.raises(Exception, match="too short"):
        ceremony.new_key(path.with_name("weak.pem"), "short")
    online = list((repository.folder.path / "online").iterdir())
    assert len(online) == 3
    assert all(p.stat().st_mode & 0o077 == 0 for p in online)
    private = [p for p in repository.folder.path.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes()]
    assert sorted(private) == sorted(online), "no offline key is in the folder that goes to the control plane"


def test_both_modules_mean_the_same_manifest() -> None:
    assert bundle.MAX_MANIFEST_BYTES == topics.MAX_BLOB_BYTES


def test_metadata_of_one_role_is_not_taken_for_another(repository: Repository, device: Device) -> None:
    _, document = assigned(repository)
    parts = repository.parts
    assert code(device.verify(repository.set(snapshot=parts["targets"]), document)).startswith("trust.")
    assert code(device.verify(repository.set(timestamp=parts["snapshot"]), document)).startswith("trust.")
    assert Metadata.from_bytes(parts["targets"]).signed.type == "targets"
