"""Services start in any order: each waits for those it needs, logs that once, and goes on when they are there."""

import contextlib
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane.database.engine import open_database
from tests.simulators.postgres import empty, private_postgres
from tests.simulators.processes import free_port, running, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.postgresql]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
        stream.bind(str(tmp_path / "notify"))
        stream.settimeout(120.0)
        yield stream


def until(manager: socket.socket, beginning: bytes) -> bytes:
    while not (notice := manager.recv(1000)).startswith(beginning):
        pass
    return notice


@contextlib.contextmanager
def started(manager: socket.socket, tmp_path: Path, *command: str, **settings: object) -> Iterator[Path]:
    """A command of the product with these settings; gives its log."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SORTLINE")}
    environment |= {f"SORTLINE__{name}": str(value) for name, value in settings.items()}
    environment |= {"NOTIFY_SOCKET": manager.getsockname(), "SORTLINE__DATA_DIR": str(tmp_path / "data")}
    path = tmp_path / "log"
    with (
        path.open("w") as log,
        running([sys.executable, "-m", "control_plane", *command], env=environment, stderr=log, cwd=ROOT) as process,
    ):
        yield path
        assert process.poll() is None, path.read_text(encoding="utf-8")


def ready(port: int) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=20) as answer:
            return json.load(answer)["checks"]
    except urllib.error.HTTPError as answer:
        with answer:
            return json.load(answer)["checks"]


def test_the_control_plane_starts_before_its_database_and_its_broker(manager: socket.socket, tmp_path: Path) -> None:
    database, http, broker = free_port(), free_port(), free_port()
    settings = {
        "DATABASE": f"postgresql://sortline@127.0.0.1:{database}/postgres",
        "BROKER__PORT": broker,
        "JOBS__WORKERS": 0,
    }
    with started(manager, tmp_path, "serve", "--port", str(http), **settings) as log:
        assert until(manager, b"STATUS=").startswith(b"STATUS=waits for the database at 127.0.0.1")
        with contextlib.contextmanager(private_postgres)(tmp_path, database):
            assert until(manager, b"READY=1") == b"READY=1\nSTATUS="
            checks = ready(http)
            assert checks["database"] == "ok"
            assert checks["broker"] == "not connected"
            with running(
                [sys.executable, "-m", "control_plane.broker", "--anonymous", "--port", str(broker)], cwd=ROOT
            ):
                wait_until(lambda: ready(http)["broker"] == "ok", "the broker")
        text = log.read_text(encoding="utf-8")
        # A server that starts up gives other reasons than one that is away: each stands there once.
        waits = [line.partition("waits for the database")[2] for line in text.splitlines() if "waits for" in line]
        assert waits
        assert len(waits) == len(set(waits)), text


def closed(url: str, *, to_all: bool) -> None:
    """Lets the server end every connection to the database and refuse new ones, or take them again."""
    engine = open_database(url.replace("/postgres", "/template1"))
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE postgres ALLOW_CONNECTIONS {'false' if to_all else 'true'}")
        connection.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'")
    engine.dispose()


def test_a_worker_outlives_its_database(manager: socket.socket, tmp_path: Path, postgres: str) -> None:
    empty(postgres)
    with started(manager, tmp_path, "worker", DATABASE=postgres) as log:
        until(manager, b"READY=1")
        closed(postgres, to_all=True)
        try:
            wait_until(lambda: "the database is away" in log.read_text(encoding="utf-8"), "its word")
        finally:
            closed(postgres, to_all=False)
        wait_until(lambda: "the database is back" in log.read_text(encoding="utf-8"), "its return")
        assert "Traceback" not in log.read_text(encoding="utf-8")
