"""What the routes share: configuration, database, store, fleet. Made once per process, handed to the application."""

import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from sqlalchemy import Engine

from control_plane.config import ControlPlaneConfig
from control_plane.database.engine import open_database, reading
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.connection import FleetLink
from control_plane.identity.authority import INDEX, SITE, Authority
from control_plane.identity.enrolment import Enrolment
from control_plane.identity.mosquitto import update_profile
from control_plane.identity.publication import SiteFiles
from control_plane.monitoring.board import FleetBoard
from control_plane.registry.store import Store
from control_plane.rollouts.executor import RolloutExecutor
from control_plane.trust.ceremony import TrustFolder
from control_plane.trust.online_signer import OnlineSigner
from control_plane.trust.renewal import Renewal


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
    statuses: FleetBoard = field(init=False)

    def __post_init__(self) -> None:
        self.statuses = FleetBoard(self.engine, self.store, self.fleet)


def open_services(config: ControlPlaneConfig) -> Services:
    """Opens database, store, trust and fleet; connects nothing yet."""
    engine = open_database(config.database_url, wait_s=config.database_wait_s)
    store = Store(config.root / "store")
    assignments = OnlineSigner(TrustFolder(config.trust_folder))
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
        sign_changes=assignments.sign_changes,
    )
    renewal = Renewal(engine, assignments, fleet.publish_trust, fleet.counters, name)
    return Services(
        config, engine, store, fleet, rollouts, renewal, token=config.token, enrolment=enrolment, site_files=site_files
    )


def _open_identity(
    config: ControlPlaneConfig, engine: Engine, assignments: OnlineSigner
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
    if profile:
        # Also without news: an older version may have written the profile.
        update_profile(authority.folder / SITE, Path(profile).resolve())
    return enrolment, site_files


def services_of(request: Request) -> Services:
    """For routes: the services of this application."""
    found: Services = request.app.state.services
    return found
