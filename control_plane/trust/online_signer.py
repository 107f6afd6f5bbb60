"""Metadata that the control plane signs itself: one assignment per agent, and snapshot and timestamp of the whole.

Rules: an assignment and the version of the bin that lists it are written in one transaction, so two replicas
never sign different things under one version (role and version are the key of the table); what is published is what
was committed, byte for byte; a bundle that the release key does not list is refused here already, although agents
would refuse it anyway; metadata from offline keys is verified before it is kept, as an agent would.
"""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import and_, func, or_, tuple_
from sqlmodel import Session, col, delete, desc, select

from control_plane.database.tables.agents import Agent
from control_plane.database.tables.trust import AssignmentRow, TrustMetadata
from control_plane.trust import metadata as md
from control_plane.trust.ceremony import RoleStatus, TrustFolder, status
from control_plane.trust.signing import FULL_SHARE, ONLINE, fill, is_bin, sign_changes
from models.errors import ConflictError
from models.messages import Desired, Mode, SafeState, Swap, encode
from models.signed_set import is_development, make_set, version_of
from models.topics import TRUST_TOPIC, bin_of, bin_topic

NO_KEYS: Final = "no keys: nothing can be rolled out"
DEVELOPMENT: Final = "development keys: anyone who can read this machine can release any model"
_KEPT_VERSIONS: Final = 5
_COMMON: Final = (*ONLINE, "targets")
"""The roles that all agents get, beside the roots."""


def desired_of(agent: Agent) -> Desired:
    """Returns an agent's desired state as the message it gets; an empty bundle is a recall."""
    return Desired(
        generation=agent.generation,
        bundle=agent.desired_bundle,
        safe_state=SafeState("" if agent.desired_bundle else agent.safe_state),
        rollout_id=str(agent.rollout_id or ""),
        trial_items=agent.trial_items,
        trial_s=agent.trial_s,
        mode=Mode(agent.mode) if agent.desired_bundle else Mode.LIVE,
        swap=Swap(agent.swap),
        swap_within_s=agent.swap_within_s,
    )


class OnlineSigner:
    """The online half of trust.

    Args:
        folder: Public metadata as the ceremonies wrote it, and the online keys.
    """

    def __init__(self, folder: TrustFolder) -> None:
        self._folder = folder
        self.kind = NO_KEYS
        """The kind of keys (real, development or none) for people, without a query."""
        self.fill: dict[str, float] = {}
        """The shares of `signing.fill` at the last check."""
        roots = folder.roots()
        if roots:
            self._see(roots[-1])

    # -- what offline keys signed -----------------------------------------------------------------------------

    def take_folder(self, session: Session, now: datetime) -> None:
        """Takes in what the ceremonies left in the folder, and signs; does nothing while there is nothing.

        Raises:
            InputError: See `take_root` and `take_targets`.
        """
        roots, targets = self._folder.roots(), self._folder.targets
        known = self._latest(session, "root")
        for root in roots:
            if version_of(root) > version_of(known):
                self.take_root(session, root, now)
                known = root
        if targets and version_of(targets) > version_of(self._latest(session, "targets")):
            self.take_targets(session, targets, now)
        if known:
            self._see(known)
            self.sign_changes(session, now)

    def take_root(self, session: Session, data: bytes, now: datetime) -> None:
        """Keeps a new root.

        Raises:
            InputError: `trust.not_next`, `trust.not_enough_signatures`, `trust.no_metadata`.
        """
        root = md.check_next_root(data, self._latest(session, "root") or None)
        self._keep(session, "root", root.signed.version, data, now)
        self._see(data)

    def look(self, session: Session, now: datetime) -> None:
        """Finds out what needs a person's attention: metadata that only offline keys can renew comes first."""
        parts = self._newest(session)
        if "root" not in parts:
            return
        late = [f"{row.role} {row.alarm}" for row in status(parts["root"], parts, now) if row.alarm]
        self.fill = fill(self.current_set(session), parts)
        late += [f"{part} {share:.0%} full" for part, share in self.fill.items() if share >= FULL_SHARE]
        self._see(parts["root"])
        if late:
            self.kind = f"signatures: {', '.join(late)} (sortline keys status)"

    def _see(self, root: bytes) -> None:
        self.kind = DEVELOPMENT if is_development(root) else "ok"

    def take_targets(self, session: Session, data: bytes, now: datetime) -> None:
        """Keeps new targets: what is released from now on.

        Raises:
            InputError: `trust.not_next`, `trust.not_enough_signatures`, `trust.no_metadata`.
        """
        root = self._latest(session, "root")
        if not root:
            raise _not_initialised()
        targets = md.check_next_targets(data, self._latest(session, "targets") or None, root)
        self._keep(session, "targets", targets.signed.version, data, now)

    def check_released(self, session: Session, bundle: str) -> None:
        """Checks that agents would accept this bundle.

        Raises:
            ConflictError: `trust.not_released`, `trust.not_initialised`.
        """
        if bundle not in self.released(session):
            raise ConflictError(
                "trust.not_released",
                "No release key has signed this bundle; release it first: sortline models release.",
                expected="a released bundle",
                got=bundle,
            )

    def released(self, session: Session) -> dict[str, dict[str, Any]]:
        """Returns the released bundles: digest and the facts that the release key signed.

        Raises:
            ConflictError: `trust.not_initialised`.
        """
        targets = self._latest(session, "targets")
        if not targets:
            raise _not_initialised()
        listed = md.read_targets(targets).signed.targets
        return {path.removeprefix("bundles/"): dict(entry.custom or {}) for path, entry in listed.items()}

    def withdrawn(self, session: Session) -> list[str]:
        """Returns the digests that were released once and are not any more, oldest first."""
        targets = self._latest(session, "targets")
        return md.withdrawn_in(targets) if targets else []

    def releases(self, session: Session) -> dict[str, str]:
        """Returns `released` or `withdrawn` by digest; a bundle that was never released is not in it."""
        withdrawn = dict.fromkeys(self.withdrawn(session), "withdrawn")
        return withdrawn | dict.fromkeys(self.released_now(session) or (), "released")

    def released_now(self, session: Session) -> frozenset[str] | None:
        """Returns the digests of the released bundles; None where nothing is signed. Cheap enough for every second."""
        return released_digests(session)

    # -- what online keys sign --------------------------------------------------------------------------------

    def assign(self, session: Session, agent_id: str, desired: Desired, now: datetime) -> None:
        """Writes what an agent shall run; `sign_changes` before the commit signs it together with all others.

        A caller that changes the agent's row need not call this: `sign_changes` finds rows whose generation grew.

        Raises:
            ConflictError: `trust.not_released`, `trust.not_initialised`.
        """
        if desired.bundle:
            self.check_released(session, desired.bundle)
        _write(session, session.get(AssignmentRow, agent_id), agent_id, desired, now)

    def sign_above(self, session: Session, version: int, now: datetime) -> bool:
        """Signs everything that online keys sign again, under versions above this one.

        For a database that has gone back in time: agents that have seen newer metadata than it holds follow again.
        Returns whether there was anything to sign.

        Raises:
            ConfigError: `keys.no_online_key`.
            TrustError: `trust.oversize`.
        """
        return self.sign_changes(session, now, force=True, above=version)

    def sign_changes(self, session: Session, now: datetime, *, force: bool = False, above: int = 0) -> bool:
        """Signs what has changed or is getting old: see `control_plane.trust.signing`.

        In the caller's writing transaction; returns whether anything was signed. An agent whose generation grew gets
        its new assignment; one whose bundle is not released keeps the one it has.

        Raises:
            ConfigError: `keys.no_online_key`.
            TrustError: `trust.oversize`: too many agents for one bin, or bundles for the set.
        """
        roots = self._roots(session, lock=True)
        parts = self._newest(session)
        if not roots or "targets" not in parts:
            return False
        self._take_agents(session, now)
        documents = dict(session.exec(select(AssignmentRow.agent_id, AssignmentRow.document)).all())
        new = sign_changes(parts, documents, self._folder.online_signer, now, force=force, above=above)
        if not new:
            return False
        signed = parts | new
        make_set(roots, {role: signed[role] for role in _COMMON})  # too large a set must fail here, not at the broker
        for role, data in new.items():
            self._keep(session, role, version_of(data), data, now)
        return True

    def _take_agents(self, session: Session, now: datetime) -> None:
        session.flush()
        query = (
            select(Agent, AssignmentRow)
            .outerjoin(AssignmentRow, col(AssignmentRow.agent_id) == col(Agent.id))
            .where(
                or_(
                    col(Agent.desired_bundle).in_(list(self.released(session))),
                    and_(col(Agent.desired_bundle) == "", col(Agent.generation) > 0),
                ),
                func.coalesce(col(AssignmentRow.generation), -1) < col(Agent.generation),
            )
        )
        for agent, row in session.exec(query).all():
            _write(session, row, agent.id, desired_of(agent), now)
        session.flush()

    # -- what is published ------------------------------------------------------------------------------------

    def current_set(self, session: Session) -> bytes:
        """Returns the committed set for all agents; empty before the first signing."""
        return self._set(session, self._versions(session))

    def _set(self, session: Session, versions: Mapping[str, int]) -> bytes:
        if not versions.keys() >= set(_COMMON):
            return b""
        return make_set(self._roots(session), self._load(session, {role: versions[role] for role in _COMMON}))

    def bin(self, session: Session, agent_id: str) -> bytes:
        """Returns the bin that lists an agent, as it was signed; empty when there is none."""
        return self._latest(session, bin_of(agent_id))

    def news(self, session: Session, known: Mapping[str, int]) -> list[tuple[str, int, bytes]]:
        """Returns topic, version and payload of documents newer than the known ones by topic: bins first, then the set.

        An agent that gets only the bins can still use what it trusts already.
        """
        versions = self._versions(session)
        stale = {r: v for r, v in versions.items() if is_bin(r) and known.get(bin_topic(r)) != v}
        found = [(bin_topic(role), stale[role], data) for role, data in self._load(session, stale).items()]
        version = versions.get("timestamp", 0)
        if known.get(TRUST_TOPIC, 0) != version and (data := self._set(session, versions)):
            found.append((TRUST_TOPIC, version, data))
        return found

    def is_sealed(self, session: Session, agent: Agent) -> bool:
        """Returns whether the agent's desired state is what was signed last for it."""
        row = session.get(AssignmentRow, agent.id)
        return row is None if not agent.generation else row is not None and row.generation >= agent.generation

    def document(self, session: Session, agent_id: str) -> bytes:
        """Returns an agent's assignment as it was signed; empty when it has none."""
        row = session.get(AssignmentRow, agent_id)
        return row.document if row else b""

    def status(self, session: Session, now: datetime) -> list[RoleStatus]:
        """Roles, keys, versions and expiry; empty before the first root."""
        parts = self._newest(session)
        return status(parts["root"], parts, now) if "root" in parts else []

    def part(self, session: Session, role: str) -> bytes:
        """Returns the newest metadata of a role; empty when there is none."""
        return self._latest(session, role)

    def development(self, session: Session) -> bool:
        """Returns whether the keys are development keys."""
        return is_development(self._latest(session, "root"))

    # -- rows -------------------------------------------------------------------------------------------------

    def _latest(self, session: Session, role: str) -> bytes:
        return _newest_of(session, role)

    def _versions(self, session: Session) -> dict[str, int]:
        query = select(TrustMetadata.role, func.max(TrustMetadata.version)).group_by(col(TrustMetadata.role))
        return dict(session.exec(query).all())

    def _load(self, session: Session, versions: Mapping[str, int]) -> dict[str, bytes]:
        """Returns exactly these versions, so that the parts match whatever another replica signs meanwhile."""
        key = tuple_(col(TrustMetadata.role), col(TrustMetadata.version))
        query = select(TrustMetadata.role, TrustMetadata.data).where(key.in_(list(versions.items())))
        return dict(session.exec(query).all()) if versions else {}

    def _newest(self, session: Session) -> dict[str, bytes]:
        """Returns the newest metadata of every role and bin."""
        return self._load(session, self._versions(session))

    def _roots(self, session: Session, *, lock: bool = False) -> list[bytes]:
        query = select(TrustMetadata).where(TrustMetadata.role == "root").order_by(col(TrustMetadata.version))
        if lock:
            # Two replicas that sign at the same time wait for each other here.
            query = query.with_for_update()
        return [row.data for row in session.exec(query)]

    def _keep(self, session: Session, role: str, version: int, data: bytes, now: datetime) -> None:
        if session.get(TrustMetadata, (role, version)) is None:
            session.add(TrustMetadata(role=role, version=version, data=data, created_at=now))
        if role in ONLINE or is_bin(role):
            old = (col(TrustMetadata.role) == role) & (col(TrustMetadata.version) <= version - _KEPT_VERSIONS)
            session.exec(delete(TrustMetadata).where(old))
        session.flush()


def released_digests(session: Session) -> frozenset[str] | None:
    """Returns the digests of the bundles that the release key lists; None where nothing is signed."""
    targets = _newest_of(session, "targets")
    return _digests_in(targets) if targets else None


def _newest_of(session: Session, role: str) -> bytes:
    query = select(TrustMetadata.data).where(TrustMetadata.role == role).order_by(desc(TrustMetadata.version)).limit(1)
    return session.exec(query).first() or b""


def _write(session: Session, row: AssignmentRow | None, agent_id: str, desired: Desired, now: datetime) -> None:
    row = row or AssignmentRow(agent_id=agent_id)
    row.generation, row.document, row.updated_at = desired.generation, encode(desired), now
    session.add(row)


@lru_cache(maxsize=4)
def _digests_in(targets: bytes) -> frozenset[str]:
    return frozenset(path.removeprefix("bundles/") for path in md.read_targets(targets).signed.targets)


def _not_initialised() -> ConflictError:
    return ConflictError(
        "trust.not_initialised",
        "This control plane has no signing keys; make them with `sortline keys init`.",
        expected="root and targets metadata",
        got="nothing",
    )
