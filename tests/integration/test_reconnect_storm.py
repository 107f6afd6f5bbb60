"""Two hundred enrolled agents lose their broker at one moment and come back by mutual TLS; the server stays quick."""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.processes import free_port, running, wait_until
from tests.simulators.site import Site, make_site

ROOT = Path(__file__).resolve().parents[2]
COUNT = 200


def start_broker(site: Site, port: int, ready: Path) -> subprocess.Popen:
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "control_plane.broker", "--port", str(port), "--site", str(site.files)]
    process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.DEVNULL, cwd=ROOT)
    wait_until(lambda: ready.exists() or process.poll() is not None, "the broker")
    assert process.poll() is None
    return process


@pytest.mark.slow
def test_two_hundred_agents_are_back_within_a_minute_and_the_server_stays_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site(tmp_path)
    contexts = {}
    for number in range(COUNT):
        name = f"sim-{number:03d}"
        contexts[name] = site.tls(site.pair(name, tmp_path / f"{name}.pair"))
    port, http = free_port(), free_port()

    def prepare(client: mqtt.Client, agent_id: str) -> None:
        client.tls_set_context(contexts[agent_id])

    environment = os.environ | {
        "SORTLINE__DATA_DIR": str(tmp_path / "plane"),
        "SORTLINE__IDENTITY__FOLDER": str(site.folder),
        "SORTLINE__IDENTITY__PORT": "0",
        "SORTLINE__BROKER__TLS": "true",
        "SORTLINE__BROKER__PORT": str(port),
        "SORTLINE__SERVER__PORT": str(http),
        "SORTLINE__JOBS__WORKERS": "0",
    }
    site.engine.dispose()
    # The server publishes what its own tables know: it takes over the site's.
    (tmp_path / "plane").mkdir()
    (tmp_path / "site.sqlite").rename(tmp_path / "plane" / "sortline.sqlite")
    broker = start_broker(site, port, tmp_path / "ready.json")
    serve = [sys.executable, "-m", "control_plane", "serve"]
    manner = Manner(window_s=10.0, reconnect_s=(1.0, 30.0))
    try:
        with running(serve, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL):
            wait_until(lambda: answers(http, "/readyz"), "the server")
            with SimulatedFleet(port, COUNT, manner=manner, prepare=prepare) as fleet:
                wait_until(lambda: fleet.connected() == COUNT, "all agents")
                broker.send_signal(signal.SIGKILL)
                broker.wait()
                wait_until(lambda: fleet.connected() == 0, "the loss")
                lags, stop = [], threading.Event()
                watcher = threading.Thread(target=measure, args=(http, lags, stop))
                watcher.start()
                broker, started = start_broker(site, port, tmp_path / "ready.json"), time.monotonic()
                wait_until(lambda: fleet.connected() == COUNT, "everyone to be back")
                elapsed = time.monotonic() - started
                stop.set()
                watcher.join()
    finally:
        broker.terminate()
        broker.wait(300)
    assert lags, "the server answered all the time"
    with capsys.disabled():
        sys.stdout.write(
            f"\n{COUNT} agents back by TLS in {elapsed:.1f} s; /healthz median {1e3 * statistics.median(lags):.0f} ms, "
            f"p95 {1e3 * statistics.quantiles(lags, n=20)[-1]:.0f} ms\n"
        )


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def measure(port: int, lags: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.1):
        started = time.monotonic()
        assert answers(port, "/healthz")
        lags.append(time.monotonic() - started)
