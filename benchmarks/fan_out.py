"""One bundle to many agents over a broker: a stage of `benchmarks.delivery`.

Three ways are compared on each broker: the window of chunks that the product uses, a request and a response for each
agent, and one large message. The floor is the same bytes through plain sockets in the same run.
"""

import contextlib
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks import broker as broker_cost
from benchmarks.figures import Figures, Row
from benchmarks.plots import Chart, render
from benchmarks.receivers import WHOLE_TOPIC
from control_plane.database.engine import writing
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.blobs import Publisher
from control_plane.registry.versions import register
from control_plane.services import Services
from models.bundle import blobs_of, read_bundle, write_bundle
from models.messages import Request, decode
from models.topics import Channel, agent_topic
from tests.simulators.plane import make_services
from tests.simulators.processes import free_port
from tests.simulators.tiny_bundle import tiny_files

MEGA = 1e6


# -- brokers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def broker(kind: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Starts a fresh broker; yields its port and its process id."""
    port = free_port()
    if kind == "embedded":
        limits = [f"--limit={key}=1e10" for key in ("messages_per_s", "bytes_per_s")]
        limits += ["--limit=packet_bytes=67108864", "--limit=retained_bytes=268435456", "--limit=connections=1000"]
        command = [sys.executable, "-m", "control_plane.broker", "--anonymous", "--port", str(port), *limits]
    else:
        config = folder / f"mosquitto-{port}.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 10000\nset_tcp_nodelay true\n"
        )
        command = [broker_cost.MOSQUITTO, "-c", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                break
            time.sleep(0.05)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def memory_mb(pid: int, field: str = "VmHWM") -> float:
    """Returns the peak resident memory of a process in MiB, or the present one with `field="VmRSS"`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024.0
    return float("nan")


def client(port: int, name: str) -> mqtt.Client:
    """Returns a connected client with the limits of the control plane's."""
    found = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv311)
    found.username_pw_set(name, "x")
    found.max_queued_messages_set(0)
    found.max_inflight_messages_set(64)
    found.connect("127.0.0.1", port)
    found.loop_start()
    return found


# -- fan-out --------------------------------------------------------------------------------------------------


def receive(port: int, count: int, way: str, directory: Path, send: Callable[[], None] | None = None) -> float:
    """Starts the receivers, gives them the signal to begin, and returns the seconds they took."""
    command = [sys.executable, "-m", "benchmarks.receivers", "--port", str(port), "--count", str(count)]
    process = subprocess.Popen(
        [*command, "--way", way, "--bundle", str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n", "the receivers could not connect"
    process.stdin.write("go\n")
    process.stdin.flush()
    if send is not None:
        send()
    answer = process.stdout.readline().split()
    assert process.wait(60) == 0, "the receivers failed"
    return float(answer[0])


def floor(directory: Path, data: bytes, count: int) -> float:
    """Sends the same bytes through loopback by plain sockets, the least that any delivery costs here; returns seconds.

    The connections stay open until the receivers have reported. A connection that is closed earlier looks to its
    receiver like one that was cut off.
    """
    started = threading.Event()
    with contextlib.ExitStack() as connections, socket.create_server(("127.0.0.1", 0), backlog=512) as listener:

        def serve() -> None:
            peers = [connections.enter_context(listener.accept()[0]) for _ in range(count)]
            started.wait()
            with selectors.DefaultSelector() as selector:
                for peer in peers:
                    peer.setblocking(False)
                    selector.register(peer, selectors.EVENT_WRITE, [memoryview(data)])
                while selector.get_map():
                    for key, _ in selector.select():
                        sent = key.fileobj.send(key.data[0][: 1 << 18])  # type: ignore[union-attr]
                        key.data[0] = key.data[0][sent:]
                        if not key.data[0]:
                            selector.unregister(key.fileobj)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        seconds = receive(listener.getsockname()[1], count, "plain", directory, started.set)
        thread.join()
    return seconds


def published(services: Services, digest: str, port: int) -> int:
    """Publishes a bundle as the control plane does; returns the bytes that left it."""
    connection = client(port, "control-plane")
    config = msgspec.structs.replace(services.config.broker, bundle_bytes_per_s=1e10)
    publisher = Publisher(config, services.engine, services.store, connection, Counter())
    publisher.store_lost()
    sent = publisher.publish_bundle(digest)
    connection.disconnect()
    connection.loop_stop()
    return sent


@contextlib.contextmanager
def answering(port: int, blobs: dict[str, bytes]) -> Iterator[Counter[str]]:
    """Answers requests as the fallback does: every agent gets its own copy of every blob. Yields the bytes sent."""
    counters: Counter[str] = Counter()
    connection = client(port, "control-plane")

    def answer(_client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        agent = message.topic.split("/")[3]
        for digest in decode(message.payload, Request).digests:
            connection.publish(agent_topic(agent, Channel.BLOB), blobs[digest], 1)
            counters["bytes"] += len(blobs[digest])

    connection.on_message = answer
    connection.subscribe("sortline/v1/agents/+/request", 1)
    time.sleep(0.2)
    yield counters
    connection.disconnect()
    connection.loop_stop()


def fan_out(figures: Figures, scratch: Path, counts: tuple[int, ...], megabytes: int, kinds: list[str]) -> None:
    """Measures one bundle to many agents, three ways, on each broker, against plain sockets."""
    directory = scratch / "bundle"
    write_bundle(directory, "large", tiny_files(padding=megabytes * 1_000_000))
    services = make_services(scratch / "plane")
    with writing(services.engine) as session:
        digest = register(session, services.store, directory, actor="benchmark", now=utc_now()).bundle
        session.commit()
    manifest = read_bundle(directory).manifest
    blobs = dict(blobs_of(manifest, lambda entry: (directory / entry.path).read_bytes()))
    data = b"".join(blobs.values())
    size = len(data)
    floors = {count: floor(directory, data, count) for count in counts}
    curves: dict[str, list[tuple[float, float]]] = {"plain sockets": [(n, floors[n]) for n in counts]}
    memory: dict[str, list[tuple[float, float]]] = {}
    for kind in kinds:
        rows: list[Row] = []
        for count in counts:
            with broker(kind, scratch) as (port, pid):
                before = memory_mb(pid, "VmRSS")
                egress = published(services, digest, port)
                seconds = receive(port, count, "window", directory)
                peak = memory_mb(pid)
            rows += [
                (f"window, {count} agents", seconds, "s"),
                (f"window, {count} agents: egress", egress / size, "x bundle"),
                (f"window, {count} agents: of the floor", seconds / floors[count], "x"),
                (f"window, {count} agents: broker memory", peak - before - size / MEGA, "MB beyond the bundle"),
            ]
            curves.setdefault(f"window {kind}", []).append((count, seconds))
            memory.setdefault(f"window {kind}", []).append((count, peak))
        for count in [n for n in counts if n <= 50]:
            with broker(kind, scratch) as (port, pid), answering(port, blobs) as counters:
                seconds = receive(port, count, "ask", directory)
                sent = counters["bytes"]
            rows += [
                (f"request/response, {count} agents", seconds, "s"),
                (f"request/response, {count} agents: egress", sent / size, "x bundle"),
            ]
            curves.setdefault(f"asked {kind}", []).append((count, seconds))
            with broker(kind, scratch) as (port, pid):
                before = memory_mb(pid, "VmRSS")
                sender = client(port, "control-plane")
                sender.publish(WHOLE_TOPIC, data, 1, retain=True).wait_for_publish(60)
                try:
                    seconds, peak = receive(port, count, "whole", directory), memory_mb(pid)
                except AssertionError:
                    seconds, peak = float("nan"), memory_mb(pid)
                sender.disconnect()
                sender.loop_stop()
            rows += [
                (f"one message, {count} agents", seconds if seconds == seconds else "refused", "s"),  # noqa: PLR0124
                (f"one message, {count} agents: broker memory", peak - before - size / MEGA, "MB beyond the bundle"),
            ]
            memory.setdefault(f"whole {kind}", []).append((count, peak))
        bounds = {f"window, {n} agents: egress": ("<=", 1.01) for n in counts}
        bounds |= {f"window, {n} agents: broker memory": ("<=", 96.0) for n in counts}
        note = f"{size / MEGA:.1f} MB in {len(blobs)} blobs; floor: " + ", ".join(
            f"{n} agents {s:.2f} s" for n, s in floors.items()
        )
        figures.table(f"A bundle to many agents, {kind} broker", rows, bounds, note=note)
    figures.plots["delivery"] = render(
        [
            Chart("Time until the last agent has the bundle", "agents", "s", list(curves.items()), x_ticks=counts),
            Chart("Peak memory of the broker", "agents", "MB", list(memory.items()), x_ticks=counts),
        ],
        f"{size / MEGA:.0f} MB; receivers, broker and sender share one machine",
    )
    services.engine.dispose()
