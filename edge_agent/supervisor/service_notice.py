"""Reports to the service manager that started the agent (systemd, `Type=notify`): ready, alive, stopping.

The protocol is one datagram per notice on the socket that `NOTIFY_SOCKET` names (sd_notify(3)). `WATCHDOG=1` is sent
from the supervisor's loop and from nowhere else, so a loop that hangs is restarted. Without the variable nothing is
sent; a notice that cannot be sent is counted and changes nothing.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping


class ServiceNotice:
    """The notices of one process.

    Args:
        counters: Gets `notices_failed`.
        environment: Where `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` are looked up.
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
        self._next_s = 0.0
        self._ready = False

    def alive(self) -> None:
        """Reports one finished turn of the loop: `READY=1` after the first, `WATCHDOG=1` as often as is needed."""
        if not self._ready:
            self._ready = True
            self._send(b"READY=1")
        now_s = self._clock()
        if self._every_s and now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            self._send(b"WATCHDOG=1")

    def stopping(self) -> None:
        """Reports that the process ends on purpose."""
        self._send(b"STOPPING=1")

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
