"""Attacks with bins, the parts that list assignments: those of another line or fleet, old ones, missing ones."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.metadata import SuccinctRoles

from control_plane.trust import ceremony
from models.signed_set import ASSIGN, version_of
from models.topics import BIN_BITS, BIN_PREFIX, bin_of
from tests.simulators.trust_repository import MY_BIN, NOW, OTHER, Device, Repository, Signed, assigned, code, resigned


def two_bins(repository: Repository) -> tuple[Signed, bytes]:
    """Line-1 and a line of another bin are assigned."""
    assert bin_of(OTHER) != MY_BIN
    repository.assign(OTHER, repository.release(b"other"), 1)
    return assigned(repository)


@given(agent_id=st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"))
def test_an_agent_computes_its_bin_as_the_library_does(agent_id: str) -> None:
    library = SuccinctRoles(["k"], 1, BIN_BITS, BIN_PREFIX)
    assert bin_of(agent_id) == library.get_role_for_target(f"assign/{agent_id}.json")
    assert library.is_delegated_role(bin_of(agent_id))


def test_another_lines_bin_under_my_topic_is_refused_and_not_kept(repository: Repository, device: Device) -> None:
    """Same key, same version, same fleet: only the hash in the snapshot differs."""
    offered, document = two_bins(repository)
    theirs = offered.bin(OTHER)
    assert version_of(theirs) == version_of(offered.bin())
    swapped = repository.set(**{MY_BIN: theirs})
    assert code(device.verify(swapped, document)) == "trust.mixed"
    assert code(device.verify(swapped, repository.assignments[OTHER])) == "trust.mixed"
    assert device.verify(offered, document).error is None


@pytest.mark.parametrize("seen", [False, True])
def test_an_old_bin_beside_a_new_set_and_a_new_bin_beside_an_old_one_are_refused(
    repository: Repository, device: Device, seen: bool
) -> None:
    old, old_document = assigned(repository)
    if seen:
        assert device.verify(old, old_document).error is None
    new, document = assigned(repository, 2, b"better")
    early = device.verify(replace(old, bins=new.bins), document)
    assert code(early) == ("trust.wrong_assignment" if seen else "trust.mixed"), "what is trusted still holds"
    assert code(device.verify(replace(new, bins=old.bins), document)) == "trust.mixed"
    assert code(device.verify(replace(new, bins=old.bins), old_document)) == "trust.mixed"
    assert device.verify(new, document).error is None
    assert code(device.verify(old, old_document)) == "trust.rollback"


def test_a_bin_of_another_fleet_is_refused_even_with_its_own_snapshot_key_stolen(
    repository: Repository, device: Device, tmp_path: Path
) -> None:
    _, document = assigned(repository)
    stranger = Repository(tmp_path / "stranger")
    foreign, _ = assigned(stranger)
    assert code(device.verify(repository.set(**{MY_BIN: foreign.bin()}), document)) == "trust.mixed"
    repository.parts[MY_BIN] = foreign.bin()
    assert code(device.verify(repository.bind(), document)) == "trust.unsigned"


def test_a_bin_signed_with_a_replaced_key_is_refused(repository: Repository, device: Device) -> None:
    _, document = assigned(repository)
    stolen = repository.online(ASSIGN)
    ceremony.rotate(repository.folder, "online", repository.keys(1, 2), NOW, release_signers=[repository.release_key])
    repository.parts["targets"] = repository.folder.targets
    assert device.verify(repository.sign_changes(), document).error is None
    repository.parts[MY_BIN] = resigned(repository.parts[MY_BIN], [stolen], version=99)
    assert code(device.verify(repository.bind(), document)) == "trust.unsigned"


@pytest.mark.parametrize("bin_name", [MY_BIN, bin_of(OTHER)])
@pytest.mark.parametrize("how", ["older", "gone"])
def test_no_bins_version_falls_and_none_vanishes(
    repository: Repository, device: Device, bin_name: str, how: str
) -> None:
    """This holds for a bin that the agent has never seen, too: dropping it would hide that anything is assigned."""
    two_bins(repository)
    first = repository.parts[bin_name]
    offered, document = repository.sign_changes(), repository.assignments["line-1"]
    assert device.verify(offered, document).error is None
    if how == "older":
        repository.parts[bin_name] = first
    else:
        del repository.parts[bin_name]
    assert code(device.verify(repository.bind(), document)) == "trust.rollback"


def test_an_agent_whose_bin_was_never_filled_has_no_assignment(repository: Repository, device: Device) -> None:
    document = repository.assign("line-1", repository.release(), 1)
    del repository.assignments["line-1"]
    repository.assign(OTHER, repository.release(b"other"), 1)
    offered = repository.sign_changes()
    assert offered.bin() == b""
    assert code(device.verify(offered, document)) == "trust.not_assigned"
    repository.assignments["line-1"] = document
    assert device.verify(repository.sign_changes(), document).error is None
    del repository.assignments["line-1"]
    offered = repository.sign_changes()
    assert version_of(offered.bin()) == 2, "emptied, and still listed"
    assert code(device.verify(offered, document)) == "trust.not_assigned"


def test_the_trusted_bin_serves_while_the_broker_gives_none(repository: Repository, device: Device) -> None:
    offered, document = two_bins(repository)
    assert device.verify(offered, document).facts["bin_version"] == "1"
    repository.assign(OTHER, repository.release(b"other 2"), 2)
    hourly = replace(repository.bind(), bins={})
    assert device.verify(hourly, document).error is None
    device.trusted = b""
    assert code(device.verify(hourly, document)) == "trust.incomplete"


def test_the_trusted_state_of_another_agent_is_refused(repository: Repository, device: Device) -> None:
    offered, document = two_bins(repository)
    other = Device(repository.anchor, device.scratch / "other", OTHER)
    assert other.verify(offered, repository.assignments[OTHER]).error is None
    device.trusted = other.trusted
    assert code(device.verify(replace(offered, bins={}), document)) == "trust.incomplete"
    assert device.verify(offered, document).error is None
