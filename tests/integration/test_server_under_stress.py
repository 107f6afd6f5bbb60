"""A real server: it answers while the database is locked, keeps its limits, and stops without a traceback."""

import contextlib
import http.client
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.simulators.processes import HANG_S, free_port, running, wait_until

TOKEN = "0123456789abcdef-write"
AUTH = {"authorization": f"Bearer {TOKEN}"}
LOCK_WAIT_S = 20


@dataclass
class Server:
    process: subprocess.Popen
    port: int
    root: Path
    log: Path

    def ask(self, path: str, method: str = "GET", **options: object) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        with contextlib.closing(connection):
            connection.request(method, path, headers=AUTH, **options)  # type: ignore[arg-type]
            answer = connection.getresponse()
            return answer.status, answer.read()

    def open(self, request: str) -> socket.socket:
        """Sends the beginning of a request by hand."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S)
        lines = [request, f"host: 127.0.0.1:{self.port}", f"authorization: Bearer {TOKEN}"]
        found.sendall("\r\n".join([*lines, ""]).encode())
        return found

    def memory_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1))  # type: ignore[union-attr]


@contextlib.contextmanager
def served(root: Path, **settings: str) -> Iterator[Server]:
    (root / "token").write_text(TOKEN)
    port = free_port()
    environment = os.environ | {
        "SORTLINE__DATA_DIR": str(root / "plane"),
        "SORTLINE__SERVER__PORT": str(port),
        "SORTLINE__SERVER__TOKEN_FILE": str(root / "token"),
        "SORTLINE__BROKER__ENABLED": "false",
        "SORTLINE__JOBS__WORKERS": "0",
        "SORTLINE__DATABASE_WAIT_S": str(LOCK_WAIT_S),
        **settings,
    }
    log = root / "server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "control_plane", "serve"]
        with running(command, env=environment, stdout=output, stderr=output) as process:
            found = Server(process, port, root, log)

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    return found.ask("/healthz")[0] == 200
                return False

            wait_until(ready, what="the server")
            yield found


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server"), SORTLINE__SERVER__MAX_BODY_BYTES=str(32 * 1024 * 1024)) as found:
        yield found


def test_probes_answer_while_every_thread_waits_for_the_database(server: Server) -> None:
    answers: list[int] = []
    blocked = sqlite3.connect(server.root / "plane" / "sortline.sqlite", isolation_level=None)
    blocked.execute("BEGIN EXCLUSIVE")
    body = b'{"name": "x", "root": "/tmp"}'
    headers = AUTH | {"content-type": "application/json"}

    def change() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_S)
        with contextlib.closing(connection):
            connection.request("POST", "/api/v1/datasets", body=body, headers=headers)
            answers.append(connection.getresponse().status)

    threads = [threading.Thread(target=change) for _ in range(50)]  # more than the server has threads
    try:
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert server.ask("/healthz")[0] == 200
        assert not answers, "the database is still locked, and the probes did not wait for it"
    finally:
        blocked.execute("ROLLBACK")
        blocked.close()
    for thread in threads:
        thread.join(HANG_S)
    assert set(answers) <= {201, 503}
    assert 201 in answers


def chunks(server: Server, path: str, megabytes: int) -> int:
    """Sends a body without a length; returns the status."""
    block = b"100000\r\n" + bytes(1024 * 1024) + b"\r\n"
    with server.open(f"POST {path} HTTP/1.1") as connection:
        connection.sendall(b"transfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\n")
        with contextlib.suppress(OSError):  # the server may close as soon as it has answered
            for _ in range(megabytes):
                connection.sendall(block)
            connection.sendall(b"0\r\n\r\n")
        answer = b""
        with contextlib.suppress(OSError):
            while b"\r\n" not in answer and (part := connection.recv(4096)):
                answer += part
    return int(answer.split()[1]) if answer else 0


def test_a_body_without_a_length_takes_no_memory_beyond_its_limit(server: Server) -> None:
    before_kb = server.memory_kb()
    for path in ("/api/v1/versions", "/api/v1/datasets", "/api/v1/trust/set"):
        assert chunks(server, path, 300) in {413, 0}
    assert server.memory_kb() - before_kb < 100 * 1024
    assert not list((server.root / "plane").glob("upload-*")), "nothing is left of what was refused"
    assert server.ask("/healthz")[0] == 200


def test_a_cut_upload_is_one_line_in_the_log(server: Server) -> None:
    before = server.log.read_text()
    with server.open("POST /api/v1/versions HTTP/1.1") as connection:
        connection.sendall(b"content-length: 1000000\r\n\r\n" + bytes(1000))
    wait_until(lambda: "went away" in server.log.read_text()[len(before) :], what="the line")
    new = server.log.read_text()[len(before) :]
    assert "Traceback" not in new
    assert len(new.strip().splitlines()) == 1
    wait_until(lambda: not list((server.root / "plane").glob("upload-*")), what="the scratch folder to go")


def test_a_server_with_open_streams_stops_in_order(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        streams = [server.open("GET /events HTTP/1.1") for _ in range(3)]
        for stream in streams:
            stream.sendall(b"\r\n")
            assert b"200" in stream.recv(4096)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(HANG_S) == 0
        for stream in streams:
            stream.close()
        text = server.log.read_text()
    assert "Traceback" not in text
    assert "Cancel" not in text
    assert "ERROR" not in text
