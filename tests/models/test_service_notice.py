"""Notices to the service manager, on a real datagram socket: ready, alive as often as is needed, stopping."""

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.service_notice import ServiceNotice


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
        stream.bind(str(tmp_path / "notify"))
        stream.settimeout(60.0)
        yield stream


def heard(manager: socket.socket) -> list[bytes]:
    manager.setblocking(False)
    found = []
    try:
        while True:
            found.append(manager.recv(100))
    except BlockingIOError:
        return found


def test_ready_comes_first_and_once_then_a_sign_of_life_at_half_the_timeout(manager: socket.socket) -> None:
    now = 0.0
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "10000000"}
    notice = ServiceNotice(Counter(), environment, lambda: now)
    for _ in range(44):  # eleven seconds of a loop that turns four times a second
        notice.alive()
        now += 0.25
    notice.stopping()
    assert heard(manager) == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_socket_of_the_abstract_namespace_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
        name = f"sortline-test-{os.getpid()}"
        stream.bind(f"\0{name}")
        ServiceNotice(Counter(), {"NOTIFY_SOCKET": f"@{name}"}).alive()
        assert heard(stream) == [b"READY=1"]


@pytest.mark.parametrize(
    "watchdog", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}], ids=str
)
def test_without_a_watchdog_for_this_process_no_sign_of_life_is_sent(
    manager: socket.socket, watchdog: dict[str, str]
) -> None:
    notice = ServiceNotice(Counter(), {"NOTIFY_SOCKET": manager.getsockname(), **watchdog})
    notice.alive()
    notice.alive()
    assert heard(manager) == [b"READY=1"]


def test_without_a_service_manager_nothing_is_sent_and_nothing_fails() -> None:
    counters: Counter[str] = Counter()
    notice = ServiceNotice(counters, {})
    notice.alive()
    notice.stopping()
    assert not counters


def test_a_service_manager_that_is_gone_is_counted_and_tried_again(manager: socket.socket) -> None:
    counters: Counter[str] = Counter()
    address = manager.getsockname()
    Path(address).rename(f"{address}.away")
    notice = ServiceNotice(counters, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000"}, lambda: 0.0)
    notice.alive()
    assert counters["notices_failed"] == 2
    Path(f"{address}.away").rename(address)
    notice.alive()
    assert heard(manager) == [b"WATCHDOG=1"]


def test_the_notice_names_what_a_process_waits_for_until_it_is_ready(manager: socket.socket) -> None:
    notice = ServiceNotice(Counter(), {"NOTIFY_SOCKET": manager.getsockname()})
    notice.waiting("waits for the database")
    notice.alive()
    assert heard(manager) == [b"STATUS=waits for the database", b"READY=1\nSTATUS="]


def test_in_a_container_a_file_is_touched_by_the_loop(tmp_path: Path) -> None:
    now, beat = 0.0, tmp_path / "heartbeat"
    notice = ServiceNotice(Counter(), {"SORTLINE_HEARTBEAT_FILE": str(beat)}, lambda: now)
    notice.alive()
    os.utime(beat, (0, 0))
    now = 1.0
    notice.alive()
    assert beat.stat().st_mtime == 0.0, "not at every turn"
    now = 2.0
    notice.alive()
    assert beat.stat().st_mtime > 0.0


def test_a_heartbeat_file_that_cannot_be_touched_is_counted(tmp_path: Path) -> None:
    counters: Counter[str] = Counter()
    ServiceNotice(counters, {"SORTLINE_HEARTBEAT_FILE": str(tmp_path / "gone" / "heartbeat")}).alive()
    assert counters["notices_failed"] == 1


@pytest.mark.slow
def test_an_agent_reports_to_its_service_manager_from_start_to_end(manager: socket.socket, tmp_path: Path) -> None:
    environment = os.environ | {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
    command = ["-m", "edge_agent", "run", "--state-dir", str(tmp_path / "state"), "--broker", "127.0.0.1:1"]
    with subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.DEVNULL) as agent:
        try:
            assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            agent.send_signal(signal.SIGTERM)
            last = b""
            while last != b"STOPPING=1":
                last = manager.recv(100)
            assert agent.wait(300) == 0
        finally:
            agent.kill()
