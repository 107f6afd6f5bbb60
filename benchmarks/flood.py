"""Delays that a rogue agent or a returning fleet causes to other agents: stages of `benchmarks.delivery`.

*Flood*: an enrolled agent publishes under its own name as fast as its socket takes it, over mutual TLS and under the
limits and the profile that are shipped, while messages of other agents arrive on the control plane's two connections.
A run without the flood goes before it, with the same connections. Each role is a process of its own, so the measured
one shares no interpreter with another, but all share this machine's processors.

*Return*: the broker is killed and started again; all agents come back at once. Measured is the event loop of the
control plane: how much later than it asked for a task that sleeps ten milliseconds is woken.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

import uvicorn

from benchmarks.figures import Figures, Row
from control_plane.app import create_app
from control_plane.identity.authority import SITE
from control_plane.identity.mosquitto import write_profile
from models.topics import Channel, agent_topic
from tests.simulators.mqtt_probe import Probe, packet, text
from tests.simulators.plane import make_services
from tests.simulators.processes import MOSQUITTO, free_port, listens
from tests.simulators.site import Site, make_site

ROGUE: Final = "rogue"
_HEAR: Final = {"control": Channel.REPORTED, "bulk": Channel.BATCH}
"""Connection of the control plane -> the ending of the topics that are measured on it."""
_SIZES: Final = {Channel.REPORTED: 600, Channel.BATCH: 2000}
_PROBE_S: Final = 0.01
_PATIENCE_S: Final = 10.0
"""Seconds after the last message was sent for which a connection still reads missing ones."""


# -- brokers and agents ---------------------------------------------------------------------------------------


def broker_command(kind: str, site: Site, port: int) -> list[str]:
    """Starts a broker as it is shipped: default limits, generated profile, mutual TLS."""
    if kind == "embedded":
        return [sys.executable, "-m", "control_plane.broker", "--port", str(port), "--site", str(site.files)]
    profile = site.folder.parent / "profile"
    write_profile(site.enrolment.authority, profile, host="127.0.0.1", port=port)
    conf = profile / "mosquitto.conf"
    if os.geteuid() == 0 and "user root" not in conf.read_text():
        conf.write_text(conf.read_text() + "user root\n")
    return [MOSQUITTO, "-c", str(conf)]


@contextlib.contextmanager
def started(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process and waits until it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: listens(port), 20.0)
        yield process
    finally:
        process.terminate()
        process.wait()


def wait(done: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.02)


def enrolled(root: Path, names: list[str]) -> Site:
    """Makes a site with these agents, and writes a pair of key and chain for each."""
    root.mkdir()
    site = make_site(root)
    for name in names:
        site.pair(name, root / f"{name}.pem")
    return site


# -- the flood ------------------------------------------------------------------------------------------------


def connect(options: argparse.Namespace, name: str, pair: Path) -> Probe:
    context = ssl.create_default_context(cafile=str(options.site / "identity" / SITE / "ca.pem"))
    context.load_cert_chain(pair)
    found = Probe(options.port, name, {"keep_alive": 0}, tls=context)
    assert found.code == 0, f"{name} was refused"
    return found


def pour(options: argparse.Namespace) -> None:
    """Runs the rogue: small messages under its own name, as many as the socket takes."""
    probe = connect(options, ROGUE, options.site / f"{ROGUE}.pem")
    body = packet(3, 0, text(agent_topic(ROGUE, Channel.LIVE)) + b"x" * 150) * 50
    say("ready")
    with contextlib.suppress(OSError):
        while True:
            probe.send(body)


def speak(options: argparse.Namespace) -> None:
    """Runs the other agents: reports and batches that hold the time of their sending, evenly spread."""
    names = [f"calm-{number:03d}" for number in range(options.count)]
    probes = {name: connect(options, name, options.site / f"{name}.pem") for name in names}
    say("ready")
    pause_s = 1.0 / (options.count * options.rate)
    due_s, until_s, turn = time.monotonic(), time.monotonic() + options.seconds, 0
    while due_s < until_s:
        name = names[turn % len(names)]
        for channel in _HEAR.values():
            stamp = struct.pack(">Q", time.monotonic_ns()) + bytes(_SIZES[channel])
            probes[name].socket.settimeout(5.0)
            probes[name].publish(agent_topic(name, channel), stamp, 1)
        drain(probes[name])
        turn, due_s = turn + 1, due_s + pause_s
        time.sleep(max(0.0, due_s - time.monotonic()))
    say(json.dumps({"sent": turn}))
    sys.stdin.readline()


def drain(probe: Probe) -> None:
    """Takes acknowledgements off the socket without waiting for them."""
    probe.socket.settimeout(0.0)
    with contextlib.suppress(OSError):  # ssl wants to read: nothing is there
        while probe.socket.recv(1 << 16):
            pass


def hear(options: argparse.Namespace) -> None:
    """Runs a connection of the control plane; prints the delays of the others' messages and the rate of the rogue's."""
    probe = connect(options, options.stem, options.site / "identity" / SITE / f"{options.stem}.pem")
    channels = {"control": ("presence", "reported", "response"), "bulk": ("batch", "live", "request")}[options.stem]
    probe.subscribe(*((f"sortline/v1/agents/+/{channel}", 1) for channel in channels))
    wanted: list[float] = []

    def read_end() -> None:
        wanted.extend((float(sys.stdin.readline()), time.monotonic() + _PATIENCE_S))

    threading.Thread(target=read_end, daemon=True).start()
    say("ready")
    late_ms: list[float] = []
    rogue: list[float] = []
    while not wanted or (len(late_ms) < wanted[0] and time.monotonic() < wanted[1]):
        found = probe.read(0.2)
        if found is None or found.kind != 3:
            continue
        topic, payload, qos, _, _, number = found.publish()
        if qos:
            probe.send(packet(4, 0, struct.pack(">H", number)))
        if ROGUE in topic:
            rogue = [rogue[0], time.monotonic(), rogue[2] + 1] if rogue else [time.monotonic(), 0.0, 1]
        elif topic.endswith(_HEAR[options.stem]):
            late_ms.append((time.monotonic_ns() - struct.unpack_from(">Q", payload)[0]) / 1e6)
    first_s, last_s, count = rogue or (0.0, 1.0, 0)
    say(json.dumps({"late_ms": late_ms, "rogue_per_s": count / max(last_s - first_s, 1.0)}))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Role:
    """One process of the benchmark in one of its roles."""

    def __init__(self, role: str, port: int, site: Path, *more: str) -> None:
        command = [sys.executable, "-m", "benchmarks.flood", role, "--port", str(port), "--site", str(site), *more]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        found = self.process.stdout.readline()
        assert found, "a process of the benchmark failed"
        return found

    def end(self, sent: int) -> dict[str, Any]:
        """Passes on how many messages were sent, and returns what the process measured."""
        found: dict[str, Any] = json.loads(self.process.communicate(f"{sent}\n", timeout=_PATIENCE_S + 30.0)[0])
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def heard(port: int, site: Path, count: int, seconds: float, *, flood: bool) -> dict[str, dict[str, Any]]:
    """Lets the other agents send for some seconds; returns the measurements of both connections."""
    hearers = {stem: Role("hear", port, site, "--stem", stem) for stem in _HEAR}
    rogue = Role("pour", port, site) if flood else None
    if rogue is not None:
        time.sleep(1.0)
    others = Role("speak", port, site, "--count", str(count), "--seconds", str(seconds))
    sent = json.loads(others.line())["sent"]
    if rogue is not None:
        rogue.kill()
    found = {stem: hearer.end(sent) | {"sent": sent} for stem, hearer in hearers.items()}
    others.kill()
    return found


def p99(values: list[float], missing: int = 0) -> float:
    """Returns the 99th percentile, in which a missing message counts as infinitely late."""
    ordered = sorted(values) + [math.inf] * missing
    return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else math.nan


def flood(figures: Figures, scratch: Path, kind: str, *, count: int, seconds: float) -> None:
    """Measures the other agents' messages without and with a rogue that floods under its own name."""
    names = [f"calm-{number:03d}" for number in range(count)]
    site = enrolled(scratch / f"flood-{kind}", [ROGUE, *names])
    root, port = site.folder.parent, free_port()
    with started(broker_command(kind, site, port), port):
        before = heard(port, root, count, seconds, flood=False)
        during = heard(port, root, count, seconds, flood=True)
    site.engine.dispose()
    rows: list[Row] = []
    bounds: dict[str, tuple[str, float]] = {}
    for stem, what in (("control", "reports, own connection"), ("bulk", "batches, beside the flood")):
        lost = during[stem]["sent"] - len(during[stem]["late_ms"])
        calm, loud = p99(before[stem]["late_ms"]), p99(during[stem]["late_ms"], lost)
        never = math.isinf(loud)
        rows += [
            (f"{what}: p99 without", calm, "ms"),
            (f"{what}: p99 with", f"not within {_PATIENCE_S:g} s" if never else loud, "" if never else "ms"),
            (f"{what}: ratio", "-" if never else loud / calm, "x"),
            (f"{what}: missing", lost, "messages"),
        ]
        # mosquitto has no limit of rates: its figures are shown without a bound.
        if kind == "embedded":
            bounds[f"{what}: missing"] = ("<=", 0.0)
            bounds[f"{what}: p99 with"] = ("<=", 50.0)
    rows.append(("the rogue's messages that came through", during["bulk"]["rogue_per_s"], "per second"))
    note = f"{count} others, {during['bulk']['sent']} messages of either kind; mutual TLS, limits as shipped"
    figures.table(f"A rogue agent floods, {kind} broker", rows, bounds, note=note)


# -- the fleet comes back -------------------------------------------------------------------------------------


class Served:
    """The whole control plane in a thread, with a task in its loop that measures how late it is woken."""

    def __init__(self, app: Any, port: int, *, lifespan: Literal["auto", "off"] = "auto") -> None:
        self.late_ms: list[tuple[float, float]] = []
        """Pairs of the monotonic time in seconds and the delay in milliseconds."""
        config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1, lifespan=lifespan)
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="control-plane")

    async def _serve(self) -> None:
        task = asyncio.create_task(self._probe())
        await self.server.serve()
        task.cancel()

    async def _probe(self) -> None:
        while True:
            asked = time.monotonic()
            await asyncio.sleep(_PROBE_S)
            now = time.monotonic()
            self.late_ms.append((now, (now - asked - _PROBE_S) * 1000.0))

    def __enter__(self) -> Self:
        self._thread.start()
        wait(lambda: self.server.started, 30.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(15.0)

    def between(self, start_s: float, end_s: float) -> list[float]:
        return [late for at, late in self.late_ms if start_s <= at < end_s]


def came_back(figures: Figures, scratch: Path, kind: str, *, count: int, watch_s: float) -> None:
    """Kills the broker and starts it again; so many agents reconnect by mutual TLS within a second or two.

    Args:
        figures: Get the table.
        scratch: For files.
        kind: Of the broker.
        count: Agents.
        watch_s: The loop is watched for so long before the loss and after the return.
    """
    site = enrolled(scratch / f"return-{kind}", [f"sim-{number:03d}" for number in range(count)])
    root, port = site.folder.parent, free_port()
    site.engine.dispose()
    (root / "plane").mkdir()
    (root / "site.sqlite").rename(root / "plane" / "sortline.sqlite")
    command = broker_command(kind, site, port)
    services = make_services(root / "plane", port=port, identity=site.folder)
    fleet_command = [sys.executable, "-m", "tests.simulators.fleet", "--port", str(port), "--count", str(count)]
    fleet_command += ["--pairs", str(root), "--reconnect-s", "0.1", "1.0", "--every-s", "0.2"]
    with contextlib.ExitStack() as stack:
        lives = stack.enter_context(contextlib.ExitStack())
        broker = lives.enter_context(started(command, port))
        served = stack.enter_context(Served(create_app(services), free_port()))
        fleet = stack.enter_context(contextlib.closing(Fleet(fleet_command)))
        wait(lambda: fleet.connected == count, 120.0)
        time.sleep(2.0)
        calm_s = time.monotonic()
        time.sleep(watch_s)
        lost_s, before = time.monotonic(), services.counters["received_reported"]
        broker.send_signal(signal.SIGKILL)
        broker.wait()
        wait(lambda: fleet.connected == 0, 30.0)
        stack.enter_context(started(command, port))
        again_s = time.monotonic()
        wait(lambda: fleet.connected == count and services.connection.connected, 120.0)
        back_s = time.monotonic()
        # What they report after their return is taken in for a while longer.
        time.sleep(watch_s)
        end_s = time.monotonic()
        reports = services.counters["received_reported"] - before
    services.engine.dispose()
    calm, storm = served.between(calm_s, lost_s), served.between(lost_s, end_s)
    figures.table(
        f"{count} agents come back at once, {kind} broker",
        [
            ("all back after the broker was", back_s - again_s, "s"),
            ("reports taken in after the loss", reports, ""),
            ("event loop, p99 late, calm", p99(calm), "ms"),
            ("event loop, p99 late, with the storm", p99(storm), "ms"),
            ("event loop, latest", max(storm), "ms"),
        ],
        {
            "all back after the broker was": ("<=", 60.0),
            "event loop, p99 late, with the storm": ("<=", 200.0),
        },
        note=f"mutual TLS; a try every 0.1 to 1 s; {len(storm)} looks, from the loss to {watch_s:g} s after the return",
    )


class Fleet:
    """A simulated fleet in a process of its own, and the number of its agents that are connected."""

    def __init__(self, command: list[str]) -> None:
        self.connected = -1
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.connected = int(json.loads(line)["connected"])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A process of the flood; `benchmarks.delivery --only flood` starts it."
    )
    parser.add_argument("role", choices=("pour", "speak", "hear"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--stem", choices=tuple(_HEAR), default="control")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5.0, help="reports, and batches, per second of each agent")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    {"pour": pour, "speak": speak, "hear": hear}[options.role](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
