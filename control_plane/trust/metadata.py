"""TUF metadata as pure functions: what each role says, who signs it, whether a new one may follow an old one.

Times and versions are arguments. Every signed part carries `issued_at`, because TUF has no issue date and agents take
their clock's floor from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from control_plane.trust.keys import PublicKey, Signer
from models.bundle import sha256
from models.errors import InputError
from models.signed_set import ASSIGN, version_of
from models.topics import BIN_BITS, BIN_PREFIX, assignment_path

LIFE: Final[dict[str, timedelta]] = {
    "root": timedelta(days=3 * 365),
    "targets": timedelta(days=365),
    ASSIGN: timedelta(days=30),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=7),
}
"""Time from signing to expiry, by role; a bin has that of `assign`."""
ALARM_SHARE: Final = 2 / 3
"""Share of its life after which metadata ought to have been signed again."""
TOP_ROLES: Final = ("root", "targets", "snapshot", "timestamp")


def encode(metadata: Metadata[Any]) -> bytes:
    """Returns compact JSON, as it is hashed and sent."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def _dates(role: str, now: datetime) -> tuple[datetime, dict[str, Any]]:
    now = now.astimezone(UTC).replace(microsecond=0)
    return now + LIFE[role], {"issued_at": now.isoformat()}


def sign(metadata: Metadata[Any], signers: Iterable[Signer], *, append: bool = False) -> bytes:
    """Signs with each of these keys and encodes."""
    for at, signer in enumerate(signers):
        metadata.sign(signer, append=append or at > 0)
    return encode(metadata)


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """Keys of a role, and how many of them must sign."""

    keys: tuple[PublicKey, ...]
    threshold: int = 1


def new_root(version: int, roles: dict[str, RoleKeys], now: datetime, *, development: bool) -> Metadata[Root]:
    """Returns a root that names the keys of the four top roles."""
    expires, extra = _dates("root", now)
    root = Root(version=version, expires=expires, consistent_snapshot=False, unrecognized_fields=extra)
    if development:
        root.unrecognized_fields["development"] = True
    for role, wanted in roles.items():
        for key in wanted.keys:
            root.add_key(key, role)
        root.roles[role].threshold = wanted.threshold
    return Metadata(root)


def roles_of(root: Root) -> dict[str, RoleKeys]:
    """Returns the keys that a root names for the four top roles, in the form that `new_root` takes."""
    return {
        name: RoleKeys(tuple(root.keys[k] for k in role.keyids), role.threshold)  # type: ignore[misc]
        for name, role in root.roles.items()
    }


_ANCESTORS: Final = 16
"""So many earlier targets are named: a folder may be that many signatures ahead of the control plane."""
_WITHDRAWN: Final = 200
"""So many withdrawn bundles are named, the newest last; all of it travels to every agent."""


def new_targets(
    version: int,
    bundles: dict[str, TargetFile],
    assign: RoleKeys,
    now: datetime,
    *,
    before: bytes = b"",
    withdrawn: Iterable[str] = (),
) -> Metadata[Targets]:
    """Returns what the release key says: the released bundles, and which keys may assign them.

    Args:
        version: Of the metadata.
        bundles: Entries by path.
        assign: Keys of the delegated role.
        now: Issue time.
        before: The targets that these were built on; empty = they are the first.
        withdrawn: Digests that were released once and are not any more, oldest first.
    """
    expires, extra = _dates("targets", now)
    extra["ancestors"] = [sha256(before), *ancestors_of(before)][:_ANCESTORS] if before else []
    extra["withdrawn"] = list(withdrawn)[-_WITHDRAWN:]
    role = DelegatedRole(ASSIGN, [k.keyid for k in assign.keys], assign.threshold, True, paths=[f"{ASSIGN}/*"])
    delegations = Delegations({k.keyid: k for k in assign.keys}, {ASSIGN: role})
    return Metadata(Targets(version, None, expires, dict(bundles), delegations, unrecognized_fields=extra))


def ancestors_of(targets: bytes) -> list[str]:
    """Returns the sha256 of the targets that these were built on, newest first; empty for those of older programs."""
    found = read_targets(targets).signed.unrecognized_fields.get("ancestors")
    return [str(digest) for digest in found] if isinstance(found, list) else []


def withdrawn_in(targets: bytes) -> list[str]:
    """Returns the digests that were released once and are not any more, oldest first."""
    found = read_targets(targets).signed.unrecognized_fields.get("withdrawn")
    return [str(digest) for digest in found] if isinstance(found, list) else []


def released_in(targets: bytes) -> list[str]:
    """Returns the digests of the released bundles."""
    return sorted(path.removeprefix("bundles/") for path in read_targets(targets).signed.targets)


def assign_keys_of(targets: Targets) -> RoleKeys:
    """Returns the keys `targets` delegates assignments to.

    Raises:
        InputError: `trust.no_delegation`.
    """
    delegations = targets.delegations
    role = (delegations.roles or {}).get(ASSIGN) if delegations else None
    if delegations is None or role is None:
        raise InputError("trust.no_delegation", "The targets metadata delegates no assignments.", expected=ASSIGN)
    return RoleKeys(tuple(delegations.keys[k] for k in role.keyids), role.threshold)  # type: ignore[misc]


def bundle_target(digest: str, manifest: bytes, custom: dict[str, Any]) -> TargetFile:
    """Returns the entry of a released bundle: its content is the manifest, so its sha256 is the bundle's digest."""
    target = TargetFile.from_data(f"bundles/{digest}", manifest, ["sha256"])
    target.unrecognized_fields["custom"] = custom
    return target


def new_assign(version: int, keys: RoleKeys, now: datetime) -> Metadata[Targets]:
    """Returns metadata of `assign`, which delegates to the bins with the same keys and lists nothing itself."""
    expires, extra = _dates(ASSIGN, now)
    role = SuccinctRoles([k.keyid for k in keys.keys], keys.threshold, BIN_BITS, BIN_PREFIX)
    delegations = Delegations({k.keyid: k for k in keys.keys}, succinct_roles=role)
    return Metadata(Targets(version, None, expires, {}, delegations, unrecognized_fields=extra))


def new_bin(version: int, documents: Mapping[str, bytes], now: datetime) -> Metadata[Targets]:
    """Returns the metadata of one bin, with one entry per agent."""
    expires, extra = _dates(ASSIGN, now)
    targets = {}
    for agent_id, document in documents.items():
        target = TargetFile.from_data(assignment_path(agent_id), document, ["sha256"])
        targets[target.path] = target
    return Metadata(Targets(version, None, expires, targets, unrecognized_fields=extra))


def new_snapshot(version: int, parts: Mapping[str, bytes], now: datetime) -> Metadata[Snapshot]:
    """Returns a snapshot: versions and hashes of targets, assign and every bin.

    Args:
        version: One more than the last.
        parts: Metadata by role. A role that was listed once must be listed for ever.
        now: Issue time.
    """
    expires, extra = _dates("snapshot", now)
    meta = {f"{role}.json": _meta(data) for role, data in sorted(parts.items())}
    return Metadata(Snapshot(version, None, expires, meta, unrecognized_fields=extra))


def new_timestamp(version: int, snapshot: bytes, now: datetime) -> Metadata[Timestamp]:
    """Returns a timestamp, which names the current snapshot."""
    expires, extra = _dates("timestamp", now)
    return Metadata(Timestamp(version, None, expires, _meta(snapshot), unrecognized_fields=extra))


def _meta(data: bytes) -> MetaFile:
    # The hash also binds a bin to its name: one key signs all, and a bin under another's topic must be refused.
    return MetaFile(version_of(data), None, {"sha256": sha256(data)})


def read_root(data: bytes) -> Metadata[Root]:
    """Parses a root.

    Raises:
        InputError: `trust.no_metadata`.
    """
    return _read(data, Root)  # type: ignore[no-any-return]


def read_targets(data: bytes) -> Metadata[Targets]:
    """Parses targets or assign.

    Raises:
        InputError: `trust.no_metadata`.
    """
    return _read(data, Targets)  # type: ignore[no-any-return]


def _read(data: bytes, kind: Any) -> Any:
    try:
        found: Metadata[Any] = Metadata.from_bytes(data)
    except (RepositoryError, ValueError) as error:
        raise InputError("trust.no_metadata", "This is no TUF metadata.", got=str(error)[:200]) from error
    if not isinstance(found.signed, kind):
        raise InputError(
            "trust.no_metadata", "This is metadata of another role.", expected=kind.type, got=found.signed.type
        )
    return found


def check_next_root(new: bytes, old: bytes | None) -> Metadata[Root]:
    """Checks that a threshold of both sets of keys signed a new root and that its version is one more.

    Raises:
        InputError: `trust.not_next`, `trust.not_enough_signatures`, `trust.no_metadata`.
    """
    found = read_root(new)
    if old is not None:
        before = read_root(old).signed
        _check_version(found.signed.version, before.version + 1, "root", exact=True)
        _check_signed(found, before, "root", "the keys of the root before")
    _check_signed(found, found.signed, "root", "its own keys")
    return found


def check_next_targets(new: bytes, old: bytes | None, root: bytes) -> Metadata[Targets]:
    """Checks that the release keys signed new targets with a higher version, built on the present ones.

    A higher number alone is not enough: targets from a folder that missed a withdrawal would release the bundle again.

    Raises:
        InputError: `trust.not_next`, `trust.not_built_on`, `trust.not_enough_signatures`, `trust.no_metadata`,
            `trust.no_delegation`.
    """
    found = read_targets(new)
    if old is not None:
        _check_version(found.signed.version, read_targets(old).signed.version + 1, "targets", exact=False)
    _check_signed(found, read_root(root).signed, "targets", "the release keys of the root")
    names_ancestors = old is not None and "ancestors" in read_targets(old).signed.unrecognized_fields
    if old is not None and names_ancestors and sha256(old) not in ancestors_of(new):
        raise InputError(
            "trust.not_built_on",
            "These targets were not built on the newest ones, so they would undo what was released or withdrawn since; "
            "run `sortline keys pull` first.",
            expected=f"built on {sha256(old)[:12]}",
            got=f"built on {', '.join(digest[:12] for digest in ancestors_of(new)[:2]) or 'nothing known'}",
        )
    assign_keys_of(found.signed)
    return found


def _check_version(got: int, wanted: int, role: str, *, exact: bool) -> None:
    if got != wanted if exact else got < wanted:
        raise InputError(
            "trust.not_next",
            f"This {role} metadata does not follow the newest one.",
            expected=f"version {wanted}",
            got=f"version {got}",
        )


def _check_signed(metadata: Metadata[Any], by: Root, role: str, whose: str) -> None:
    result = by.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if not result.verified:
        raise InputError(
            "trust.not_enough_signatures",
            f"The {role} metadata is not signed by enough of {whose}.",
            expected=f"{result.threshold} of {len(result.signed) + len(result.unsigned)} keys",
            got=f"{len(result.signed)}",
        )


def meta_versions(snapshot: bytes) -> dict[str, int]:
    """Returns the version of each role that a snapshot lists."""
    signed: Snapshot = Metadata[Snapshot].from_bytes(snapshot).signed
    return {name.removesuffix(".json"): entry.version for name, entry in signed.meta.items()}


class _Signature(msgspec.Struct):
    keyid: str


class _Entry(msgspec.Struct):
    hashes: dict[str, str]


class _OwnSigned(msgspec.Struct):
    issued_at: datetime
    expires: datetime
    targets: dict[str, _Entry] = {}


class _Own(msgspec.Struct):
    """The facts of our own metadata that are read every half minute; python-tuf would take eight times as long."""

    signatures: list[_Signature]
    signed: _OwnSigned


def dates_of(data: bytes) -> tuple[datetime, datetime]:
    """Returns when metadata of ours was issued and when it expires."""
    signed = msgspec.json.decode(data, type=_Own).signed
    return signed.issued_at, signed.expires


def fresh_for(data: bytes, keys: RoleKeys, now: datetime, age_limit: timedelta) -> bool:
    """Returns whether metadata of ours is signed by one of today's keys of its role and younger than the limit."""
    own = msgspec.json.decode(data, type=_Own)
    ours = {key.keyid for key in keys.keys} & {signature.keyid for signature in own.signatures}
    return bool(ours) and now - own.signed.issued_at < age_limit


def says_the_same(data: bytes, other: Metadata[Targets]) -> bool:
    """Returns whether delegation and entries are equal, apart from version and dates."""
    old = read_targets(data).signed
    return old.targets == other.signed.targets and old.delegations == other.signed.delegations


def listed_hashes(data: bytes) -> dict[str, str]:
    """Returns the sha256 by path that a bin of ours lists."""
    own = msgspec.json.decode(data, type=_Own)
    return {path: entry.hashes["sha256"] for path, entry in own.signed.targets.items()}


def signatures_missing(metadata: Metadata[Root], old: bytes | None) -> int:
    """Returns the number of signatures a root still needs before it may follow `old`."""
    authorities = [metadata.signed] + ([read_root(old).signed] if old else [])
    return max(
        a.get_verification_result("root", metadata.signed_bytes, metadata.signatures).missing for a in authorities
    )
