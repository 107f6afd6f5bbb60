"""Decides what may run here: signed metadata in, a verified assignment out (TUF; `TRUST.md` is the document).

It uses neither network nor clock: bytes, a reference time and a scratch folder are arguments. The rules it keeps:

1.  The trust anchor is a root that was put on this machine when it was enrolled. Nothing that arrives replaces it,
    except a chain of roots, each signed by a threshold of the keys of the one before and by its own.
2.  A set of metadata is taken or refused as one document, together with the bin of this agent: the part of the
    assignments that lists it. Their sizes are checked before they are parsed.
3.  Order: root chain, timestamp, snapshot, targets, assign, bin; each signed by a threshold of the keys the one before
    names for it, none expired at the reference time.
4.  No version ever falls: not of the timestamp, not of the snapshot, not of anything a snapshot lists.
5.  What a snapshot lists is what must be there, by its hash: sets cannot be mixed, nor a set with another bin.
6.  What verified is kept (as `trusted`, to be persisted before anything is done) also when the rest was refused.
7.  The assignment of agent A is the target `assign/A.json` of A's bin, byte for byte. Another agent's does not do.
8.  A bundle runs only if the release role itself, not one it delegates to, lists `bundles/{digest}` with that very
    digest. The online roles can choose among released bundles; they cannot make one. An assignment without a
    bundle (a recall) runs nothing and needs no release.
9.  Reference time = max(the machine's clock, the newest verified `issued_at`). A clock that is behind cannot hide
    that metadata is stale; a clock that is ahead refuses a change and nothing else. No single online key can move
    the floor beyond what root and release role allow: it is cut at their expiry, and dropped when the key is
    replaced.
10. Nothing is looked at again after it was accepted: expiry stops a change, never a line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from models.errors import MessageError, TrustError
from models.messages import Desired, decode
from models.signed_set import (
    BIN,
    MAX_ROOTS,
    MAX_SET_BYTES,
    MAX_TRUSTED_BYTES,
    ROLES,
    TrustSet,
    check_size,
    is_development,
    parse_set,
    set_of,
    version_of,
)
from models.topics import MAX_BLOB_BYTES, assignment_path, bin_of


@dataclass(frozen=True, slots=True)
class Assignment:
    """A desired state that is proven to be meant for this agent: for a bundle that is released, or a recall."""

    desired: Desired
    bundle_custom: dict[str, Any]
    """What the release key says about the bundle: size, name, when it was released."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a verification.

    Attributes:
        trusted: To be persisted before anything else, also with an error: what verified so far.
        assignment: What may be done; None with an error, or when only metadata was refreshed.
        error: Why not.
        facts: For reports: versions, issue time, reference time, whether the keys are development keys.
    """

    trusted: bytes
    assignment: Assignment | None = None
    error: TrustError | None = None
    facts: dict[str, str] = field(default_factory=dict)


def verify(
    offered: bytes,
    own_bin: bytes,
    document: bytes | None,
    *,
    agent_id: str,
    anchor: bytes,
    trusted: bytes,
    now: datetime,
    scratch: Path,
) -> Outcome:
    """Verifies a set and, where one is given, the assignment of this agent.

    Args:
        offered: The set as it came.
        own_bin: This agent's bin as it came; empty when none came: then the one that is trusted must do.
        document: Bytes of the desired state as they came; None = only refresh what is trusted.
        agent_id: Whose assignment it must be.
        anchor: The root this machine was given.
        trusted: `Outcome.trusted` of the last time; empty the first time or when it was lost.
        now: The machine's clock.
        scratch: An empty folder for the library; nothing in it is needed afterwards.

    Returns:
        The outcome; refusals are in `error`, not raised.
    """
    try:
        kept = parse_set(trusted, MAX_TRUSTED_BYTES) if trusted else TrustSet()
        check_size(own_bin, "The bin")
        given = msgspec.structs.replace(parse_set(offered), bin=msgspec.Raw(own_bin or b"null"))
        _check_anchor(anchor)
    except TrustError as error:
        return Outcome(trusted, error=error)
    outcome = _attempt(given, document, agent_id, anchor, kept, now, scratch / "1")
    reached = parse_set(outcome.trusted, MAX_TRUSTED_BYTES)
    if outcome.error is not None and len(reached.roots) > max(len(kept.roots), 1):
        # A new root may have replaced the very key that set the floor or the versions: look again with it.
        outcome = _attempt(given, document, agent_id, anchor, reached, now, scratch / "2")
    return outcome


def _attempt(
    given: TrustSet,
    document: bytes | None,
    agent_id: str,
    anchor: bytes,
    kept: TrustSet,
    now: datetime,
    folder: Path,
) -> Outcome:
    names = _names_of(agent_id)
    _lay_out(kept, anchor, folder, names)
    floor = _floor(kept)
    reference = max(now, floor) if floor else now
    facts = {"reference_time": _text(reference)}
    if floor is not None and floor > now:
        facts["clock_behind_s"] = str(int((floor - now).total_seconds()))
    assignment, error = None, None
    try:
        updater = _updater(given, anchor, folder, reference, names)
        updater.refresh()
        if document is not None:
            _check_listed(folder, agent_id)
            assignment = _assignment(updater, agent_id, document, folder)
        elif given.part(BIN):
            updater.get_targetinfo(assignment_path(agent_id))
        _check_against_new_floor(_collect(folder, names), reference)
    except TrustError as refusal:
        assignment, error = None, refusal
    except (RepositoryError, DownloadError) as refusal:
        assignment, error = None, _translate(refusal, given, kept, reference)
    now_kept = _collect(folder, names)
    facts |= _facts(now_kept)
    return Outcome(msgspec.json.encode(now_kept), assignment, error, facts)


def _names_of(agent_id: str) -> dict[str, str]:
    """Returns role by part of the set: what the library calls it."""
    return {role: role for role in ROLES} | {BIN: bin_of(agent_id)}


def _updater(given: TrustSet, anchor: bytes, folder: Path, reference: datetime, names: dict[str, str]) -> Updater:
    config = UpdaterConfig(
        max_root_rotations=MAX_ROOTS,
        max_delegations=4,
        root_max_length=MAX_SET_BYTES,
        timestamp_max_length=MAX_SET_BYTES,
        snapshot_max_length=MAX_SET_BYTES,
        targets_max_length=MAX_SET_BYTES,
    )
    updater = Updater(str(folder), "set://", fetcher=_InMemory(given, names), config=config, bootstrap=anchor)
    # python-tuf (6, 7) has no public way to say what time it is; a version without this place must not be used.
    inner = getattr(updater, "_trusted_set", None)
    if not isinstance(getattr(inner, "reference_time", None), datetime):
        raise TrustError("trust.unsupported_library", "This version of python-tuf takes no reference time.", got="none")
    inner.reference_time = reference  # type: ignore[union-attr]
    return updater


class _InMemory(FetcherInterface):
    """Serves the files of a set to the library; what is not in the set is definitely not there."""

    def __init__(self, given: TrustSet, names: dict[str, str]) -> None:
        self._files = {f"{names[part]}.json": data for part, data in _parts(given).items()}
        self._files |= {f"{version_of(bytes(root))}.root.json": bytes(root) for root in given.roots}

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._files.get(url.rpartition("/")[2])
        if data is None:
            raise DownloadHTTPError(f"the set has no {url.rpartition('/')[2]}", 404)
        return iter((data,))


def _check_listed(folder: Path, agent_id: str) -> None:
    """A bin is listed once it has held an assignment; that it is not is a proven answer."""
    if f"{bin_of(agent_id)}.json" not in Metadata[Snapshot].from_file(str(folder / "snapshot.json")).signed.meta:
        raise _not_assigned(agent_id)


def _not_assigned(agent_id: str) -> TrustError:
    path = assignment_path(agent_id)
    return TrustError("trust.not_assigned", "Nothing is assigned to this agent.", expected=path, got="no such entry")


def _assignment(updater: Updater, agent_id: str, document: bytes, folder: Path) -> Assignment:
    path = assignment_path(agent_id)
    info = updater.get_targetinfo(path)
    if info is None:
        raise _not_assigned(agent_id)
    try:
        info.verify_length_and_hashes(document)
    except LengthOrHashMismatchError as error:
        raise TrustError(
            "trust.wrong_assignment",
            "The desired state is not the one that was signed for this agent.",
            expected=f"{path} with sha256 {info.hashes.get('sha256', 'of another kind')}",
            got=str(error),
        ) from error
    try:
        desired = decode(document, Desired)
    except MessageError as error:
        raise TrustError("trust.bad_assignment", "The assignment cannot be read.", got=str(error)) from error
    if not desired.bundle:
        return Assignment(desired, {})
    # Not `get_targetinfo`, which would also ask whom the release role delegates to.
    top = Metadata[Targets].from_file(str(folder / "targets.json")).signed
    released = top.targets.get(f"bundles/{desired.bundle}")
    if released is None or not _names(released, desired.bundle):
        raise TrustError(
            "trust.not_released",
            "The release key does not list this bundle.",
            expected="a released bundle",
            got=desired.bundle,
        )
    custom = released.custom
    return Assignment(desired, dict(custom) if isinstance(custom, dict) else {})


def _names(target: TargetFile, digest: str) -> bool:
    return target.hashes.get("sha256") == digest and target.length <= MAX_BLOB_BYTES


# -- what is kept ---------------------------------------------------------------------------------------------------


def _lay_out(kept: TrustSet, anchor: bytes, folder: Path, names: dict[str, str]) -> None:
    """Writes what is trusted where the library looks for it."""
    (folder / "root_history").mkdir(parents=True)
    first = version_of(anchor)
    for root in kept.roots:
        version = version_of(bytes(root))
        if version > first:
            (folder / "root_history" / f"{version}.root.json").write_bytes(bytes(root))
    for part, data in _parts(kept).items():
        (folder / f"{names[part]}.json").write_bytes(data)


def _parts(kept: TrustSet) -> dict[str, bytes]:
    return {part: kept.part(part) for part in (*ROLES, BIN) if kept.part(part)}


def _collect(folder: Path, names: dict[str, str]) -> TrustSet:
    roots = sorted((p.read_bytes() for p in (folder / "root_history").glob("*.root.json")), key=version_of)
    paths = {part: folder / f"{name}.json" for part, name in names.items()}
    return set_of(roots, {part: path.read_bytes() for part, path in paths.items() if path.exists()})


def _check_anchor(anchor: bytes) -> None:
    try:
        root = Metadata[Root].from_bytes(anchor)
        root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    except (RepositoryError, ValueError, AttributeError) as error:
        raise TrustError(
            "trust.bad_anchor",
            "The root this machine was given is no signed root; enrol it again.",
            expected="root.json",
            got=str(error)[:200],
        ) from error


# -- time -----------------------------------------------------------------------------------------------------------


def issued_at(signed: Root | Timestamp | Snapshot | Targets) -> datetime | None:
    """Returns when metadata was signed, by the signer's clock; TUF itself has no such field."""
    text = signed.unrecognized_fields.get("issued_at")
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _floor(kept: TrustSet) -> datetime | None:
    """Returns the newest time that is proven: the clock cannot be earlier.

    Cut at the expiry of root and targets: a stolen online key can refuse changes until then, and no longer.
    """
    if not kept.roots:
        return None
    try:
        root = Metadata[Root].from_bytes(bytes(kept.roots[-1])).signed
        times = [issued_at(root)]
        limit = root.expires
        if kept.part("targets"):
            targets = Metadata[Targets].from_bytes(kept.part("targets"))
            root.verify_delegate("targets", targets.signed_bytes, targets.signatures)
            limit = min(limit, targets.signed.expires)
        if kept.part("timestamp"):
            timestamp = Metadata[Timestamp].from_bytes(kept.part("timestamp"))
            root.verify_delegate("timestamp", timestamp.signed_bytes, timestamp.signatures)
            times.append(issued_at(timestamp.signed))
    except (RepositoryError, ValueError):
        pass  # signed by a key that was replaced: it proves nothing any more
    known = [time for time in times if time is not None]
    return min(max(known), limit) if known else None


def _check_against_new_floor(kept: TrustSet, reference: datetime) -> None:
    """The set itself may prove that it is later than we thought."""
    floor = _floor(kept)
    if floor is None or floor <= reference:
        return
    for role, data in {"root": bytes(kept.roots[-1]), **_parts(kept)}.items():
        if Metadata.from_bytes(data).signed.is_expired(floor):
            raise _expired(role, floor)


def _expired(role: str, reference: datetime) -> TrustError:
    stale = role in {"timestamp", "snapshot"}
    return TrustError(
        "trust.frozen" if stale else "trust.expired",
        "No fresh metadata came: the control plane does not sign, somebody holds it back, or this clock is ahead."
        if stale
        else f"The {role} metadata has expired and must be signed again, or this clock is ahead.",
        expected=f"{role} metadata that is valid at {_text(reference)}",
        got="expired",
    )


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")


# -- errors and facts -----------------------------------------------------------------------------------------------


def _translate(error: Exception, given: TrustSet, kept: TrustSet, reference: datetime) -> TrustError:
    """The library's refusal in our words; which one it is follows from the data, not from the library's text."""
    what = str(error)[:300]
    if isinstance(error, ExpiredMetadataError):
        return _expired(_which_expired(given, reference), reference)
    if isinstance(error, UnsignedMetadataError):
        return TrustError("trust.unsigned", "Metadata is not signed by enough of the right keys.", got=what)
    if isinstance(error, DownloadHTTPError):
        return TrustError("trust.incomplete", "The set lacks a part.", expected="a whole set", got=what)
    if (isinstance(error, BadVersionNumberError) or type(error) is RepositoryError) and _falls(given, kept):
        return TrustError("trust.rollback", "The set is older than one that was trusted here.", got=what)
    if isinstance(error, BadVersionNumberError | LengthOrHashMismatchError):
        return TrustError("trust.mixed", "The parts of the set do not belong together.", got=what)
    return TrustError("trust.malformed", "The set cannot be read.", expected="TUF metadata", got=what)


def _which_expired(given: TrustSet, reference: datetime) -> str:
    parts = {"root": bytes(given.roots[-1]) if given.roots else b"", **_parts(given)}
    for role, data in parts.items():
        try:
            if data and Metadata.from_bytes(data).signed.is_expired(reference):
                return role
        except (RepositoryError, ValueError):
            continue
    return "root"


def _falls(given: TrustSet, kept: TrustSet) -> bool:
    if any(version_of(given.part(role)) < version_of(kept.part(role)) for role in ("timestamp", "snapshot")):
        return True
    try:
        new, old = (Metadata[Snapshot].from_bytes(s.part("snapshot")).signed.meta for s in (given, kept))
    except (RepositoryError, ValueError):
        return False
    return any(name not in new or new[name].version < old[name].version for name in old)


def _facts(kept: TrustSet) -> dict[str, str]:
    facts = {f"{role}_version": str(version_of(data)) for role, data in _parts(kept).items()}
    if kept.roots:
        facts["root_version"] = str(version_of(bytes(kept.roots[-1])))
        if is_development(bytes(kept.roots[-1])):
            facts["development"] = "yes"
    return facts
