"""What the control plane signs itself: one assignment per agent, and that everything belongs together and is fresh.

Rules: an assignment and the version of the metadata that lists it are written in one transaction, so two replicas
never sign different things under one version (role and version are the key of the table); what is published is what
was committed, byte for byte; a bundle that the release key does not list is refused here already, although agents
would refuse it anyway; metadata from offline keys is verified before it is kept, like anybody would.
"""

from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import func
from sqlmodel import Session, col, delete, desc, select

from control_plane.tables import Agent, AssignmentRow, TrustMetadata
from control_plane.trust import metadata as md
from control_plane.trust.ceremony import Folder, RoleStatus, status
from models.errors import ConflictError
from models.messages import Desired, Mode, Swap, encode
from models.trust import ASSIGN, is_development, make_set, version_of

RESIGN_AFTER: Final = timedelta(hours=1)
"""Timestamp and snapshot are signed again so often, although they live seven days: a freeze shows within hours."""
NO_KEYS: Final = "no keys: nothing can be rolled out"
DEVELOPMENT: Final = "development keys: whoever reads this machine can release any model"
_KEPT_VERSIONS: Final = 5
_ONLINE: Final = (ASSIGN, "snapshot", "timestamp")


def desired_of(agent: Agent) -> Desired:
    """What an agent shall run, as it hears it."""
    return Desired(
        generation=agent.generation,
        bundle=agent.desired_bundle,
        rollout_id=str(agent.rollout_id or ""),
        trial_items=agent.trial_items,
        trial_s=agent.trial_s,
        mode=Mode(agent.mode),
        swap=Swap(agent.swap),
        swap_within_s=agent.swap_within_s,
    )


class Assignments:
    """The online half of trust.

    Args:
        folder: Public metadata as the ceremonies wrote it, and the online keys.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.kind = NO_KEYS
        """For people, without asking the database: real keys, development keys or none."""
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
            self.seal(session, now)

    def take_root(self, session: Session, data: bytes, now: datetime) -> None:
        """Keeps a new root.

        Raises:
            InputError: `trust.not_next`, `trust.not_enough_signatures`, `trust.no_metadata`.
        """
        root = md.check_next_root(data, self._latest(session, "root") or None)
        self._keep(session, "root", root.signed.version, data, now)
        self._see(data)

    def look(self, session: Session, now: datetime) -> None:
        """Finds out what people must be told: metadata that only offline keys can renew comes first."""
        late = [f"{row.role} {row.alarm}" for row in self.status(session, now) if row.alarm]
        root = self._latest(session, "root")
        if late:
            self.kind = f"signatures: {', '.join(late)} (sortline keys status)"
        elif root:
            self._see(root)

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
        """Whether agents would accept this bundle.

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
        """What the release key lists: bundle digest and what it says about it.

        Raises:
            ConflictError: `trust.not_initialised`.
        """
        targets = self._latest(session, "targets")
        if not targets:
            raise _not_initialised()
        listed = md.read_targets(targets).signed.targets
        return {path.removeprefix("bundles/"): dict(entry.custom or {}) for path, entry in listed.items()}

    def released_now(self, session: Session) -> frozenset[str] | None:
        """Digests of the released bundles; None where nothing is signed. Cheap: asked for every second."""
        targets = self._latest(session, "targets")
        return _digests_in(targets) if targets else None

    # -- what online keys sign --------------------------------------------------------------------------------

    def assign(self, session: Session, agent_id: str, desired: Desired, now: datetime) -> None:
        """Writes what an agent shall run; `seal` before the commit signs it together with all others.

        Whoever changes the agent's row need not call this: `seal` finds rows whose generation grew.

        Raises:
            ConflictError: `trust.not_released`, `trust.not_initialised`.
        """
        self.check_released(session, desired.bundle)
        row = session.get(AssignmentRow, agent_id) or AssignmentRow(agent_id=agent_id)
        row.generation, row.document, row.updated_at = desired.generation, encode(desired), now
        session.add(row)

    def seal(self, session: Session, now: datetime, *, force: bool = False) -> bool:
        """Signs the assignments, the snapshot and the timestamp when something changed or is getting old.

        In the caller's writing transaction; returns whether anything was signed. An agent whose generation grew gets
        its new assignment; one whose bundle is not released keeps the one it has.

        Raises:
            ConfigError: `keys.no_online_key`.
            TrustError: `trust.oversize`: too many agents for one document.
        """
        roots = self._roots(session, lock=True)
        targets = self._latest(session, "targets")
        if not roots or not targets:
            return False
        self._take_agents(session, now)
        root = md.read_root(roots[-1]).signed
        roles = md.roles_of(root) | {ASSIGN: md.assign_keys_of(md.read_targets(targets).signed)}
        parts = {role: self._latest(session, role) for role in _ONLINE} | {"targets": targets}
        wanted = {row.agent_id: row.document for row in session.exec(select(AssignmentRow))}
        fresh = {
            role: bool(parts[role])
            and not force
            and md.fresh_for(parts[role], roles[role], role, now, _age_limit(role))
            for role in _ONLINE
        }
        documents = md.new_assign(version_of(parts[ASSIGN]) + 1, wanted, now)
        if not fresh[ASSIGN] or md.read_targets(parts[ASSIGN]).signed.targets != documents.signed.targets:
            parts[ASSIGN] = md.sign(documents, [self._folder.online_signer(ASSIGN, roles[ASSIGN])])
            fresh["snapshot"] = False
        listed = md.meta_versions(parts["snapshot"]) if parts["snapshot"] else {}
        if not fresh["snapshot"] or listed != {r: version_of(parts[r]) for r in ("targets", ASSIGN)}:
            snapshot = md.new_snapshot(version_of(parts["snapshot"]) + 1, targets, parts[ASSIGN], now)
            parts["snapshot"] = md.sign(snapshot, [self._folder.online_signer("snapshot", roles["snapshot"])])
            fresh["timestamp"] = False
        if fresh["timestamp"]:
            return False
        timestamp = md.new_timestamp(version_of(parts["timestamp"]) + 1, parts["snapshot"], now)
        parts["timestamp"] = md.sign(timestamp, [self._folder.online_signer("timestamp", roles["timestamp"])])
        make_set(roots, parts)  # too large a set must fail here, not at the broker
        for role in _ONLINE:
            self._keep(session, role, version_of(parts[role]), parts[role], now)
        return True

    def _take_agents(self, session: Session, now: datetime) -> None:
        session.flush()
        released = self.released(session)
        query = (
            select(Agent)
            .outerjoin(AssignmentRow, col(AssignmentRow.agent_id) == col(Agent.id))
            .where(
                col(Agent.desired_bundle).in_(list(released)),
                func.coalesce(col(AssignmentRow.generation), -1) < col(Agent.generation),
            )
        )
        for agent in session.exec(query).all():
            self.assign(session, agent.id, desired_of(agent), now)
        idle = select(Agent.id).where(Agent.desired_bundle == "")
        session.exec(delete(AssignmentRow).where(col(AssignmentRow.agent_id).in_(idle)))
        session.flush()

    # -- what is published ------------------------------------------------------------------------------------

    def current_set(self, session: Session) -> bytes:
        """The retained set as it was committed; empty before the first signing."""
        parts = {role: self._latest(session, role) for role in (*_ONLINE, "targets")}
        if not all(parts.values()):
            return b""
        return make_set(self._roots(session), parts)

    def version(self, session: Session) -> int:
        """Of the newest timestamp: changes with every signing."""
        return version_of(self._latest(session, "timestamp"))

    def is_sealed(self, session: Session, agent: Agent) -> bool:
        """Whether what the agent's row says is what was signed last."""
        row = session.get(AssignmentRow, agent.id)
        return row is None if not agent.desired_bundle else row is not None and row.generation >= agent.generation

    def document(self, session: Session, agent_id: str) -> bytes:
        """An agent's assignment as it was signed; empty when it has none."""
        row = session.get(AssignmentRow, agent_id)
        return row.document if row else b""

    def status(self, session: Session, now: datetime) -> list[RoleStatus]:
        """Roles, keys, versions and expiry; empty before the first root."""
        root = self._latest(session, "root")
        parts = {role: self._latest(session, role) for role in (*_ONLINE, "targets")}
        return status(root, parts, now) if root else []

    def part(self, session: Session, role: str) -> bytes:
        """The newest metadata of a role; empty when there is none."""
        return self._latest(session, role)

    def development(self, session: Session) -> bool:
        """Whether the keys are development keys."""
        return is_development(self._latest(session, "root"))

    # -- rows -------------------------------------------------------------------------------------------------

    def _latest(self, session: Session, role: str) -> bytes:
        query = select(TrustMetadata).where(TrustMetadata.role == role).order_by(desc(TrustMetadata.version)).limit(1)
        row = session.exec(query).first()
        return row.data if row else b""

    def _roots(self, session: Session, *, lock: bool = False) -> list[bytes]:
        query = select(TrustMetadata).where(TrustMetadata.role == "root").order_by(col(TrustMetadata.version))
        if lock:
            # Two replicas that sign at the same time wait for each other here.
            query = query.with_for_update()
        return [row.data for row in session.exec(query)]

    def _keep(self, session: Session, role: str, version: int, data: bytes, now: datetime) -> None:
        if session.get(TrustMetadata, (role, version)) is None:
            session.add(TrustMetadata(role=role, version=version, data=data, created_at=now))
        if role in _ONLINE:
            old = (col(TrustMetadata.role) == role) & (col(TrustMetadata.version) <= version - _KEPT_VERSIONS)
            session.exec(delete(TrustMetadata).where(old))
        session.flush()


def _age_limit(role: str) -> timedelta:
    return RESIGN_AFTER if role in {"snapshot", "timestamp"} else md.LIFE[role] / 3


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
