"""Ceremonies on a folder: make the keys, release bundles, replace keys, renew what expires. No control plane needed.

The folder holds what is public, `N.root.json` and `targets.json`, and the online keys in `online/`; it is copied to
the control plane. Root and release keys are files elsewhere: on media that are taken away. A root that still lacks
signatures waits as `N.root.pending.json` (and `targets.pending.json` with it) until `add_signature` completes it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from control_plane.trust import metadata as md
from control_plane.trust.keys import Signer, is_encrypted, load_key, new_key
from control_plane.trust.signing import is_bin
from models.bundle import Manifest, sha256
from models.errors import ConfigError, ConflictError, InputError
from models.files import write_atomically
from models.signed_set import ASSIGN, version_of

if TYPE_CHECKING:
    from tuf.api.metadata import Metadata, Root

Passphrase = Callable[[Path], str]
"""Asks for the passphrase of a key file."""
ONLINE: Final = ("timestamp", "snapshot", ASSIGN)
ROOT_KEYS: Final = 3
ROOT_THRESHOLD: Final = 2


@dataclass(frozen=True, slots=True)
class TrustFolder:
    """The public metadata and online keys of one installation."""

    path: Path

    def roots(self) -> list[bytes]:
        """The root chain, oldest first."""
        found = [path.read_bytes() for path in self.path.glob("*.root.json")]
        return sorted(found, key=version_of)

    @property
    def root(self) -> bytes:
        """The newest root.

        Raises:
            ConfigError: `keys.not_initialised`.
        """
        roots = self.roots()
        if not roots:
            raise ConfigError(
                "keys.not_initialised",
                f"{self.path} holds no root metadata; make keys with `sortline keys init`.",
                expected="N.root.json",
                got="nothing",
            )
        return roots[-1]

    @property
    def targets(self) -> bytes:
        """The newest targets; empty when there are none."""
        path = self.path / "targets.json"
        return path.read_bytes() if path.exists() else b""

    def write(self, name: str, data: bytes) -> Path:
        """Writes a metadata file."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, data)
        return self.path / name

    def online_path(self, role: str, keyid: str) -> Path:
        """Returns the path of an online key by its id; old and new keys are kept beside each other."""
        return self.path / "online" / f"{role}-{keyid[:12]}.pem"

    def online_signer(self, role: str, keys: md.RoleKeys) -> Signer:
        """Returns the online key of a role.

        Raises:
            ConfigError: `keys.no_online_key`.
        """
        for key in keys.keys:
            path = self.online_path(role, key.keyid)
            if path.exists():
                return load_key(path, None)
        raise ConfigError(
            "keys.no_online_key",
            f"No private key of role {role} is in {self.path / 'online'}.",
            expected=[str(self.online_path(role, key.keyid).name) for key in keys.keys],
            got="nothing",
        )


def initialise(
    folder: TrustFolder, root_keys: Sequence[Path], release_key: Path, passphrase: Passphrase | None, now: datetime
) -> bytes:
    """Makes all keys and the first root and targets.

    Args:
        folder: New or empty.
        root_keys: Three new files, best on three media; two of them must sign later. One for development.
        release_key: New file.
        passphrase: Protects the offline keys; None makes development keys: all in clear, one root key, threshold 1.
        now: Issue time.

    Returns:
        The root: the trust anchor that agents are given.

    Raises:
        ConflictError: `keys.exists`, `keys.already_initialised`.
        InputError: `keys.wrong_number`.
    """
    if folder.roots():
        raise ConflictError("keys.already_initialised", f"{folder.path} holds a root; rotate its keys instead.")
    development = passphrase is None
    wanted = 1 if development else ROOT_KEYS
    if len(set(root_keys)) != wanted:
        raise InputError("keys.wrong_number", "Name the root keys.", expected=f"{wanted} new files", got=len(root_keys))
    roots = [new_key(path, passphrase(path) if passphrase else None) for path in root_keys]
    release = new_key(release_key, passphrase(release_key) if passphrase else None)
    online = new_online_keys(folder)
    roles = {
        "root": _role(roots, 1 if development else ROOT_THRESHOLD),
        "targets": _role([release]),
        "timestamp": _role([online["timestamp"]]),
        "snapshot": _role([online["snapshot"]]),
    }
    root = md.sign(md.new_root(1, roles, now, development=development), roots)
    targets = md.sign(md.new_targets(1, {}, _role([online[ASSIGN]]), now), [release])
    folder.write("targets.json", targets)
    folder.write("1.root.json", root)
    return root


def new_online_keys(folder: TrustFolder) -> dict[str, Signer]:
    """Makes the three online keys; their files are named after their ids."""
    found = {}
    for role in ONLINE:
        draft = folder.path / "online" / f".{role}.new.pem"
        draft.unlink(missing_ok=True)
        found[role] = new_key(draft, None)
        draft.rename(folder.online_path(role, found[role].public_key.keyid))
    return found


def _role(signers: Sequence[Signer], threshold: int = 1) -> md.RoleKeys:
    return md.RoleKeys(tuple(signer.public_key for signer in signers), threshold)


def open_keys(paths: Sequence[Path], passphrase: Passphrase) -> list[Signer]:
    """Reads key files, asking for a passphrase where one is needed."""
    return [load_key(path, passphrase(path) if is_encrypted(path) else None) for path in paths]


# -- releasing ------------------------------------------------------------------------------------------------------


def release(targets: bytes, root: bytes, manifest: Manifest, signer: Signer, now: datetime) -> bytes:
    """Returns new targets that list a bundle.

    Raises:
        InputError: `trust.not_enough_signatures`: this is not the release key.
    """
    data = manifest.encoded()
    custom: dict[str, Any] = {
        "name": manifest.name,
        "size_bytes": manifest.size_bytes,
        "released_at": now.isoformat(timespec="seconds"),
    }
    entry = md.bundle_target(sha256(data), data, custom)
    return _resign(targets, root, [signer], now, add={entry.path: entry})


def withdraw(targets: bytes, root: bytes, digest: str, signer: Signer, now: datetime) -> bytes:
    """Returns new targets that no longer list a bundle; agents that run it go on, no agent will start with it.

    Raises:
        InputError: `trust.not_released`: it was not listed.
    """
    path = f"bundles/{digest}"
    if path not in md.read_targets(targets).signed.targets:
        raise InputError("trust.not_released", "This bundle is not released.", expected="a released bundle", got=digest)
    return _resign(targets, root, [signer], now, drop=path)


def renew_targets(targets: bytes, root: bytes, signers: Sequence[Signer], now: datetime) -> bytes:
    """Returns the same targets with a later expiry."""
    return _resign(targets, root, signers, now)


def _resign(
    targets: bytes,
    root: bytes,
    signers: Sequence[Signer],
    now: datetime,
    *,
    add: dict[str, Any] | None = None,
    drop: str = "",
    assign: md.RoleKeys | None = None,
) -> bytes:
    old = md.read_targets(targets).signed
    bundles = {path: entry for path, entry in old.targets.items() if path != drop} | (add or {})
    gone = [digest for digest in md.withdrawn_in(targets) if f"bundles/{digest}" not in bundles]
    if drop:
        gone.append(drop.removeprefix("bundles/"))
    keys = assign or md.assign_keys_of(old)
    fresh = md.new_targets(old.version + 1, bundles, keys, now, before=targets, withdrawn=gone)
    data = md.sign(fresh, signers)
    md.check_next_targets(data, targets, root)
    return data


# -- replacing keys -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotated:
    """The files and versions that a rotation wrote."""

    path: Path
    version: int
    missing: int
    """Signatures that the root still needs; 0 = it is complete."""


def check_replacement(folder: TrustFolder, role: str, retire: str, *, new: bool) -> None:
    """Refuses a rotation that cannot be made, before a new key is written.

    Raises:
        InputError: `keys.unknown_role`, `keys.unknown_key`.
        ConfigError: `keys.not_initialised`.
    """
    roles = md.roles_of(md.read_root(folder.root).signed)
    if role not in {"root", "release", "online"} or (role == "release" and not new):
        raise _unknown_role(role)
    if role == "root" and (new or retire):
        matching = [key for key in roles["root"].keys if retire and key.keyid.startswith(retire)]
        if not new or len(matching) != 1:
            raise _unknown_key(roles["root"], retire)


def role_of_key(folder: TrustFolder, keyid: str) -> str:
    """Returns the role that a key has in the newest root or targets of a folder; empty when it has none."""
    roles = md.roles_of(md.read_root(folder.root).signed)
    if folder.targets:
        roles[ASSIGN] = md.assign_keys_of(md.read_targets(folder.targets).signed)
    return ", ".join(role for role, keys in roles.items() if any(key.keyid == keyid for key in keys.keys))


def rotate(
    folder: TrustFolder,
    role: str,
    signers: Sequence[Signer],
    now: datetime,
    *,
    retire: str = "",
    new: Signer | None = None,
    release_signers: Sequence[Signer] = (),
) -> Rotated:
    """Writes the next root, with other keys for a role or only a later expiry.

    Args:
        folder: The installation.
        role: `root` (replace the key whose id begins with `retire` by `new`; without them only renew), `release`
            (`new` replaces the release key and signs the targets again) or `online` (three new online keys; the
            targets are signed again by `release_signers`).
        signers: Root keys that are at hand; missing signatures are added later.
        now: Issue time.
        retire: See role.
        new: See role.
        release_signers: See role.

    Raises:
        InputError: `keys.unknown_role`, `keys.unknown_key`, `trust.not_enough_signatures`.
    """
    current = md.read_root(folder.root).signed
    roles = md.roles_of(current)
    targets: bytes = b""
    if role == "root":
        roles["root"] = _replaced(roles["root"], retire, new)
    elif role == "release" and new is not None:
        roles["targets"] = _role([new])
    elif role == "online":
        online = new_online_keys(folder)
        roles |= {name: _role([online[name]]) for name in ("timestamp", "snapshot")}
        targets = _resign(folder.targets, folder.root, release_signers, now, assign=_role([online[ASSIGN]]))
    else:
        raise _unknown_role(role)
    development = bool(current.unrecognized_fields.get("development"))
    root = md.new_root(current.version + 1, roles, now, development=development)
    extra = [new] if new is not None and role == "root" else []
    data = md.sign(root, [*signers, *extra])
    if role == "release" and new is not None:
        targets = _resign(folder.targets, data, [new], now)
    if targets:
        folder.write("targets.pending.json", targets)
    return _settle(folder, data)


def _replaced(keys: md.RoleKeys, retire: str, new: Signer | None) -> md.RoleKeys:
    if new is None and not retire:
        return keys
    kept = tuple(key for key in keys.keys if not (retire and key.keyid.startswith(retire)))
    if new is None or len(kept) != len(keys.keys) - 1:
        raise _unknown_key(keys, retire)
    return md.RoleKeys((*kept, new.public_key), keys.threshold)


def _unknown_role(role: str) -> InputError:
    return InputError(
        "keys.unknown_role", "There is no such rotation.", expected="root, release with --new, online", got=role
    )


def _unknown_key(keys: md.RoleKeys, retire: str) -> InputError:
    known = ", ".join(key.keyid[:12] for key in keys.keys)
    return InputError(
        "keys.unknown_key",
        "Say which root key the new one replaces (--retire ID with --new FILE); `sortline keys id FILE` prints the id "
        "of a key file.",
        expected=f"the first digits of one of {known}",
        got=retire or "nothing",
    )


def add_signature(folder: TrustFolder, signers: Sequence[Signer]) -> Rotated:
    """Adds signatures to the root that waits for them.

    Raises:
        ConflictError: `keys.nothing_pending`.
    """
    waiting = sorted(folder.path.glob("*.root.pending.json"))
    if not waiting:
        raise ConflictError("keys.nothing_pending", f"No root waits for signatures in {folder.path}.")
    pending: Metadata[Root] = md.read_root(waiting[-1].read_bytes())
    return _settle(folder, md.sign(pending, signers, append=True))


def _settle(folder: TrustFolder, data: bytes) -> Rotated:
    """Keeps a root as pending, or puts it and its targets in force when it is complete."""
    root = md.read_root(data)
    version = root.signed.version
    missing = md.signatures_missing(root, folder.root)
    pending = folder.write(f"{version}.root.pending.json", data)
    if missing:
        return Rotated(pending, version, missing)
    md.check_next_root(data, folder.root)
    final = folder.path / f"{version}.root.json"
    pending.rename(final)
    targets = folder.path / "targets.pending.json"
    if targets.exists():
        md.check_next_targets(targets.read_bytes(), folder.targets, data)
        targets.rename(folder.path / "targets.json")
    return Rotated(final, version, 0)


def follow(folder: TrustFolder, roots: Sequence[bytes], targets: bytes, *, discard: bool = False) -> list[str]:
    """Brings a folder to what the control plane has by now, verified step by step; returns what was new.

    Targets are compared by content and origin, not by number. A folder that is ahead of the control plane stays.

    Args:
        folder: The installation.
        roots: Root chain of the control plane.
        targets: Its newest targets.
        discard: Takes the control plane's targets also where the folder has signed others meanwhile.

    Raises:
        InputError: `trust.not_next`, `trust.not_enough_signatures`: this control plane is not of this installation.
        ConflictError: `trust.diverged`: both have signed different targets since they last agreed.
    """
    new = []
    for root in sorted(roots, key=version_of):
        if version_of(root) > version_of(folder.root):
            md.check_next_root(root, folder.root)
            folder.write(f"{version_of(root)}.root.json", root)
            new.append(f"root {version_of(root)}")
    mine = folder.targets
    if targets and targets != mine and not (mine and sha256(targets) in md.ancestors_of(mine)):
        md.check_next_targets(targets, None, folder.root)
        legacy = not md.ancestors_of(targets) and version_of(targets) > version_of(mine)
        if mine and sha256(mine) not in md.ancestors_of(targets) and not legacy and not discard:
            raise _diverged(mine, targets)
        folder.write("targets.json", targets)
        new.append(f"targets {version_of(targets)}")
    return new


def _diverged(mine: bytes, theirs: bytes) -> ConflictError:
    added, dropped = released_changes(theirs, mine)
    only = [f"releases {digest[:12]}" for digest in added] + [f"does not release {digest[:12]}" for digest in dropped]
    return ConflictError(
        "trust.diverged",
        "This folder and the control plane have signed different targets since they last agreed. Pull with --discard "
        "and repeat here what is still wanted.",
        expected=f"targets built on {sha256(theirs)[:12]}",
        got=f"targets {version_of(mine)} of this folder: " + ("; ".join(only) or "the same bundles"),
    )


def released_changes(old: bytes, new: bytes) -> tuple[list[str], list[str]]:
    """Returns the digests that new targets release, and those that they withdraw, against the old ones."""
    before, after = (set(md.released_in(data)) if data else set() for data in (old, new))
    return sorted(after - before), sorted(before - after)


def released_and_withdrawn(targets: bytes) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the released bundles with what the release key says of each, and the withdrawn ones, oldest first."""
    if not targets:
        return {}, []
    listed = md.read_targets(targets).signed.targets
    facts = {path.removeprefix("bundles/"): dict(entry.custom or {}) for path, entry in listed.items()}
    return facts, md.withdrawn_in(targets)


# -- looking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """One role in the status for people."""

    role: str
    version: int
    keys: tuple[str, ...]
    threshold: int
    issued_at: str
    expires_at: str
    alarm: str
    """Returns an empty text, `renew` after two thirds of its life, or `expired`."""


def status(root: bytes, parts: Mapping[str, bytes], now: datetime) -> list[RoleStatus]:
    """Returns keys, versions and expiry of every role with metadata; of the bins, only the one that expires first."""
    roles = md.roles_of(md.read_root(root).signed)
    if parts.get("targets"):
        roles[ASSIGN] = md.assign_keys_of(md.read_targets(parts["targets"]).signed)
    found = []
    for role in ("root", "targets", ASSIGN, "snapshot", "timestamp"):
        data = root if role == "root" else parts.get(role, b"")
        found.append(_role_status(role, data, roles.get(role, md.RoleKeys((), 0)), now))
    bins = [_role_status("bins", data, roles[ASSIGN], now) for role, data in parts.items() if is_bin(role)]
    return [*found, *sorted(bins, key=lambda row: row.expires_at)[:1]]


def _role_status(role: str, data: bytes, keys: md.RoleKeys, now: datetime) -> RoleStatus:
    names = tuple(key.keyid[:12] for key in keys.keys)
    if not data:
        return RoleStatus(role, 0, names, keys.threshold, "", "", "")
    issued, expires = md.dates_of(data)
    alarm = "expired" if now >= expires else "renew" if now - issued >= md.ALARM_SHARE * (expires - issued) else ""
    return RoleStatus(role, version_of(data), names, keys.threshold, issued.isoformat(), expires.isoformat(), alarm)
