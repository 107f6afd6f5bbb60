"""What the routes share: configuration, database, store, fleet. Made once per process, handed to the application."""

import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

from fastapi import Request
from sqlalchemy import Engine
from sqlmodel import col, select

from control_plane.config import ControlPlaneConfig
from control_plane.database import open_database, reading
from control_plane.fleet import FleetLink
from control_plane.identity.authority import INDEX, SITE, Authority
from control_plane.identity.enrolment import Enrolment
from control_plane.identity.mosquitto import update_profile
from control_plane.identity.publication import SiteFiles
from control_plane.monitoring import AgentStatus, agent_status
from control_plane.rollout_executor import RolloutExecutor
from control_plane.store import Store
from control_plane.tables import Agent, EventRow, Model, ModelVersion, WindowRow, utc_now
from control_plane.trust.assignments import Assignments
from control_plane.trust.ceremony import Folder
from control_plane.trust.renewal import Renewal
from models.bundle import PROFILE
from models.errors import SortlineError
from models.messages import Live, decode_packed
from models.windows import Profile, Window, parse_profile

_LIVE_S = 5.0
RECENT_S = 300.0
"""Windows of so many seconds make the figures of an agent."""


@dataclass(slots=True)
class Services:
    """Everything a request may need."""

    config: ControlPlaneConfig
    engine: Engine
    store: Store
    fleet: FleetLink
    rollouts: RolloutExecutor
    renewal: Renewal
    token: str = ""
    enrolment: Enrolment | None = None
    """None where the site has no certificate authority."""
    site_files: SiteFiles | None = None
    started_s: float = field(default_factory=time.monotonic)

    def statuses(self) -> list[AgentStatus]:
        """Every agent, with the figures of its recent windows."""
        now = utc_now()
        with reading(self.engine) as session:
            agents = session.exec(select(Agent).order_by(col(Agent.id))).all()
            rows = session.exec(
                select(WindowRow)
                .where(WindowRow.received_at > now - timedelta(seconds=RECENT_S), WindowRow.refused == "")
                .order_by(col(WindowRow.agent_id), col(WindowRow.received_at), col(WindowRow.seq))
            ).all()
            used = {str(agent.reported.get("active", "")) for agent in agents}
            registered = session.exec(
                select(ModelVersion.bundle, Model.name, ModelVersion.number)
                .join(Model, col(Model.id) == col(ModelVersion.model_id))
                .where(col(ModelVersion.bundle).in_(used))
            ).all()
            released = self.fleet.assignments.released_now(session)
            since = now - timedelta(seconds=RECENT_S)
            # Windows and events share one sequence: a gap in it is a record that is missing.
            numbers: list[tuple[str, str, int]] = []
            for query in (
                select(WindowRow.agent_id, WindowRow.boot_id, WindowRow.seq).where(col(WindowRow.received_at) > since),
                select(EventRow.agent_id, EventRow.boot_id, EventRow.seq).where(col(EventRow.received_at) > since),
            ):
                numbers.extend((agent_id, boot_id, seq) for agent_id, boot_id, seq in session.exec(query))
        by_agent: dict[str, list[WindowRow]] = {}
        for row in rows:
            by_agent.setdefault(row.agent_id, []).append(row)
        sequences: dict[str, list[tuple[str, int]]] = {}
        for agent_id, boot_id, seq in numbers:
            sequences.setdefault(agent_id, []).append((boot_id, seq))
        names = {bundle: f"{name}:{number}" for bundle, name, number in registered}
        return [self._status(a, by_agent.get(a.id, []), sequences.get(a.id, []), names, released) for a in agents]

    def _status(
        self,
        agent: Agent,
        rows: list[WindowRow],
        sequence: list[tuple[str, int]],
        names: dict[str, str],
        released: frozenset[str] | None,
    ) -> AgentStatus:
        active = str(agent.reported.get("active", ""))
        at_s, live = self.fleet.live.get(agent.id, (0.0, None))
        fresh: Live | None = live if live is not None and time.monotonic() - at_s < _LIVE_S else None
        return agent_status(
            agent_id=agent.id,
            labels=agent.labels,
            online=agent.online,
            seen_at=agent.seen_at,
            reported=agent.reported,
            reported_at=agent.reported_at,
            desired_bundle=agent.desired_bundle,
            generation=agent.generation,
            windows=[decode_packed(row.payload, Window) for row in rows],
            last_window_at=rows[-1].received_at if rows else None,
            sequence=sequence,
            profile=self.profile(active) if active else None,
            live=fresh,
            model=names.get(active, ""),
            released=released,
            now=utc_now(),
        )

    def profile(self, digest: str) -> Profile | None:
        """The reference profile of a stored bundle."""
        try:
            return _profile(self.store, digest)
        except SortlineError:
            return None


@lru_cache(maxsize=64)
def _profile(store: Store, digest: str) -> Profile:
    return parse_profile(store.part(digest, PROFILE))


def open_services(config: ControlPlaneConfig) -> Services:
    """Opens database, store, trust and fleet; connects nothing yet."""
    engine = open_database(config.database_url, wait_s=config.database_wait_s)
    store = Store(config.root / "store")
    assignments = Assignments(Folder(config.trust_folder))
    # Replicas are told apart by a random part: process ids repeat in containers.
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    enrolment, site_files = _open_identity(config, engine, assignments)
    certificates = config.certificates_folder if config.broker.tls else None
    fleet = FleetLink(
        config.broker,
        engine,
        store,
        assignments,
        client_id=f"control-plane-{name[-40:]}",
        certificates=certificates,
    )
    rollouts = RolloutExecutor(
        engine,
        fleet,
        name,
        period_s=config.rollouts.period_s,
        lease_s=config.rollouts.lease_s,
        seal=assignments.seal,
    )
    renewal = Renewal(engine, fleet, name)
    return Services(
        config, engine, store, fleet, rollouts, renewal, token=config.token, enrolment=enrolment, site_files=site_files
    )


def _open_identity(
    config: ControlPlaneConfig, engine: Engine, assignments: Assignments
) -> tuple[Enrolment | None, SiteFiles | None]:
    """Enrolment over the site's authority, where there is one; brings its files up to date."""
    if not (config.identity_folder / INDEX).exists():
        return None, None
    authority = Authority(config.identity_folder)

    def trust_root() -> str:
        """For a box that enrols: the anchor of what it believes later; empty where nothing is signed."""
        with reading(engine) as session:
            return assignments.part(session, "root").decode()

    enrolment = Enrolment(
        engine,
        authority,
        new_secret=lambda: secrets.token_urlsafe(24),
        broker=(config.identity.broker_host or config.broker.host, config.identity.broker_port or config.broker.port),
        trust_root=trust_root,
    )
    profile = config.identity.mosquitto_profile
    followers = (lambda: update_profile(authority.folder / SITE, Path(profile).resolve()),) if profile else ()
    site_files = SiteFiles(authority, enrolment.admitted, clock=utc_now, followers=followers)
    enrolment.publish = site_files.publish
    site_files.publish()
    return enrolment, site_files


def services_of(request: Request) -> Services:
    """For routes: the services of this application."""
    found: Services = request.app.state.services
    return found
