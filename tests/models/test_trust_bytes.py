"""Anchors, power cuts and hostile bytes: nothing that is damaged or unsigned is trusted."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import TrustError
from models.signed_set import ASSIGN, MAX_SET_BYTES, MAX_TRUSTED_BYTES, ROLES, make_set, parse_set, version_of
from models.trust import verify
from tests.simulators.trust_repository import MY_BIN, NOW, Device, Repository, Signed, assigned, code, parse_desired


@pytest.mark.parametrize("anchor", [b"", b"{}", b"[", b'{"signed":{"_type":"root"}}'])
def test_without_a_good_anchor_nothing_is_trusted(repository: Repository, tmp_path: Path, anchor: bytes) -> None:
    offered, document = assigned(repository)
    assert code(Device(anchor, tmp_path / "d").verify(offered, document)) == "trust.bad_anchor"


def test_another_installations_set_is_refused(repository: Repository, tmp_path: Path) -> None:
    offered, document = assigned(Repository(tmp_path / "other"))
    found = code(Device(repository.anchor, tmp_path / "d").verify(offered, document))
    assert found == "trust.unsigned"


def test_verified_parts_are_kept_although_the_rest_was_refused(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    old = repository.parts[ASSIGN]
    assigned(repository, 2, b"better")
    assert code(device.verify(repository.set(**{ASSIGN: old}), document)) == "trust.mixed"
    kept = parse_set(device.trusted, MAX_TRUSTED_BYTES)
    assert version_of(kept.part("timestamp")) == 2
    assert code(device.verify(offered, document)) == "trust.rollback"


def test_a_device_that_lost_its_trusted_state_starts_from_the_anchor(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    device.verify(offered, document)
    device.trusted = b""
    assert device.verify(offered, document).error is None


def test_an_oversize_set_is_refused_before_it_is_parsed(repository: Repository, device: Device) -> None:
    offered, document = assigned(repository)
    large = b" " * MAX_SET_BYTES
    assert code(device.verify(replace(offered, set=offered.set + large), document)) == "trust.oversize"
    assert code(device.verify(repository.set(**{MY_BIN: offered.bin() + large}), document)) == "trust.oversize"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", ASSIGN, MY_BIN])
def test_a_set_that_lacks_a_part_is_incomplete(repository: Repository, device: Device, role: str) -> None:
    _, document = assigned(repository)
    assert code(device.verify(repository.set(**{role: b""}), document)) == "trust.incomplete"


def test_an_unknown_version_is_refused_by_name(device: Device) -> None:
    assert code(device.verify(Signed(b'{"schema_version":2}'), b"")) == "trust.wrong_version"


def test_too_many_roots_are_refused() -> None:
    with pytest.raises(TrustError, match="Too many roots"):
        parse_set(msgspec.json.encode({"roots": [{}] * 65}))


def test_sets_come_back_byte_for_byte(repository: Repository) -> None:
    offered, _ = assigned(repository)
    found = parse_set(offered.set)
    assert [bytes(root) for root in found.roots] == repository.folder.roots()
    parts = {role: repository.parts[role] for role in ROLES}
    assert {role: found.part(role) for role in ROLES} == parts
    assert make_set(repository.folder.roots(), parts) == offered.set


@given(data=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    try:
        code = "" if parse_set(data) else "nothing"
    except TrustError as error:
        code = error.code
    assert code in {"", "trust.malformed", "trust.wrong_version"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_to_a_signed_set_is_accepted_as_something_else(tmp_path_factory, data: st.DataObject) -> None:
    """Cut, flipped or spliced anywhere in set or bin: either refused, or the very same assignment."""
    base = tmp_path_factory.mktemp("mutant")
    repository = _shared(tmp_path_factory)
    signed, document = repository.set(), repository.assignments["line-1"]
    in_bin = data.draw(st.booleans())
    offered = signed.bin() if in_bin else signed.set
    at = data.draw(st.integers(0, len(offered) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "drop", "insert"]))
    byte = data.draw(st.integers(0, 255))
    changed = {
        "cut": offered[:at],
        "flip": offered[:at] + bytes([offered[at] ^ (byte or 1)]) + offered[at + 1 :],
        "drop": offered[:at] + offered[at + 1 :],
        "insert": offered[:at] + bytes([byte]) + offered[at:],
    }[kind]
    given = (signed.set, changed) if in_bin else (changed, signed.bin())
    found = verify(
        *given, document, agent_id="line-1", anchor=repository.anchor, trusted=b"", now=NOW, scratch=base / "s"
    )
    if found.error is None:
        assert found.assignment.desired.bundle == parse_desired(document)
    else:
        assert found.error.code.startswith("trust.")


_made: list[Repository] = []


def _shared(factory: pytest.TempPathFactory) -> Repository:
    if not _made:
        _made.append(Repository(factory.mktemp("shared") / "repository"))
        assigned(_made[0])
    return _made[0]
