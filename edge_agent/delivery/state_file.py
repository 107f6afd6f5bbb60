"""A small checksummed state file, replaced atomically; the agent's bundles, its challenger and its lot have one each.

A file that is cut, torn or altered is noticed by its checksum and set aside; it never stops an agent. Law:
`read()` after `save(state)` returns `state`, also after a power cut in between: then the state before.
"""

import contextlib
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from edge_agent.delivery.lifecycle import ChallengerState, SlotState
from edge_agent.state_directory import StateDirectory
from models.bundle import sha256
from models.errors import InputError
from models.files import write_atomically

T = TypeVar("T", bound=msgspec.Struct)
_MAX_BYTES: Final = 64 * 1024


class Framing(Enum):
    """The layout of state and checksum in a file."""

    OBJECT = "object"
    """`{"state": ..., "sha256": "..."}`"""
    PAIR = "pair"
    """`[..., "sha256"]`"""


class _Object(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state: msgspec.Raw
    sha256: str


class StateFile(Generic[T]):
    """Keeps one state on disk.

    Args:
        path: Path of the file.
        kind: Type of the state.
        framing: Layout of the file.
        backup: Whether the state before is kept beside it, with `.bak` at the end of its name.
        code: Error code of a file that cannot be read.
        on_quarantine: Called with the new path of a broken file that was set aside, and what was wrong with it.
    """

    def __init__(
        self,
        path: Path,
        kind: type[T],
        *,
        framing: Framing = Framing.PAIR,
        backup: bool = False,
        code: str = "state.unreadable",
        on_quarantine: Callable[[Path, str], None] = lambda _path, _why: None,
    ) -> None:
        self._path, self._kind, self._framing, self._code = path, kind, framing, code
        self._backup = path.with_name(f"{path.name}.bak") if backup else None
        self._on_quarantine = on_quarantine

    @property
    def _places(self) -> tuple[Path, ...]:
        return (self._path,) if self._backup is None else (self._path, self._backup)

    def read(self) -> T | None:
        """Returns the state on disk, else its backup; None = there is neither. Changes nothing.

        Raises:
            InputError: What there is cannot be read.
        """
        broken: InputError | None = None
        for path in self._places:
            try:
                return self._parse(path)
            except FileNotFoundError:
                continue
            except InputError as error:
                broken = broken or error
        if broken is not None:
            raise broken
        return None

    def load(self) -> T | None:
        """Reads like `read`, for the owner of the file: a broken file is set aside."""
        for path in self._places:
            try:
                return self._parse(path)
            except FileNotFoundError:
                continue
            except InputError as error:
                broken = path.with_name(f"{path.name}.broken-{os.getpid()}")
                with contextlib.suppress(OSError):  # a disk that takes no change is no reason not to start
                    path.rename(broken)
                self._on_quarantine(broken, str(error))
        return None

    def save(self, state: T) -> None:
        """Makes the state durable before its effect takes place.

        Raises:
            OSError: The disk refused; the old state stays in force.
        """
        body = msgspec.json.encode(state)
        raw, digest = msgspec.Raw(body), sha256(body)
        framed = _Object(raw, digest) if self._framing is Framing.OBJECT else (raw, digest)
        if self._backup is not None and self._path.exists():
            write_atomically(self._backup, self._path.read_bytes(), sync_folder=False)
        write_atomically(self._path, msgspec.json.encode(framed))

    def _parse(self, path: Path) -> T:
        try:
            with path.open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise self._unreadable(path, f"> {_MAX_BYTES} bytes")
            if self._framing is Framing.OBJECT:
                framed = msgspec.json.decode(data, type=_Object)
                body, digest = bytes(framed.state), framed.sha256
            else:
                raw, digest = msgspec.json.decode(data, type=tuple[msgspec.Raw, str])
                body = bytes(raw)
            if sha256(body) != digest:
                raise self._unreadable(path, "a wrong checksum")
            return msgspec.json.decode(body, type=self._kind)
        except FileNotFoundError:
            raise
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, got: object) -> InputError:
        return InputError(
            self._code, f"{path.name} cannot be read.", expected="what this agent wrote", got=str(got)[:200]
        )


def champion_file(root: Path, on_quarantine: Callable[[Path, str], None] = lambda *_: None) -> StateFile[SlotState]:
    """Returns `state.json` of a state directory: the bundle that judges, and the progress of the next one."""
    path = StateDirectory(root).champion
    return StateFile(path, SlotState, framing=Framing.OBJECT, backup=True, on_quarantine=on_quarantine)


def challenger_file(
    root: Path, on_quarantine: Callable[[Path, str], None] = lambda *_: None
) -> StateFile[ChallengerState]:
    """Returns `challenger.json` of a state directory. A lost one is restored from the retained desired state."""
    return StateFile(StateDirectory(root).challenger, ChallengerState, on_quarantine=on_quarantine)
