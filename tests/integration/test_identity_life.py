"""An agent's identity from its token to its revocation, with the commands and processes of a plant."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from control_plane.client import Client
from models.errors import SortlineError
from tests.simulators.processes import free_port, running, wait_until

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def broker(data: Path, port: int) -> Iterator[None]:
    ready = data / "ready.json"
    ready.unlink(missing_ok=True)
    site = str(data / "identity" / "site")
    command = [sys.executable, "-m", "control_plane.broker", "--site", site, "--port", str(port)]
    with running([*command, "--ready-file", str(ready)], cwd=ROOT, stdout=subprocess.DEVNULL):
        wait_until(ready.exists, "the broker")
        yield


def asked(call: Any) -> Any:
    try:
        return call()
    except SortlineError:
        return None


@pytest.mark.slow
def test_a_rotation_loses_no_record_and_a_revocation_ends_it(tmp_path: Path) -> None:
    data, state = tmp_path / "plane", tmp_path / "box"
    mqtt, http, https = free_port(), free_port(), free_port()
    run("control_plane", "ca", "init", "--data-dir", str(data), "--json")
    environment = os.environ | {
        "SORTLINE__DATA_DIR": str(data),
        "SORTLINE__SERVER__PORT": str(http),
        "SORTLINE__IDENTITY__PORT": str(https),
        "SORTLINE__BROKER__PORT": str(mqtt),
        "SORTLINE__BROKER__TLS": "true",
        "SORTLINE__JOBS__WORKERS": "0",
        "SORTLINE_AGENT__STATE_DIR": str(state),
        "SORTLINE_AGENT__IDENTITY__CHECK_S": "1",
        "SORTLINE_AGENT__LINE__WINDOW_S": "1",
        "SORTLINE_AGENT__BROKER__RECONNECT_MAX_S": "1.5",
    }
    client = Client(f"http://127.0.0.1:{http}")

    def windows() -> list[dict[str, Any]]:
        return asked(lambda: client.get("/api/v1/agents/line-1/windows?limit=1000")) or []

    def whole() -> bool:
        """Returns whether every number from the first to the newest has arrived."""
        events = client.get("/api/v1/agents/line-1/events?limit=1000")
        seqs = sorted(row["seq"] for row in [*windows(), *events])
        return seqs == list(range(len(seqs)))

    def online() -> bool:
        found = asked(lambda: client.get("/api/v1/agents/line-1"))
        return bool(found) and found["connection"] != "offline"

    def more(what: str) -> None:
        seen = len(windows())
        wait_until(lambda: len(windows()) >= seen + 2, what)

    pair = state / "identity" / "identity.pem"
    with ExitStack() as stack:
        stack.callback(client._http.close)
        lives = ExitStack()
        lives.enter_context(broker(data, mqtt))
        serve = [sys.executable, "-m", "control_plane", "serve"]
        stack.enter_context(running(serve, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL))
        wait_until(lambda: asked(lambda: client.get("/readyz")), "the server")
        token = client.post("/api/v1/agents/line-1/enrolment", {"actor": "test"})["token"]
        where = ("--control-plane", f"https://127.0.0.1:{https}", "--state-dir", str(state))
        run("edge_agent", "enrol", "--token", "-", *where, text=token)
        command = [sys.executable, "-m", "edge_agent", "run", "--camera", "simulated", "--items-per-s", "2"]
        agent = stack.enter_context(running(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL))
        wait_until(lambda: len(windows()) >= 2, "the first windows")

        before = pair.read_bytes()
        run("control_plane", "ca", "rotate", "--data-dir", str(data), "--json")
        wait_until(lambda: pair.read_bytes() != before, "the renewal")
        more("windows after the rotation")
        lives.close()
        lives = stack.enter_context(ExitStack())
        lives.enter_context(broker(data, mqtt))  # everybody connects again, with the new certificates
        more("windows over the new certificates")
        run("control_plane", "ca", "retire", "--data-dir", str(data), "--json")
        more("windows without the old root")

        # Fresh records go ahead of those that waited: a hole closes a moment later, or a record is lost.
        wait_until(whole, "the last missing record")
        states = json.loads(run("control_plane", "agents", "list", "--server", client.url, "--json"))
        assert states[0]["identity"]["state"] == "enrolled"

        client.post("/api/v1/agents/line-1/revoke", {"reason": "stolen", "actor": "test"})
        revoked = time.monotonic()
        wait_until(lambda: not online(), "the silence")
        silent = time.monotonic() - revoked
        seen = len(windows())
        wait_until(lambda: time.monotonic() - revoked > 5.0, "a few more windows' time")
        assert len(windows()) == seen, "nothing is taken in any more"
        assert agent.poll() is None, "its line goes on"
        sys.stdout.write(f"silent {silent:.1f} s after the revocation\n")
