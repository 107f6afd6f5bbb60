"""A whole installation's keys in a folder, and what a control plane signs: made by the real code."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tuf.api.metadata import Metadata

from control_plane.trust import ceremony
from control_plane.trust import metadata as md
from control_plane.trust.keys import Signer, load_key
from models.bundle import Chunk, FileEntry, Manifest, sha256
from models.messages import Desired, encode
from models.signed_set import ASSIGN, ROLES, make_set, version_of
from models.topics import bin_of
from models.trust import Outcome, verify

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PASSPHRASE = "correct horse battery"
MY_BIN, OTHER = bin_of("line-1"), "line-9"
"""The bin that lists line-1, and an agent of another bin."""


def manifest(name: str = "apples", content: bytes = b"model") -> Manifest:
    digest = sha256(content)
    return Manifest(
        name=name, files=(FileEntry(path="card.md", size_bytes=5, sha256=digest, chunks=(Chunk(digest, 5),)),)
    )


@dataclass(frozen=True)
class Signed:
    """The signed parts that travel: the set for all agents, and the bins by name."""

    set: bytes
    bins: dict[str, bytes] = field(default_factory=dict)

    def bin(self, agent_id: str = "line-1") -> bytes:
        """Returns the bin of this agent; empty when there is none."""
        return self.bins.get(bin_of(agent_id), b"")


@dataclass
class Repository:
    """Signs any metadata with any keys in any order.

    Args:
        root: Folder of keys and metadata.
    """

    root: Path
    now: datetime = NOW
    assignments: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = ceremony.TrustFolder(self.root / "trust")
        media = [self.root / f"usb-{n}" / f"root-{n}.pem" for n in (1, 2, 3)]
        self.root_paths, self.release_path = media, self.root / "usb-release" / "release.pem"
        self.anchor = ceremony.initialise(self.folder, media, self.release_path, lambda _path: PASSPHRASE, self.now)
        self.parts["targets"] = self.folder.targets

    def keys(self, *numbers: int) -> list[Signer]:
        return [load_key(self.root_paths[n - 1], PASSPHRASE) for n in numbers]

    @property
    def release_key(self) -> Signer:
        return load_key(self.release_path, PASSPHRASE)

    def release(self, content: bytes = b"model", *, signer: Signer | None = None) -> str:
        """Releases a bundle; returns its digest."""
        return self.release_manifest(manifest(content=content), signer=signer)

    def release_manifest(self, found: Manifest, *, signer: Signer | None = None) -> str:
        """Releases a real bundle; returns its digest."""
        key = signer or self.release_key
        self.parts["targets"] = ceremony.release(self.parts["targets"], self.folder.root, found, key, self.now)
        self.folder.write("targets.json", self.parts["targets"])
        return sha256(found.encoded())

    def assign(self, agent_id: str, bundle: str, generation: int = 1, **changes: object) -> bytes:
        document = encode(Desired(generation=generation, bundle=bundle, **changes))  # type: ignore[arg-type]
        self.assignments[agent_id] = document
        return document

    def online(self, role: str) -> Signer:
        roles = md.roles_of(md.read_root(self.folder.root).signed)
        roles[ASSIGN] = md.assign_keys_of(md.read_targets(self.folder.targets).signed)
        return self.folder.online_signer(role, roles[role])

    def sign_changes(self) -> Signed:
        """Signs assign, bins, snapshot and timestamp."""
        keys = md.assign_keys_of(md.read_targets(self.folder.targets).signed)
        self.parts[ASSIGN] = md.sign(md.new_assign(self._next(ASSIGN), keys, self.now), [self.online(ASSIGN)])
        for name in {bin_of(agent) for agent in self.assignments} | {part for part in self.parts if part not in ROLES}:
            here = {agent: data for agent, data in self.assignments.items() if bin_of(agent) == name}
            self.parts[name] = md.sign(md.new_bin(self._next(name), here, self.now), [self.online(ASSIGN)])
        return self.bind()

    def bind(self) -> Signed:
        """Signs what belongs together: snapshot and timestamp."""
        parts = {role: data for role, data in self.parts.items() if role not in {"snapshot", "timestamp"}}
        snapshot = md.new_snapshot(self._next("snapshot"), parts, self.now)
        self.parts["snapshot"] = md.sign(snapshot, [self.online("snapshot")])
        return self.stamp()

    def stamp(self) -> Signed:
        """Signs a new timestamp only."""
        timestamp = md.new_timestamp(self._next("timestamp"), self.parts["snapshot"], self.now)
        self.parts["timestamp"] = md.sign(timestamp, [self.online("timestamp")])
        return self.set()

    def _next(self, role: str) -> int:
        return version_of(self.parts.get(role, b"")) + 1

    def set(self, **changed: bytes) -> Signed:
        """Returns the current parts, with some of them replaced."""
        parts = self.parts | changed
        bins = {name: data for name, data in parts.items() if name not in ROLES}
        return Signed(make_set(self.folder.roots(), {role: parts[role] for role in ROLES}), bins)

    def later(self, **span: float) -> None:
        self.now += timedelta(**span)


@dataclass
class Device:
    """An agent's memory of what it trusts."""

    anchor: bytes
    scratch: Path
    agent_id: str = "line-1"
    trusted: bytes = b""
    runs: int = 0

    def verify(self, offered: Signed, document: bytes | None, now: datetime = NOW) -> Outcome:
        self.runs += 1
        outcome = verify(
            offered.set,
            offered.bin(self.agent_id),
            document,
            agent_id=self.agent_id,
            anchor=self.anchor,
            trusted=self.trusted,
            now=now,
            scratch=self.scratch / str(self.runs),
        )
        self.trusted = outcome.trusted
        return outcome


def resigned(data: bytes, signers: list[Signer], **changes: object) -> bytes:
    """The same metadata with some fields changed, signed by these keys."""
    metadata = Metadata.from_bytes(data)
    for name, value in changes.items():
        setattr(metadata.signed, name, value)
    metadata.signatures.clear()
    return md.sign(metadata, signers)


def code(outcome: Outcome) -> str:
    """Returns the code of a refusal; fails where something was accepted."""
    assert outcome.assignment is None
    return outcome.error.code if outcome.error else ""


def assigned(repository: Repository, generation: int = 1, content: bytes = b"model") -> tuple[Signed, bytes]:
    """Releases a bundle and assigns it to line-1; returns the signed parts and the assignment document."""
    document = repository.assign("line-1", repository.release(content), generation)
    return repository.sign_changes(), document


def parse_desired(document: bytes) -> str:
    """Returns the digest of the bundle that an assignment names."""
    return str(json.loads(document)["bundle"])
