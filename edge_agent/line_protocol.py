"""What supervisor and line process say to each other, over one socket pair.

Frames: 4 bytes length (big endian), then MessagePack of one tagged struct. Neither side trusts the other to be
alive: reads have a deadline, a broken pipe ends the line's reporting but never its sorting, and the supervisor
restarts a line that does not beat.
"""

import socket
import struct
from typing import Any, Final, Literal, cast

import msgspec

from models.errors import MessageError, UnavailableError
from models.messages import Evidence, Fault, Live, Swap
from models.windows import Window

MAX_FRAME_BYTES: Final = 256 * 1024
_HEADER = struct.Struct(">I")


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor: load this bundle beside the current one, then switch between two frames."""

    digest: str
    directory: str
    """A verified bundle; the line reads it, nothing else."""
    swap: Swap = Swap.BELT_GAP
    """What to wait for before the switch."""
    swap_within_s: float | None = None
    """Longest wait; None = the line's own."""


class LoadShadow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor: let this challenger judge the same items without moving anything; empty digest = none."""

    digest: str
    directory: str = ""
    samples: str = ""
    """Folder for items the two judge differently; empty = they are only counted."""


class SetLot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor: another lot begins, at the next gap on the belt."""

    lot: str
    variety: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor: finish the items in flight and end."""


class Go(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Supervisor to a standby: the line before is gone; open the camera and sort."""

    lifetime_items: int
    """Judged by this line so far."""
    lot: str
    variety: str


class Waiting(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Standby, every second: everything is in memory, `Go` makes it the line."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: the camera is open (or being reopened), frames are being judged or passed."""

    camera: str
    lanes: int


class Swapped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: from this frame on, `digest` judges."""

    digest: str
    load_ms: float
    gap_ms: float
    """Longest time the switch kept a frame waiting."""


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: the bundle was not taken; the current one goes on."""

    digest: str
    fault: Fault


class ModelFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: the running bundle broke (NaN, exception, too slow): items take the late outlet until a `Load` comes."""

    digest: str
    fault: Fault


class Tuned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: how many threads the libraries use here, and what was measured for it."""

    facts: dict[str, str]


class ShadowChanged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: from this frame on, `digest` is the challenger; empty = none."""

    digest: str
    load_ms: float = 0.0


class ShadowFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: the challenger was not taken, or given up; sorting goes on as before."""

    digest: str
    fault: Fault


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line, every second: it lives; `live` is passed on as it is."""

    digest: str
    items_on_bundle: int
    """Judged by `digest` since it was switched in."""
    belt_running: bool
    camera_fault: str
    live: Live
    lot: str = ""
    variety: str = ""
    terms: Literal["", "lot", "variety", "recipe"] = ""
    """Whose terms of the running recipe hold for this lot; empty = nothing judges."""


class WindowClosed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: ten seconds are over."""

    window: Window


class Faulted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: something happened that people should know (camera lost, camera back, ...)."""

    fault: Fault
    subject: str = ""
    """Which of several things of a kind: ejector and lane."""


class Pictured(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Line: a picture that shows what an event of the camera is about."""

    evidence: Evidence


ToLine = Load | LoadShadow | SetLot | Stop | Go
FromLine = (
    Ready
    | Waiting
    | Swapped
    | LoadFailed
    | ModelFailed
    | ShadowChanged
    | ShadowFailed
    | Beat
    | WindowClosed
    | Faulted
    | Tuned
    | Pictured
)


class Pipe:
    """One end of the socket pair. One thread reads, any one thread writes."""

    def __init__(self, connection: socket.socket) -> None:
        # Two socket objects on one connection: each has its own timeout, so the reader never changes the writer's.
        self._connection = connection
        self._outgoing = connection.dup()
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For select and for handing the descriptor to the child."""
        return self._connection.fileno()

    def send(self, message: ToLine | FromLine, timeout_s: float = 2.0) -> None:
        """Sends one message.

        Raises:
            UnavailableError: `pipe.closed` when the other side is gone or does not read.
            MessageError: `pipe.oversize`.
        """
        data = msgspec.msgpack.encode(message)
        if len(data) > MAX_FRAME_BYTES:
            raise MessageError("pipe.oversize", "A pipe message is too large.", expected=MAX_FRAME_BYTES, got=len(data))
        try:
            self._outgoing.settimeout(timeout_s)
            self._outgoing.sendall(_HEADER.pack(len(data)) + data)
        except OSError as error:
            raise UnavailableError("pipe.closed", "The other process does not read.", got=error) from error

    def receive(self, kind: object, timeout_s: float) -> ToLine | FromLine | None:
        """Returns the next message, or None when none came in time.

        Args:
            kind: `ToLine` or `FromLine`.
            timeout_s: Longest wait.

        Raises:
            UnavailableError: `pipe.closed`.
            MessageError: `pipe.malformed`: the other side is broken.
        """
        while True:
            message = self._take(kind)
            if message is not None:
                return message
            try:
                self._connection.settimeout(timeout_s)
                data = self._connection.recv(65536)
            except TimeoutError:
                return None
            except OSError as error:
                raise UnavailableError("pipe.closed", "The other process is gone.", got=error) from error
            if not data:
                raise UnavailableError("pipe.closed", "The other process is gone.", got="end of stream")
            self._buffer += data

    def _take(self, kind: object) -> ToLine | FromLine | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._buffer)
        if size > MAX_FRAME_BYTES:
            raise MessageError("pipe.malformed", "No frame of ours.", expected=f"<= {MAX_FRAME_BYTES}", got=size)
        end = _HEADER.size + size
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        try:
            message: ToLine | FromLine = msgspec.msgpack.Decoder(cast("Any", kind)).decode(data)
        except msgspec.MsgspecError as error:
            raise MessageError("pipe.malformed", "No message of ours.", expected=kind, got=error) from error
        return message

    def close(self) -> None:
        """Closes this end."""
        self._outgoing.close()
        self._connection.close()
