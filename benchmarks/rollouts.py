"""Time from `rollout start` to 95 % committed, with many simulated agents: `python -m benchmarks.rollouts [--quick]`.

A real broker, a real control plane and the fleet are processes of their own. The baseline is the same fleet, broker
and size of bundle without the control plane: a bare client publishes every blob and every assignment at once. The rest
of the time is the agents' (fetch, self-test, trial), so the ratio gives the cost of the rollout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from control_plane.database.engine import writing
from control_plane.database.tables.columns import utc_now
from control_plane.registry.versions import register
from models.bundle import Bundle, blobs_of
from models.messages import Desired, encode
from models.topics import Channel, agent_topic, blob_topic
from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.plane import make_services, release
from tests.simulators.processes import embedded_broker, free_port, running
from tests.simulators.tiny_bundle import tiny_bundle

ROOT = Path(__file__).resolve().parents[1]
WORST_RATIO = 4.0
"""Largest ratio of the time of a rollout in one wave to that of publishing all assignments at once."""
TRIAL = {"trial_items": 20, "trial_s": 60.0}


def wait(done: Callable[[], object], timeout_s: float, what: str, *, every_s: float = 0.02) -> float:
    """Returns the seconds until `done()`. A condition that queries the control plane is polled seldom (`every_s`)."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"{what} did not come within {timeout_s:g} s")
        time.sleep(every_s)
    return time.monotonic() - began


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Plane:
    """The control plane's API."""

    def __init__(self, port: int) -> None:
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False)

    def ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx2.HTTPError:
            return False

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.http.post(f"/api/v1/{path}", json={"actor": "benchmark"} | body)
        answer.raise_for_status()
        return dict(answer.json())

    def known(self) -> int:
        return len(self.http.get("/api/v1/agents").json())

    def state(self, rollout_id: int) -> str:
        return str(self.http.get(f"/api/v1/rollouts/{rollout_id}").json()["state"])


@contextmanager
def site(folder: Path) -> Iterator[tuple[int, Plane, subprocess.Popen]]:
    """Broker and control plane."""
    with embedded_broker(folder) as broker:
        port = free_port()
        environment = os.environ | {
            "SORTLINE__DATA_DIR": str(folder / "data"),
            "SORTLINE__SERVER__PORT": str(port),
            "SORTLINE__BROKER__PORT": str(broker),
            "SORTLINE__JOBS__WORKERS": "0",
        }
        command = [sys.executable, "-m", "control_plane", "serve"]
        with (
            (folder / "plane.log").open("wb") as log,
            running(command, env=environment, cwd=ROOT, stderr=log) as process,
        ):
            plane = Plane(port)
            wait(plane.ready, 60.0, "the control plane")
            yield broker, plane, process


def tell_at_once(port: int, fleet: SimulatedFleet, bundle: Bundle, directory: Path) -> None:
    """Publishes every blob and every assignment with a bare client."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bare", protocol=mqtt.MQTTv311)
    client.username_pw_set("control-plane", "x")
    client.max_inflight_messages_set(64)
    client.connect("127.0.0.1", port)
    client.loop_start()
    for digest, data in blobs_of(bundle.manifest, lambda entry: (directory / entry.path).read_bytes()):
        client.publish(blob_topic(digest), data, 1, retain=True)
    for agent in fleet.agents.values():
        desired = Desired(generation=agent.held.generation + 1, bundle=bundle.digest, **TRIAL)
        last = client.publish(agent_topic(agent.id, Channel.DESIRED), encode(desired), 1, retain=True)
    last.wait_for_publish(30.0)
    client.disconnect()
    client.loop_stop()


def prepare(folder: Path, size_bytes: int) -> list[Bundle]:
    """Development keys, and released bundles of this size in the store the control plane will use."""
    services = make_services(folder / "data")
    bundles = []
    for number in range(5):
        bundles.append(tiny_bundle(folder / f"b{number}", bias=float(number), padding=size_bytes, name="bench"))
        with writing(services.engine) as session:
            register(session, services.store, folder / f"b{number}", actor="benchmark", now=utc_now())
            session.commit()
        release(services, bundles[-1].digest)
    services.engine.dispose()
    return bundles


def measure(agents: int, size_bytes: int) -> dict[str, Any]:
    """All figures of one run, in seconds."""
    found: dict[str, Any] = {"agents": agents, "bundle_bytes": size_bytes}
    share = round(0.95 * agents)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundles = prepare(folder, size_bytes)
        with site(folder) as (port, plane, process):
            manner = Manner(items_per_s=20.0, reconnect_s=(0.1, 1.0))
            with SimulatedFleet(port, agents, manner=manner) as fleet:
                found["all_known_s"] = wait(lambda: plane.known() == agents, 60.0, "all agents", every_s=0.25)
                tell_at_once(port, fleet, bundles[0], folder / "b0")
                found["bare_95_s"] = wait(lambda: fleet.running(bundles[0].digest) >= share, 120.0, "the baseline")
                wait(lambda: fleet.running(bundles[0].digest) == agents, 60.0, "the baseline's rest")
                time.sleep(1.0)
                before = cpu_s(process.pid)
                for name, number, waves in (("one_wave", 1, ["100%"]), ("four_waves", 2, [1, "10%", "50%", "100%"])):
                    digest = bundles[number].digest
                    made = plane.post("rollouts", model=f"bench:{number + 1}", waves=waves, **TRIAL)
                    found[f"{name}_95_s"] = wait(lambda d=digest: fleet.running(d) >= share, 180.0, name)
                    found[f"{name}_done_s"] = found[f"{name}_95_s"] + wait(
                        lambda r=made["id"]: plane.state(r) == "completed", 60.0, f"{name} to complete", every_s=0.5
                    )
                found["control_plane_cpu_s"] = cpu_s(process.pid) - before
                plane.post(f"rollouts/{made['id']}/rollback", reason="benchmark")
                found["rollback_95_s"] = wait(lambda: fleet.running(bundles[1].digest) >= share, 120.0, "the rollback")
                wait(lambda: plane.state(made["id"]) == "rolled-back", 60.0, "the end of the rollback", every_s=0.5)
                for agent in fleet.agents.values():
                    agent.manner.verdict = "hang"
                bad = plane.post("rollouts", model="bench:4", waves=["100%"], **TRIAL)
                wait(
                    lambda: all(a.taken[-1][1] == bundles[3].digest for a in fleet.agents.values()),
                    60.0,
                    "the assignment",
                )
                plane.post(f"rollouts/{bad['id']}/abort", reason="benchmark")
                found["abort_95_s"] = wait(
                    lambda: sum(a.taken[-1][1] != bundles[3].digest for a in fleet.agents.values()) >= share,
                    60.0,
                    "the abort",
                )
                found["fleet"] = fleet.figures()["counters"]
    found["ratio_one_wave"] = found["one_wave_95_s"] / found["bare_95_s"]
    return found


def main() -> int:
    """Prints the figures; the status says whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--size-kb", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="50 agents")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(50 if given.quick else given.agents, given.size_kb * 1024)
    for name, value in found.items():
        print(f"{name:24} {value:.2f}" if isinstance(value, float) else f"{name:24} {value}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))
    good = found["ratio_one_wave"] <= WORST_RATIO
    print("ratio to telling everybody at once:", f"{found['ratio_one_wave']:.2f}", "ok" if good else "TOO SLOW")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
