"""A small checksummed state file, replaced atomically, with a backup."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.delivery.lifecycle import SlotState
from models.bundle import sha256
from models.files import write_atomically

_MAX_STATE_BYTES: Final = 64 * 1024


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state: msgspec.Raw
    sha256: str


class StateFile:
    """Keeps a `SlotState` on disk: atomically replaced, checksummed, with the one before as backup.

    Args:
        directory: The agent's state directory.
        on_quarantine: Called with the path of a broken file after it was set aside.
    """

    def __init__(self, directory: Path, on_quarantine: Callable[[Path], None] = lambda _path: None) -> None:
        self._path = directory / "state.json"
        self._backup = directory / "state.json.bak"
        self._on_quarantine = on_quarantine

    def load(self) -> SlotState:
        """The state, or its backup, or a fresh one: a broken file never stops an agent."""
        for path in (self._path, self._backup):
            if not path.exists():
                continue
            state = _read(path)
            if state is not None:
                return state
            broken = path.with_name(f"{path.name}.broken-{os.getpid()}")
            path.rename(broken)
            self._on_quarantine(broken)
        return SlotState()

    def save(self, state: SlotState) -> None:
        """Makes the state durable before its effect takes place.

        Raises:
            OSError: The disk refused; the old state stands.
        """
        body = msgspec.json.encode(state)
        data = msgspec.json.encode(_Envelope(msgspec.Raw(body), sha256(body)))
        if self._path.exists():
            old = self._path.read_bytes()
            write_atomically(self._backup, old, sync_folder=False)
        write_atomically(self._path, data)


def _read(path: Path) -> SlotState | None:
    try:
        data = path.read_bytes()
        if len(data) > _MAX_STATE_BYTES:
            return None
        envelope = msgspec.json.decode(data, type=_Envelope)
        body = bytes(envelope.state)
        return msgspec.json.decode(body, type=SlotState) if sha256(body) == envelope.sha256 else None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
