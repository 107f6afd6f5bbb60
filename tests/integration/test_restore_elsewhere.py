"""The machine of the control plane is gone with everything on it; a backup goes on elsewhere and the agents follow.

Real processes: control plane, broker with mutual TLS, an enrolled agent, keys that were never on the machine.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from control_plane.client import Client
from models.errors import SortlineError
from tests.simulators.postgres import empty
from tests.simulators.processes import free_port, running, wait_until
from tests.simulators.tiny_bundle import tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@dataclass
class Plant:
    """One site: the addresses and the media in the safe stay, the machine's folder comes and goes."""

    root: Path
    database: str
    mqtt: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)
    https: int = field(default_factory=free_port)

    @property
    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.http}")

    def environment(self, data: Path) -> dict[str, str]:
        return os.environ | {
            "SORTLINE__DATA_DIR": str(data),
            "SORTLINE__DATABASE": self.database,
            "SORTLINE__SERVER__PORT": str(self.http),
            "SORTLINE__IDENTITY__PORT": str(self.https),
            "SORTLINE__BROKER__PORT": str(self.mqtt),
            "SORTLINE__BROKER__TLS": "true",
            "SORTLINE__JOBS__WORKERS": "0",
            "SORTLINE_URL": f"http://127.0.0.1:{self.http}",
            "SORTLINE_KEY_PASSPHRASE": "a passphrase in a test",
            "SORTLINE_AGENT__LINE__WINDOW_S": "1",
            "SORTLINE_AGENT__BROKER__RECONNECT_MAX_S": "1.5",
        }

    def run(self, data: Path, *arguments: str, program: str = "control_plane", text: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", program, *arguments],
            cwd=ROOT,
            env=self.environment(data),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @contextmanager
    def machine(self, data: Path) -> Iterator[list[subprocess.Popen]]:
        """Broker and control plane on one machine; its processes are killed, not asked to end."""
        ready, site = self.root / f"{data.name}.json", str(data / "identity" / "site")
        command = [sys.executable, "-m", "control_plane.broker", "--site", site, "--port", str(self.mqtt)]
        serve = [sys.executable, "-m", "control_plane", "serve"]
        with ExitStack() as stack:
            log = stack.enter_context((self.root / f"{data.name}.log").open("ab"))
            options: dict[str, Any] = {"cwd": ROOT, "env": self.environment(data), "stderr": log, "stdout": log}
            broker = stack.enter_context(running([*command, "--ready-file", str(ready)], **options))
            plane = stack.enter_context(running(serve, **options))
            wait_until(lambda: self.answered(lambda: self.client.get("/readyz")["ready"]), "the control plane")
            yield [broker, plane]

    @staticmethod
    def answered(call: Any) -> Any:
        try:
            return call()
        except SortlineError:
            return None

    def agent(self) -> dict[str, Any]:
        return self.answered(lambda: self.client.get("/api/v1/agents/line-1")) or {}

    def runs(self, digest: str) -> bool:
        found = self.agent()
        return found.get("active") == digest and found["phase"] == "committed" and found["connection"] == "live"

    def roll_out(self, reference: str) -> int:
        body = {"model": reference, "waves": ["100%"], "trial_items": 10, "actor": "t"}
        return int(self.client.post("/api/v1/rollouts", body)["id"])


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def plant(request: pytest.FixtureRequest, tmp_path: Path) -> Plant:
    database = ""
    if request.param == "postgresql":
        database = request.getfixturevalue("postgres")
        empty(database)
    return Plant(tmp_path, database)


def test_a_control_plane_that_is_gone_goes_on_from_its_backup_and_the_agents_follow(plant: Plant) -> None:
    first, second, laptop = plant.root / "machine-1", plant.root / "machine-2", plant.root / "laptop"
    release = str(plant.root / "safe" / "release.pem")
    roots = [flag for n in (1, 2, 3) for flag in ("--root-key", str(plant.root / f"safe-{n}" / "root.pem"))]
    plant.run(first, "keys", "init", "--trust", str(first / "trust"), *roots, "--release-key", release)
    plant.run(first, "ca", "init", "--json")
    shutil.copytree(first / "trust", laptop)
    shutil.rmtree(laptop / "online")
    old = tiny_bundle(plant.root / "b1").digest
    new = tiny_bundle(plant.root / "b2", bias=0.5).digest
    state = plant.root / "box"
    with ExitStack() as stack:
        with plant.machine(first) as processes:
            plant.run(first, "models", "push", str(plant.root / "b1"))
            plant.run(first, "models", "release", "tiny", "--key", release)
            token = plant.client.post("/api/v1/agents/line-1/enrolment", {"actor": "t"})["token"]
            where = ("--control-plane", f"https://127.0.0.1:{plant.https}", "--state-dir", str(state))
            plant.run(first, "enrol", "--token", "-", *where, program="edge_agent", text=token)
            command = [sys.executable, "-m", "edge_agent", "run", "--state-dir", str(state), "--camera", "simulated"]
            box = stack.enter_context(
                running(command, cwd=ROOT, env=plant.environment(first), stderr=subprocess.DEVNULL)
            )
            wait_until(lambda: plant.agent().get("reported_age_s") is not None, "the agent")
            plant.roll_out("tiny")
            wait_until(lambda: plant.runs(old), "the first bundle")
            told = plant.run(first, "backup", str(plant.root / "backup"), "--json")
            assert json.loads(told)["damaged"] == []
            # Life goes on after the backup: a release, a rollout, a folder of the release key that is kept elsewhere.
            plant.run(first, "models", "push", str(plant.root / "b2"))
            plant.run(first, "models", "release", "tiny:2", "--key", release)
            plant.run(first, "keys", "pull", "--trust", str(laptop))
            plant.roll_out("tiny:2")
            wait_until(lambda: plant.runs(new), "the second bundle")
            for process in processes:
                process.kill()
        shutil.rmtree(first)
        if plant.database:
            empty(plant.database)
        assert box.poll() is None, "the line goes on without a control plane"

        began = time.monotonic()
        plant.run(second, "restore", str(plant.root / "backup"), "--actor", "t")
        with plant.machine(second):
            wait_until(lambda: plant.agent().get("connection") == "live", "the agent at the new machine")
            # Nothing moves by itself: the copy desires the first bundle, the line goes on with the second.
            assert plant.agent()["desired"] == old
            assert plant.agent()["active"] == new
            # What happened after the backup is repeated; the laptop has the newer release.
            assert "targets 3" in plant.run(second, "keys", "push", "--trust", str(laptop))
            rollout = plant.roll_out("tiny:1")
            wait_until(lambda: plant.runs(old), "the first bundle again")
            plant.run(second, "models", "push", str(plant.root / "b2"))
            plant.roll_out("tiny:2")
            wait_until(lambda: plant.runs(new), "the second bundle again")
            took_s = time.monotonic() - began
            assert plant.client.get(f"/api/v1/rollouts/{rollout}")["state"] == "completed"
            actions = [row["action"] for row in plant.client.get("/api/v1/audit?limit=200")["entries"]]
            assert actions.count("control-plane.restore") == 1
    sys.stdout.write(f"{took_s:.0f} s from the restore to the second rollout\n")
