"""The composition root: makes every part of the control plane once and hands each what it needs.

Routes, pages and the application get `Services`; nothing below this module imports it.
"""

import os
import secrets
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from fastapi import Request
from sqlalchemy import Engine

from control_plane.alarms.service import Alarms, open_alarms
from control_plane.config import ControlPlaneConfig
from control_plane.database.audit_check import AuditCheck
from control_plane.database.engine import open_database, reading
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.blobs import Publisher
from control_plane.fleet.connection import BrokerConnection
from control_plane.fleet.ingest import Ingest
from control_plane.fleet.intake import Intake, LiveFigures
from control_plane.fleet.outbox import Outbox
from control_plane.fleet.spooled import PictureShelf
from control_plane.guard import Tokens
from control_plane.identity.authority import INDEX, SITE, Authority
from control_plane.identity.enrolment import Enrolment
from control_plane.identity.mosquitto import update_profile
from control_plane.identity.publication import SiteFiles
from control_plane.monitoring.board import FleetBoard
from control_plane.monitoring.ledger import WindowLedger
from control_plane.monitoring.upkeep import Upkeep
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
    signer: OnlineSigner
    counters: Counter[str]
    """What happened on the fleet's side, by name; `/metrics` exports them."""
    live: LiveFigures
    intake: Intake
    connection: BrokerConnection
    blobs: Publisher
    outbox: Outbox
    ingest: Ingest
    board: FleetBoard
    rollouts: RolloutExecutor
    alarms: Alarms
    renewal: Renewal
    upkeep: Upkeep
    tokens: Tokens = field(default_factory=Tokens)
    stopping: Event = field(default_factory=Event)
    """Is set when the server stops: open streams end."""
    enrolment: Enrolment | None = None
    """None where the site has no certificate authority."""
    site_files: SiteFiles | None = None
    started_s: float = field(default_factory=time.monotonic)
    audit: AuditCheck = field(init=False)

    def __post_init__(self) -> None:
        self.audit = AuditCheck(self.engine)

    def start_fleet(self) -> None:
        """Connects to the broker and starts what takes in and gives out."""
        self.connection.start()
        self.ingest.start()
        self.outbox.start()
        self.blobs.start()

    def stop_fleet(self) -> None:
        """Ends it within some seconds."""
        self.blobs.stop()
        self.ingest.stop()
        self.outbox.stop()
        self.connection.stop()


def open_services(config: ControlPlaneConfig) -> Services:
    """Opens database, store, trust and fleet; connects nothing yet."""
    config.server.check()
    config.alarms.check()
    engine = open_database(config.database_url, wait_s=config.database_wait_s)
    store = Store(config.root / "store")
    signer = OnlineSigner(TrustFolder(config.trust_folder))
    # Replicas differ by a random part: process ids repeat in containers.
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    enrolment, site_files = _open_identity(config, engine, signer)
    certificates = config.certificates_folder if config.broker.tls else None
    counters: Counter[str] = Counter()
    live = LiveFigures(counters)
    intake = Intake(live, counters)
    connection = BrokerConnection(
        config.broker, intake.put, counters, client_id=f"control-plane-{name[-40:]}", certificates=certificates
    )
    blobs = Publisher(config.broker, engine, store, connection.bulk, counters)
    outbox = Outbox(engine, signer, blobs, connection, counters, follow_live=lambda: live.watched)
    rollouts = RolloutExecutor(
        engine,
        outbox,
        name,
        period_s=config.rollouts.period_s,
        lease_s=config.rollouts.lease_s,
        sign_changes=signer.sign_changes,
    )
    board = FleetBoard(engine, store, live, signer.released_now)
    return Services(
        config,
        engine,
        store,
        signer,
        counters,
        live,
        intake,
        connection,
        blobs,
        outbox,
        ingest=Ingest(
            engine, intake, outbox, blobs.requested, counters, WindowLedger(counters), PictureShelf(store.put, counters)
        ),
        board=board,
        rollouts=rollouts,
        alarms=open_alarms(config, engine, store, connection, counters, name, board.profile),
        renewal=Renewal(engine, signer, outbox.publish_trust, counters, name),
        upkeep=Upkeep(engine, config.retention, counters, name),
        tokens=Tokens(config.token, config.read_token),
        enrolment=enrolment,
        site_files=site_files,
    )


def _open_identity(
    config: ControlPlaneConfig, engine: Engine, signer: OnlineSigner
) -> tuple[Enrolment | None, SiteFiles | None]:
    """Enrolment over the site's authority, where there is one; brings its files up to date."""
    if not (config.identity_folder / INDEX).exists():
        return None, None
    authority = Authority(config.identity_folder)

    def trust_root() -> str:
        """For a box that enrols: the anchor of what it believes later; empty where nothing is signed."""
        with reading(engine) as session:
            return signer.part(session, "root").decode()

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
