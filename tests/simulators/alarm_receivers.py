"""Receivers of alarms that fail as real ones do: an HTTP server and a mail server on sockets of this machine."""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec


@dataclass
class HookServer:
    """An HTTP server whose next answers are given beforehand.

    Attributes:
        answers: Statuses in order; `hang` and `trickle` never end, `cut` closes the connection; then 200.
        got: Headers and body of every complete request.
    """

    answers: list[int | str] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/alarms"

    @property
    def events(self) -> list[str]:
        return [msgspec.json.decode(body)["event"] for _, body in self.got]


def _handler(server: HookServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            server.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            answer = server.answers.pop(0) if server.answers else 200
            if answer == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if answer == "hang":
                server.released.wait(30)
                return
            if answer == "trickle":
                self._trickle()
                return
            self.send_response(int(answer))
            self.send_header("content-length", "0")
            self.end_headers()

        def _trickle(self) -> None:
            """One byte at a time, each soon enough for a time-out that counts from the last byte."""
            try:
                for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 4000:
                    self.connection.sendall(bytes([byte]))
                    if server.released.wait(0.05):
                        return
            except OSError:
                return

        def log_message(self, *_: Any) -> None:
            """Says nothing on the terminal."""

    return Handler


@contextmanager
def hook_server(*answers: int | str) -> Iterator[HookServer]:
    """Serves on a free port."""
    found = HookServer(list(answers))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    httpd.daemon_threads = True
    found.port = httpd.server_address[1]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join(5)


@dataclass
class MailServer:
    """A mail server that speaks the SMTP of RFC 5321 a sender needs.

    Attributes:
        answers: Replies to a message's text, in order, such as `451 later`; `hang` says nothing more; then 250.
        recipients: Reply to each RCPT TO.
        messages: Texts that were taken or refused, as they came.
    """

    answers: list[str] = field(default_factory=list)
    recipients: str = "250 ok"
    messages: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    port: int = 0


def _conversation(server: MailServer) -> Callable[..., Any]:
    class Conversation(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                self._talk()
            except OSError:
                return

        def _say(self, text: str) -> None:
            self.wfile.write(f"{text}\r\n".encode())

        def _talk(self) -> None:
            self._say("220 test")
            while line := self.rfile.readline().decode():
                word = line.split()[0].upper()
                if word == "DATA":
                    self._say("354 go on")
                    if not self._take_text():
                        return
                elif word == "QUIT":
                    self._say("221 bye")
                    return
                else:
                    self._say(server.recipients if word == "RCPT" else "250 ok")

        def _take_text(self) -> bool:
            lines = []
            while (line := self.rfile.readline().decode()) not in {".\r\n", ""}:
                lines.append(line.removesuffix("\r\n"))
            server.messages.append("\n".join(lines))
            answer = server.answers.pop(0) if server.answers else "250 taken"
            if answer == "hang":
                server.released.wait(30)
                return False
            self._say(answer)
            return True

    return Conversation


@contextmanager
def mail_server(*answers: str) -> Iterator[MailServer]:
    """Serves on a free port."""
    found = MailServer(list(answers))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    smtpd = Server(("127.0.0.1", 0), _conversation(found))
    found.port = smtpd.server_address[1]
    thread = threading.Thread(target=smtpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        smtpd.shutdown()
        smtpd.server_close()
        thread.join(5)
