"""The processes a supervisor starts: the line, and the throw-away self-test. Both report through its event queue."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.events import Deliver, deliver_surely
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import FromLine, Go, Load, LoadShadow, Pipe, Ready, SetLot, Waiting
from models.errors import SortlineError
from models.messages import Swap

log = logging.getLogger("sortline.child")


@dataclass(frozen=True, slots=True)
class LineGone:
    """A line process ended or its pipe broke."""

    child: "LineProcess"
    reason: str


_MODULES: Final = {"line": "edge_agent.line.process", "standby": "edge_agent.line.standby"}
LINE_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "400000",
    "MALLOC_TRIM_THRESHOLD_": "1000000",
}
"""Environment of the line process. One thread computes, so more BLAS buffers and arenas would only cost memory; and
with fixed thresholds glibc gives frames back instead of keeping the largest sum it ever held (a line of four
lanes: 143 MB resident instead of 200)."""


class LineProcess:
    """One running line process, or one that waits to become it.

    Args:
        config: What it runs.
        deliver: Gets (child, message) pairs and, once the process is reaped, a `LineGone`.
        standby: It waits for `go`.
    """

    def __init__(self, config: LineConfig, deliver: Deliver, *, standby: bool = False) -> None:
        name = "standby" if standby else "line"
        ours, theirs = socket.socketpair()
        # In memory: a full disk must not keep a line from starting.
        with os.fdopen(os.memfd_create(f"{name}.json"), "wb") as stream, theirs:
            stream.write(msgspec.json.encode(config))
            stream.flush()
            given = ["--config", f"/proc/self/fd/{stream.fileno()}", "--pipe-fd", str(theirs.fileno())]
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULES[name], *given],
                pass_fds=[stream.fileno(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | LINE_ENVIRONMENT,
            )
        self._pipe = Pipe(ours)
        self._deliver = deliver
        self.digest = config.digest
        self.started_s = self.heard_s = time.monotonic()
        self.ready = False
        self._warm = self._told = False
        self._thread = threading.Thread(target=self._read, name=f"{name}-{self._process.pid}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def waiting(self) -> bool:
        """Whether it is a standby that could take over now."""
        return self._warm and not self._told

    def _read(self) -> None:
        reason = "the line process ended"
        try:
            while True:
                message = self._pipe.receive(FromLine, 1.0)
                if message is not None:
                    self.heard_s = time.monotonic()
                    if isinstance(message, Waiting):
                        if not self._warm:
                            log.info("standby %s waits to take over", self.pid)
                        self._warm = True
                        continue
                    self.ready = self.ready or isinstance(message, Ready)
                    self._deliver((self, message))
        except SortlineError as error:
            reason = str(error)
        except OSError as error:
            reason = f"pipe failed: {error}"
        status = self._reap()
        self._pipe.close()
        deliver_surely(self._deliver, LineGone(self, f"{reason} (exit status {status})"))

    def _reap(self) -> int:
        try:
            return self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def load(
        self, digest: str, directory: Path, *, swap: Swap = Swap.BELT_GAP, swap_within_s: float | None = None
    ) -> None:
        """Asks the line to switch to this bundle.

        Args:
            digest: Of the bundle.
            directory: Its slot.
            swap: What the line waits for.
            swap_within_s: Longest wait; None = the line's own.

        Raises:
            UnavailableError: The line does not read.
        """
        self.digest = digest
        self._pipe.send(Load(digest=digest, directory=str(directory), swap=swap, swap_within_s=swap_within_s))

    def load_shadow(self, digest: str, directory: Path | None, samples: str) -> None:
        """Asks the line to take this challenger, or none (empty digest).

        Raises:
            UnavailableError: The line does not read.
        """
        self._pipe.send(LoadShadow(digest=digest, directory=str(directory or ""), samples=samples))

    def set_lot(self, lot: str, variety: str) -> None:
        """Announces the next lot to the line.

        Raises:
            UnavailableError: The line does not read.
        """
        self._pipe.send(SetLot(lot=lot, variety=variety))

    def go(self, present: Go) -> None:
        """Makes a standby the line: its life as such begins now.

        Args:
            present: What it goes on from.

        Raises:
            UnavailableError: It does not read.
        """
        self._pipe.send(present)
        self._told = True
        self.started_s = self.heard_s = time.monotonic()

    def kill(self) -> None:
        """Ends a line that does not answer; `LineGone` follows."""
        self._process.kill()

    def stop(self, timeout_s: float) -> None:
        """Asks the line to end, then makes it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(1.0)
        self._pipe.close()
