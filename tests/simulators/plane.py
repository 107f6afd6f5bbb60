"""A control plane in this process, on a database and a folder of its own; no broker unless a test wants one."""

from pathlib import Path

from fastapi.testclient import TestClient

from control_plane.api.app import create_app
from control_plane.api.services import Services, open_services
from control_plane.config import BrokerConfig, ControlPlaneConfig, ServerConfig
from control_plane.database import migrate


def make_services(
    root: Path, *, database: str = "", port: int = 0, token_file: str = "", wait_s: float = 5.0
) -> Services:
    config = ControlPlaneConfig(
        data_dir=str(root),
        database=database,
        database_wait_s=wait_s,
        broker=BrokerConfig(enabled=bool(port), port=port or 1883),
        server=ServerConfig(token_file=token_file),
    )
    config.root.mkdir(parents=True, exist_ok=True)
    migrate(config.database_url)
    return open_services(config)


def make_client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url="http://127.0.0.1")
