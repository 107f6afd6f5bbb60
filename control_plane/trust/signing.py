"""Signs the metadata that is due, by a pure function of the last signed metadata and the desired states.

A changed agent costs its bin, the snapshot and the timestamp. A bin exists once it has held an assignment, and for ever
after: what a snapshot listed it must go on listing.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from control_plane.trust import metadata as md
from control_plane.trust.keys import Signer
from models.bundle import sha256
from models.signed_set import ASSIGN, MAX_SET_BYTES, check_size, version_of
from models.topics import BIN_BITS, BIN_PREFIX, assignment_path, bin_of

RESIGN_AFTER: Final = timedelta(hours=1)
"""Timestamp and snapshot are signed this often, although they live seven days, so that a freeze shows within hours."""
_THIRD: Final = md.LIFE[ASSIGN] / 3
FULL_SHARE: Final = 0.8
"""Share of what a broker carries in one message; from here on operators are warned."""
ONLINE: Final = (ASSIGN, "snapshot", "timestamp")
"""The online roles beside the bins, which the keys of `assign` sign."""

SignerOf = Callable[[str, md.RoleKeys], Signer]
"""Returns the private key of an online role."""


def is_bin(role: str) -> bool:
    """Returns whether a role is a bin."""
    return role.startswith(f"{BIN_PREFIX}-")


def sign_changes(
    parts: Mapping[str, bytes],
    documents: Mapping[str, bytes],
    signer_of: SignerOf,
    now: datetime,
    *,
    force: bool,
    above: int = 0,
) -> dict[str, bytes]:
    """Returns new metadata by role; empty while everything is right and young enough.

    Args:
        parts: Newest root and targets, and the newest metadata of every online role and bin there is.
        documents: Desired state by agent.
        signer_of: Gives a private key.
        now: Issue time.
        force: Sign timestamp, snapshot, assign and bins whatever their age.
        above: With `force`: every version is above this one, and every bin exists, also those that a snapshot may have
            listed which is not known any more.

    Raises:
        ConfigError: `keys.no_online_key`.
        TrustError: `trust.oversize`: too many agents in one bin.
        InputError: `trust.no_delegation`.
    """
    keys = md.roles_of(md.read_root(parts["root"]).signed)
    keys[ASSIGN] = md.assign_keys_of(md.read_targets(parts["targets"]).signed)
    new: dict[str, bytes] = {}

    def fresh(role: str, age_limit: timedelta, signed_by: str = "") -> bool:
        data = parts.get(role, b"")
        return bool(data) and not force and md.fresh_for(data, keys[signed_by or role], now, age_limit)

    def next_version(role: str) -> int:
        return max(version_of(parts.get(role, b"")), above) + 1

    assign = md.new_assign(next_version(ASSIGN), keys[ASSIGN], now)
    if not fresh(ASSIGN, _THIRD) or not md.says_the_same(parts[ASSIGN], assign):
        new[ASSIGN] = md.sign(assign, [signer_of(ASSIGN, keys[ASSIGN])])
    wanted = _by_bin(documents)
    every = {f"{BIN_PREFIX}-{number:02x}" for number in range(1 << BIN_BITS)} if above else set()
    for name in sorted(wanted.keys() | every | {role for role in parts if is_bin(role)}):
        here = wanted.get(name, {})
        if name not in parts or not fresh(name, _THIRD, ASSIGN) or md.listed_hashes(parts[name]) != _hashes(here):
            new[name] = md.sign(md.new_bin(next_version(name), here, now), [signer_of(ASSIGN, keys[ASSIGN])])
            check_size(new[name], f"The bin {name}")
    listed = {role: data for role, data in (dict(parts) | new).items() if role in {"targets", ASSIGN} or is_bin(role)}
    if not fresh("snapshot", RESIGN_AFTER) or md.meta_versions(parts["snapshot"]) != _versions(listed):
        snapshot = md.new_snapshot(next_version("snapshot"), listed, now)
        new["snapshot"] = md.sign(snapshot, [signer_of("snapshot", keys["snapshot"])])
    if new or not fresh("timestamp", RESIGN_AFTER):
        timestamp = md.new_timestamp(next_version("timestamp"), new.get("snapshot") or parts["snapshot"], now)
        new["timestamp"] = md.sign(timestamp, [signer_of("timestamp", keys["timestamp"])])
    return new


def fill(common: bytes, parts: Mapping[str, bytes]) -> dict[str, float]:
    """Returns how full the set and the fullest bin are, as a share of what may travel.

    The set grows with released bundles and roots, a bin with agents.
    """
    largest = max((len(data) for role, data in parts.items() if is_bin(role)), default=0)
    return {"set": len(common) / MAX_SET_BYTES, "bin": largest / MAX_SET_BYTES}


def _by_bin(documents: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for agent_id, document in documents.items():
        found.setdefault(bin_of(agent_id), {})[agent_id] = document
    return found


def _hashes(documents: Mapping[str, bytes]) -> dict[str, str]:
    return {assignment_path(agent_id): sha256(document) for agent_id, document in documents.items()}


def _versions(parts: Mapping[str, bytes]) -> dict[str, int]:
    return {role: version_of(data) for role, data in parts.items()}
