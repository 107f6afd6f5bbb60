"""The identity of a client and what it may do.

Identities live in one JSON file with scrypt hashes (RFC 7914). The rules follow the wire contract: an agent
publishes and receives under its own name only and never uses a wildcard. Secrets are never logged.
"""

import base64
import hashlib
import hmac
import os
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from control_plane.broker.topics import has_wildcard
from models.errors import ConfigError
from models.files import write_atomically
from models.topics import bin_of, bin_topic

_ROOT = "sortline/v1"
AGENT_PUBLISHES = frozenset({"presence", "reported", "batch", "live", "request", "response"})
AGENT_RECEIVES = frozenset({"desired", "ack", "blob", "command"})
# 16 MiB and about 40 ms: enough for random 192-bit passwords, cheap enough for 200 agents that come back at once.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**14, 8, 1


class Action(StrEnum):
    """The actions of a client on a topic."""

    PUBLISH = "publish"
    WILL = "will"
    SUBSCRIBE = "subscribe"
    RECEIVE = "receive"


class Role(StrEnum):
    """The role of an identity, which selects its rules."""

    AGENT = "agent"
    CONTROL_PLANE = "control-plane"


class Identity(msgspec.Struct, frozen=True):
    """An authenticated client. Sessions belong to it, not to a connection."""

    name: str
    role: Role
    serial: str = ""
    """Serial number of its certificate; empty = it has none."""
    not_after_s: float = 0.0


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role
    salt: str
    password_scrypt: str


class _CredentialsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema_version: Literal[1] = 1
    identities: dict[Annotated[str, msgspec.Meta(min_length=1, max_length=64)], _Entry] = {}


def authorize(identity: Identity, action: Action, topic: str) -> bool:
    """Returns whether an identity may do this; no other place decides it.

    Args:
        identity: The identity of the client.
        action: The action.
        topic: A topic; for SUBSCRIBE a filter.
    """
    if identity.role is Role.CONTROL_PLANE:
        return topic.startswith("sortline/") or (topic.startswith("$SYS/") and action not in {"publish", "will"})
    own, _, channel = topic.rpartition("/")
    mine = own == f"{_ROOT}/agents/{identity.name}"
    if action in {Action.PUBLISH, Action.WILL}:
        return mine and channel in AGENT_PUBLISHES
    if has_wildcard(topic):
        return False
    if mine:
        return channel in AGENT_RECEIVES
    return topic in {f"{_ROOT}/tuf", bin_topic(bin_of(identity.name)), f"{_ROOT}/sentinel"} or (
        topic.startswith(f"{_ROOT}/blobs/") and topic.count("/") == 3
    )


def _hash(password: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, maxmem=64 * 1024 * 1024)


def add_identity(path: Path, name: str, role: Role) -> str:
    """Adds or renews an identity.

    Returns:
        The new password: 192 random bits; only its hash is stored.
    """
    return add_identities(path, {name: role})[name]


def add_identities(path: Path, wanted: dict[str, Role]) -> dict[str, str]:
    """Adds or renews several identities in one write; returns their passwords by name."""
    current = _read(path) if path.exists() else _CredentialsFile()
    entries, passwords = dict(current.identities), {}
    for name, role in wanted.items():
        salt, passwords[name] = os.urandom(16), secrets.token_urlsafe(24)
        hashed = base64.b64encode(_hash(passwords[name].encode(), salt)).decode()
        entries[name] = _Entry(role=role, salt=base64.b64encode(salt).decode(), password_scrypt=hashed)
    write_atomically(path, msgspec.json.encode(_CredentialsFile(identities=entries)), mode=0o600)
    return passwords


def remove_identity(path: Path, name: str) -> None:
    """Removes an identity; a running broker drops its connections at once."""
    current = _read(path)
    entries = {key: entry for key, entry in current.identities.items() if key != name}
    write_atomically(path, msgspec.json.encode(_CredentialsFile(identities=entries)), mode=0o600)


def _read(path: Path) -> _CredentialsFile:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_CredentialsFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            "broker.bad_credentials_file",
            f"{path} is no credentials file.",
            expected="JSON written by `sortline broker add`",
            got=str(error)[:200],
        ) from error


class Credentials:
    """The identities of a running broker; follows the file.

    Args:
        path: Credentials file; None admits everyone as control plane (tests on loopback only).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int] = (0, 0)
        self._entries: dict[str, _Entry] = {}
        self._pepper = os.urandom(32)
        self._verified: dict[str, bytes] = {}
        self.reload()

    def reload(self) -> bool:
        """Reads the file again when it changed; returns whether it did.

        Raises:
            ConfigError: The file is broken; the identities known so far stay.
        """
        if self._path is None:
            return False
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigError(
                "broker.bad_credentials_file", f"{self._path} cannot be read.", got=error.strerror
            ) from error
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp == self._stamp:
            return False
        entries = _read(self._path).identities
        self._verified = {k: v for k, v in self._verified.items() if entries.get(k) == self._entries.get(k)}
        self._entries, self._stamp = entries, stamp
        return True

    def known(self, identity: Identity) -> bool:
        """Returns whether the identity still exists."""
        return self._path is None or identity.name in self._entries

    def cached(self, username: str | None, password: bytes | None) -> Identity | None:
        """Returns the identity when the same password was verified before: without scrypt, so no thread is needed."""
        if self._path is None:
            return Identity(username or "anonymous", Role.CONTROL_PLANE)
        if username is None or password is None or username not in self._entries:
            return None
        fast = hmac.digest(self._pepper, password, "sha256")
        if hmac.compare_digest(self._verified.get(username, b""), fast):
            return Identity(username, self._entries[username].role)
        return None

    def verify(self, username: str | None, password: bytes | None) -> Identity | None:
        """Returns the identity, or None. It is slow on purpose: call it in a thread."""
        entry = self._entries.get(username or "")
        # An unknown name costs as much as a wrong password: names cannot be probed by time.
        salt = base64.b64decode(entry.salt) if entry else b"unknown-identity"
        given = _hash((password or b"")[:1024], salt)
        if entry is None or username is None or password is None:
            return None
        if not hmac.compare_digest(given, base64.b64decode(entry.password_scrypt)):
            return None
        self._verified[username] = hmac.digest(self._pepper, password, "sha256")
        return Identity(username, entry.role)
