"""Real processes for tests: brokers that listen, and a way to wait for a condition without sleeping blindly."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


HANG_S = 300.0
"""Seconds after which a test counts as hung. A limit near what a quiet machine needs would fail on a busy one."""


def wait_until(done: Callable[[], object], what: str = "the condition") -> None:
    """Polls until `done()` is true; fails the test with `what` after `HANG_S` seconds."""
    until = time.monotonic() + HANG_S
    event = threading.Event()
    while not done():
        if time.monotonic() > until:
            pytest.fail(f"{what} did not come within {HANG_S:g} s")
        event.wait(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], **options: object) -> Iterator[subprocess.Popen]:
    """Starts a process; at the end it gets SIGTERM, and SIGKILL if it is still there after `HANG_S` seconds."""
    process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def embedded_broker(folder: Path, *arguments: str) -> Iterator[int]:
    """The embedded broker; yields its port. Anonymous unless credentials are given."""
    ready = folder / f"ready-{free_port()}.json"
    access = () if {"--credentials", "--site"} & set(arguments) else ("--anonymous",)
    command = [sys.executable, "-m", "control_plane.broker", "--port", "0", "--ready-file", str(ready)]
    with running([*command, *access, *arguments], stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: ready.exists() or process.poll() is not None, "the broker")
        yield int(json.loads(ready.read_text())["port"])


@contextlib.contextmanager
def mosquitto_broker(folder: Path) -> Iterator[int]:
    """mosquitto, admitting everyone; yields its port."""
    if not Path(MOSQUITTO).exists():
        pytest.skip("the program mosquitto is not installed")
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 10000\nset_tcp_nodelay true\n"
    )
    with running([MOSQUITTO, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        wait_until(lambda: listens(port), "mosquitto")
        yield port


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
        return True
    return False
