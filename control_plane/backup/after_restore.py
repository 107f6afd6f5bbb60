"""What a restored database must not repeat: agents have seen more than it knows.

Between the backup and the loss the control plane went on signing, assigning and enrolling. Agents take no metadata
whose version falls, and no desired state whose generation does not grow. So everything that online keys sign is
signed again under versions above all that may have been given out, and new generations begin above them. What
runs stays as it is: nothing moves by itself, and rollouts that were under way wait for a person.

Versions and generations continue at the time of the restore in seconds since 1970. They grow by one with each signing
or assignment, less than once a second on average, so a number that was given out in an earlier life is always smaller,
also when one backup is restored twice.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session, col, delete, select, update

from control_plane.database.audit import audit
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.blobs import RetainedBlob
from control_plane.database.tables.identities import EnrolmentToken
from control_plane.database.tables.leases import Lease
from control_plane.database.tables.rollouts import Rollout, RolloutState
from control_plane.rollouts.records import act
from control_plane.trust.online_signer import OnlineSigner
from models.signed_set import version_of


@dataclass(frozen=True, slots=True)
class Succession:
    """What was changed, and what only people can know."""

    floor: int
    """Versions and generations go on above this number."""
    agents: int
    paused: tuple[int, ...]
    """Rollouts that wait for a person."""
    ended: tuple[int, ...]
    """Rollbacks that were under way: they move no more agents."""
    root_version: int
    """0 = nothing was ever signed."""
    targets_version: int
    """Agents that have seen newer targets refuse every change until those are pushed."""


def succeed(
    session: Session, signer: OnlineSigner, *, backup: str, made_at: str, actor: str, now: datetime
) -> Succession:
    """Changes a restored database so that agents follow it; the caller commits.

    Args:
        session: Writing.
        signer: With the restored online keys.
        backup: Digest of the backup.
        made_at: When it was made.
        actor: Who restores.
        now: Aware UTC.

    Raises:
        ConfigError: `keys.no_online_key`.
    """
    floor = int(now.timestamp())
    agents = session.exec(select(Agent)).all()
    for agent in agents:
        agent.generation_floor, agent.online = floor, False
        session.add(agent)
    session.exec(delete(RetainedBlob))  # the broker may have lost what it is thought to hold: it gets all of it again
    session.exec(delete(Lease))
    session.exec(
        update(EnrolmentToken)
        .where(col(EnrolmentToken.used_at).is_(None), col(EnrolmentToken.expires_at) > now)
        .values(expires_at=now)
    )
    reason = f"the control plane was restored from a backup of {made_at}"
    states = {RolloutState.RUNNING: "pause", RolloutState.SCHEDULED: "pause", RolloutState.ROLLING_BACK: "finish"}
    moved: dict[str, list[int]] = {"pause": [], "finish": []}
    for rollout in session.exec(select(Rollout).where(col(Rollout.state).in_(list(states)))).all():
        action = states[rollout.state]
        act(session, rollout.id or 0, action, actor=actor, reason=reason, now=now)
        moved[action].append(rollout.id or 0)
    signer.sign_above(session, floor, now)
    found = Succession(
        floor,
        len(agents),
        tuple(moved["pause"]),
        tuple(moved["finish"]),
        version_of(signer.part(session, "root")),
        version_of(signer.part(session, "targets")),
    )
    details = {"made_at": made_at, "floor": floor, "paused": found.paused, "ended": found.ended}
    audit(session, actor, "control-plane.restore", backup, details, now)
    return found
