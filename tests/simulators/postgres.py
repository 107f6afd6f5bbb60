"""A private PostgreSQL server for tests."""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from control_plane.database.engine import open_database
from tests.simulators.processes import free_port, wait_until


def private_postgres(root: Path, port: int = 0) -> Iterator[str]:
    """A private PostgreSQL server (0: any free port); it refuses to run as root, so another user starts it there."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("the PostgreSQL server programs are not installed")
    bin_, port, folder = programs[-1].parent, port or free_port(), root / "pg"
    user: list[str] = []
    if os.geteuid() == 0:
        name = "postgres" if "postgres" in {p.pw_name for p in pwd.getpwall()} else "nobody"
        user = ["setpriv", f"--reuid={name}", f"--regid={pwd.getpwnam(name).pw_gid}", "--clear-groups"]
        folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/sortline-pg-XXXXXX"], text=True).strip())
        shutil.chown(folder, name)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True, "cwd": "/"}
    subprocess.run(  # noqa: PLW1510  in `quiet`
        [*user, str(bin_ / "initdb"), "-D", f"{folder}/d", "-U", "sortline", "-A", "trust"], **quiet
    )
    server = subprocess.Popen(
        [*user, str(bin_ / "postgres"), "-D", f"{folder}/d", "-p", str(port), "-k", str(folder), "-c", "fsync=off"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    url = f"postgresql://sortline@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        engine = open_database(url)
        try:
            with engine.connect():
                return True
        except OperationalError:
            return False
        finally:
            engine.dispose()

    try:
        wait_until(answers, "PostgreSQL")
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # the fast shutdown: a plain SIGTERM waits for clients that keep a pool
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def empty(url: str) -> None:
    """Throws every table away."""
    engine = open_database(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
