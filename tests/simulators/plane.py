"""A control plane in this process, with its own database and folder, and a broker only where a test needs one."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fastapi.testclient import TestClient
from securesystemslib.signer import Signer

from control_plane.app import create_app
from control_plane.config import BrokerConfig, ControlPlaneConfig, IdentityConfig, ServerConfig
from control_plane.database.engine import writing
from control_plane.database.migrate import migrate
from control_plane.database.tables.columns import utc_now
from control_plane.services import Services, open_services
from control_plane.trust import ceremony
from control_plane.trust.ceremony import TrustFolder
from control_plane.trust.keys import load_key


def make_services(
    root: Path,
    *,
    database: str = "",
    port: int = 0,
    token_file: str = "",
    wait_s: float = 5.0,
    identity: Path | None = None,
    server: ServerConfig | None = None,
) -> Services:
    """Everything of a control plane; with the folder of an authority it speaks mutual TLS to its broker."""
    config = ControlPlaneConfig(
        data_dir=str(root),
        database=database,
        database_wait_s=wait_s,
        broker=BrokerConfig(enabled=bool(port), port=port or 1883, tls=identity is not None),
        identity=IdentityConfig(folder=str(identity or "")),
        server=server or ServerConfig(token_file=token_file),
    )
    if not database and not config.root.exists():
        shutil.copytree(_new_plane(), config.root)
        return open_services(config)
    config.root.mkdir(parents=True, exist_ok=True)
    return _first_start(config)


@cache
def _new_plane() -> Path:
    """Returns the folder of a control plane after its first start; every further one of this run is a copy."""
    folder = Path(tempfile.mkdtemp(prefix="sortline-plane-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _first_start(ControlPlaneConfig(data_dir=str(folder / "plane"))).engine.dispose()
    return folder / "plane"


def _first_start(config: ControlPlaneConfig) -> Services:
    config.root.mkdir(parents=True, exist_ok=True)
    migrate(config.database_url)
    keys = config.trust_folder / "development"
    if not keys.exists():
        ceremony.initialise(
            TrustFolder(config.trust_folder), [keys / "root-1.pem"], keys / "release.pem", None, utc_now()
        )
    services = open_services(config)
    with writing(services.engine) as session:
        services.signer.take_folder(session, utc_now())
        session.commit()
    return services


def release(services: Services, digest: str) -> str:
    """Releases a stored bundle with the development key."""
    manifest = services.store.manifest(digest)
    return _change_released(
        services, digest, lambda targets, root, key: ceremony.release(targets, root, manifest, key, utc_now())
    )


def withdraw(services: Services, digest: str) -> str:
    """Takes the release back."""
    return _change_released(
        services, digest, lambda targets, root, key: ceremony.withdraw(targets, root, digest, key, utc_now())
    )


def _change_released(services: Services, digest: str, change: Callable[[bytes, bytes, Signer], bytes]) -> str:
    folder = TrustFolder(services.config.trust_folder)
    key = load_key(folder.path / "development" / "release.pem", None)
    assignments = services.signer
    with writing(services.engine) as session:
        targets, root = (assignments.part(session, role) for role in ("targets", "root"))
        assignments.take_targets(session, change(targets, root, key), utc_now())
        session.commit()
    return digest


def make_client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url="http://127.0.0.1")
