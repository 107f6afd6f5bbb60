"""Reports to what started a process: waiting, ready, alive, stopping. Every long-running process of both sides uses it.

Under systemd (`Type=notify`) the protocol is one datagram per notice on the socket that `NOTIFY_SOCKET` names
(sd_notify(3)). A container engine has no such socket; there `SORTLINE_HEARTBEAT_FILE` names a file that is touched
instead, and the image's health check looks at its age. The sign of life is sent from the process's main loop and from
nowhere else, so a loop that hangs is noticed. Without the variables nothing is sent; a notice that cannot be sent is
counted and changes nothing.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

HEARTBEAT: Final = "SORTLINE_HEARTBEAT_FILE"
HEARTBEAT_S: Final = 2.0
"""Seconds between two touches: a health check that calls 30 s too old tolerates fourteen lost ones."""


class ServiceNotice:
    """The notices of one process.

    Args:
        counters: Gets `notices_failed`.
        environment: Where `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID` and `SORTLINE_HEARTBEAT_FILE` are looked up.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        counters: Counter[str],
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters, self._clock = counters, clock
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ names a socket of the abstract namespace.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        ours = environment.get("WATCHDOG_PID", "") in {"", str(os.getpid())}
        timeout_us = environment.get("WATCHDOG_USEC", "")
        self._every_s = int(timeout_us) / 2e6 if ours and timeout_us.isdecimal() else 0.0
        """Half of the service manager's time-out, as sd_watchdog_enabled(3) recommends; 0 = no watchdog is set."""
        self._next_s = self._next_touch_s = 0.0
        self._heartbeat = environment.get(HEARTBEAT, "")
        self._ready = self._waited = False

    def waiting(self, what: str) -> None:
        """Reports for what the process waits before it is ready; `what` is one line for people."""
        self._waited = True
        self._send(f"STATUS={what}".encode())

    def alive(self) -> None:
        """Reports one finished turn of the loop: `READY=1` after the first, `WATCHDOG=1` as often as is needed."""
        if not self._ready:
            self._ready = True
            self._send(b"READY=1\nSTATUS=" if self._waited else b"READY=1")
        now_s = self._clock()
        if self._every_s and now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._send(b"WATCHDOG=1")
        if self._heartbeat and now_s >= self._next_touch_s:
            self._next_touch_s = now_s + HEARTBEAT_S
            self._touch()

    def stopping(self) -> None:
        """Reports that the process ends on purpose."""
        self._send(b"STOPPING=1")

    def _touch(self) -> None:
        try:
            Path(self._heartbeat).touch()
        except OSError:
            self._counters["notices_failed"] += 1

    def _send(self, notice: bytes) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as stream:
                stream.setblocking(False)
                stream.sendto(notice, self._address)
        except OSError:
            self._counters["notices_failed"] += 1
            self._next_s = 0.0  # the next turn tries again
