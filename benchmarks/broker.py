"""CPU per delivered message, embedded broker against mosquitto in one run: `python -m benchmarks.broker [--quick]`.

First in the clear, then under mutual TLS with the certificates of a site.
"""

import argparse
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from control_plane.identity.authority import SITE, Authority
from control_plane.identity.publication import refresh_site

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
CASES = (
    ("QoS 0, 200 B, 1 subscriber", 0, 200, 1, 20_000),
    ("QoS 1, 200 B, 1 subscriber", 1, 200, 1, 8_000),
    ("QoS 1, 200 B, 10 subscribers", 1, 200, 10, 2_000),
    ("QoS 1, 120 KiB, 10 subscribers", 1, 122_880, 10, 150),
)


def packet(kind: int, flags: int, body: bytes) -> bytes:
    size, length = len(body), b""
    while True:
        size, low = size >> 7, size & 0x7F
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            return bytes([kind << 4 | flags]) + length + body


def text(value: str) -> bytes:
    return struct.pack(">H", len(value)) + value.encode()


def connect(port: int, name: str, tls: ssl.SSLContext | None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        connection = tls.wrap_socket(connection, server_hostname="127.0.0.1")
    connection.sendall(packet(1, 0, text("MQTT") + b"\4\xc2\0\0" + text(name) + text(name) + text("x")))
    assert connection.recv(4)[3] == 0
    return connection


def subscriber(
    port: int, name: str, qos: int, wanted: int, done: threading.Barrier, tls: ssl.SSLContext | None
) -> None:
    """Receives `wanted` messages and acknowledges them; counts packets, not bytes."""
    connection = connect(port, name, tls)
    connection.sendall(packet(8, 2, struct.pack(">H", 1) + text("sortline/bench") + bytes([qos])))
    stream, seen = connection.makefile("rb", 1 << 20), 0
    done.wait()
    while seen < wanted:
        first = stream.read(1)[0]
        size, shift = 0, 0
        while True:
            byte = stream.read(1)[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        body = stream.read(size)
        if first >> 4 == 3:
            seen += 1
            if qos:
                at = 2 + struct.unpack_from(">H", body)[0]
                connection.sendall(packet(4, 0, body[at : at + 2]))
    done.wait()
    connection.close()


def cpu_s(pid: int) -> float:
    """Seconds all threads of the process were on a processor, from the scheduler's own nanoseconds."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def measure(
    port: int, pid: int, qos: int, size: int, subscribers: int, messages: int, tls: ssl.SSLContext | None
) -> dict[str, float]:
    done = threading.Barrier(subscribers + 1)
    for number in range(subscribers):
        arguments = (port, f"sub{number}-{time.monotonic_ns()}", qos, messages, done, tls)
        threading.Thread(target=subscriber, args=arguments, daemon=True).start()
    sender = connect(port, f"pub-{time.monotonic_ns()}", tls)
    threading.Thread(target=lambda: [None for _ in iter(lambda: sender.recv(65536), b"")], daemon=True).start()
    done.wait()
    before, started = cpu_s(pid), time.perf_counter()
    payload = b"x" * size
    for number in range(messages):
        identity = struct.pack(">H", number % 65535 + 1) if qos else b""
        sender.sendall(packet(3, qos << 1, text("sortline/bench") + identity + payload))
        if qos and number % 16 == 15:
            time.sleep(0)  # lets the subscribers' threads acknowledge
    done.wait()
    elapsed, used = time.perf_counter() - started, cpu_s(pid) - before
    return {"cpu_us": 1e6 * used / (messages * subscribers), "per_s": messages * subscribers / elapsed}


@contextmanager
def brokers(folder: Path, *, mutual_tls: bool) -> Iterator[dict[str, tuple[int, int]]]:
    """Both brokers; yields port and process of each."""
    ready, site = folder / "ready.json", folder / "ca" / SITE
    ready.unlink(missing_ok=True)
    limits = [f"--limit={key}=1e9" for key in ("messages_per_s", "bytes_per_s")]
    access = ["--site", str(site)] if mutual_tls else ["--anonymous"]
    command = [sys.executable, "-m", "control_plane.broker", "--port", "0", "--ready-file", str(ready)]
    embedded = subprocess.Popen([*command, *access, *limits], stdout=subprocess.DEVNULL)
    while not ready.exists():
        time.sleep(0.05)
    found = {"embedded": (json.loads(ready.read_text())["port"], embedded.pid)}
    other = None
    if Path(MOSQUITTO).exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "max_queued_messages 0"]
        lines += ["max_inflight_messages 0", "set_tcp_nodelay true"]
        if mutual_tls:
            lines += [f"cafile {site}/ca.pem", f"certfile {site}/server.pem", f"keyfile {site}/server.pem"]
            lines += ["require_certificate true"]
            lines += ["user root"] if os.geteuid() == 0 else []
        config = folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        other = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        found["mosquitto"] = (port, other.pid)
    try:
        yield found
    finally:
        for process in filter(None, (embedded, other)):
            process.terminate()
            process.wait()


def client_context(site: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(site / "ca.pem"))
    context.load_cert_chain(site / "control.pem")
    return context


def compare(
    found: dict[str, tuple[int, int]],
    case: tuple[str, int, int, int, int],
    *,
    quick: bool,
    tls: ssl.SSLContext | None,
) -> dict[str, object]:
    """One case on both brokers, printed."""
    name, qos, size, subscribers, messages = case
    name += ", mutual TLS" if tls else ""
    count = messages // 4 if quick else messages
    figures = {key: measure(*place, qos, size, subscribers, count, tls) for key, place in found.items()}
    base = figures.get("mosquitto", {}).get("cpu_us", float("nan")) or float("nan")
    for key, figure in figures.items():
        ratio = figure["cpu_us"] / base
        print(f"{name:<44}{key:<12}{figure['cpu_us']:>15.1f}{figure['per_s']:>12.0f}{ratio:>11.2f}", flush=True)
    return {"case": name, **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, now = Path(scratch), datetime.now(UTC)
        refresh_site(Authority.create(folder / "ca", site="Bench", names=["127.0.0.1"], now=now), now)
        print(f"{'case':<44}{'broker':<12}{'CPU us/message':>15}{'messages/s':>12}{'CPU ratio':>11}")
        for mutual_tls in (False, True):
            tls = client_context(folder / "ca" / SITE) if mutual_tls else None
            with brokers(folder, mutual_tls=mutual_tls) as found:
                results += [compare(found, case, quick=options.quick, tls=tls) for case in CASES]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
