"""Import without a network: a folder, for example from a stick, replaces what the broker would deliver.

`stage_import` copies it beside the agent's state, whole or not at all; a running supervisor (or the next one) finds it
and treats it as if it had arrived over the network: the same verification, the same fetch, self-test and trial. The
folder of `sortline export`: `tuf.json`, `tuf-bin.json`, `desired.json`, and every blob under the path of its topic.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from edge_agent.mqtt import Incoming
from edge_agent.state_directory import StateDirectory
from models.chunking import CHUNK_BYTES
from models.errors import CapacityError, InputError, SortlineError
from models.files import sync_directory
from models.messages import MAX_CONTROL_BYTES, Desired, decode
from models.offline_export import BIN, DESIRED, SET
from models.signed_set import MAX_SET_BYTES
from models.topics import BLOBS

log = logging.getLogger("sortline.importing")
_MAX_FILES: Final = 20_000


class Export(NamedTuple):
    """The unverified content of a folder; the broker would have delivered the same bytes."""

    offered: bytes
    own_bin: bytes
    document: bytes


def read_export(source: Path) -> Export:
    """Returns signed metadata and desired state of a folder.

    Raises:
        InputError: `import.not_an_export`.
    """
    limits = {SET: MAX_SET_BYTES, BIN: MAX_SET_BYTES, DESIRED: MAX_CONTROL_BYTES}
    return Export(*(_read(source / name, limit) for name, limit in limits.items()))


def stage_import(source: Path, state_dir: Path) -> Desired:
    """Copies the content of a folder to the place that the agent watches.

    Args:
        source: Written by `sortline export`.
        state_dir: Of the agent; it may be running.

    Returns:
        The desired state of the folder, not verified yet.

    Raises:
        InputError: `import.not_an_export`: something is missing, too large or no regular file.
        MessageError: `desired.json` is none.
        CapacityError: `import.disk_full`.
    """
    found = read_export(source)
    desired = decode(found.document, Desired)
    files = {SET: found.offered, BIN: found.own_bin, DESIRED: found.document}
    blobs = sorted(path for path in (source / BLOBS).rglob("*") if not path.is_dir())
    if not blobs or len(blobs) > _MAX_FILES:
        raise _no_export(source, f"1 to {_MAX_FILES} blobs", len(blobs))
    directory = StateDirectory(state_dir)
    building, staged = directory.building, directory.staged
    shutil.rmtree(building, ignore_errors=True)
    try:
        for name, data in files.items():
            _write(building / name, data)
        for path in blobs:
            _write(building / path.relative_to(source), _read(path, CHUNK_BYTES))
        shutil.rmtree(staged, ignore_errors=True)
        building.rename(staged)
        sync_directory(state_dir)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CapacityError("import.disk_full", "The folder does not fit beside the agent.", got=error) from error
    return desired


class StagedImport:
    """A staged import, as the supervisor reads it.

    Args:
        state_dir: Of the agent.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = StateDirectory(state_dir)
        self._folder = self._directory.staged
        self._seen = 0
        self._bundle = ""

    @property
    def present(self) -> bool:
        """Whether the import can still provide blobs."""
        return bool(self._bundle)

    def news(self) -> Export | None:
        """Returns the content of a folder that was not taken up yet; one whose bundle is in a slot is removed."""
        if self._bundle and self._directory.slot(self._bundle).is_dir():
            shutil.rmtree(self._folder, ignore_errors=True)
            self._bundle = ""
        try:
            stamp = self._folder.stat().st_ino
            if stamp == self._seen:
                return None
            self._seen = stamp
            found = read_export(self._folder)
            self._bundle = decode(found.document, Desired).bundle
        except FileNotFoundError:
            return None
        except (OSError, SortlineError) as error:
            log.warning("what was imported cannot be used: %s", error)
            return None
        return found

    def blob(self, topic: str) -> bytes | None:
        """Returns the bytes that the folder holds for a topic; the caller must verify them."""
        try:
            return _read(self._folder / topic, CHUNK_BYTES) if self._bundle else None
        except InputError:
            return None


class Network(Protocol):
    """The part of the link that is needed."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Sends; False when it could not."""

    def subscribe(self, topics: list[str]) -> None:
        """Subscribes to exact topics."""

    def unsubscribe(self, topics: list[str]) -> None:
        """Ends subscriptions."""


class ImportOrNetwork:
    """A connection whose blobs come from the stick as far as it has them, else from the broker.

    Args:
        network: The link.
        stick: What was staged.
        deliver: Gets an `Incoming` for every blob of the stick.
    """

    def __init__(self, network: Network, stick: StagedImport, deliver: Callable[[Incoming], bool]) -> None:
        self._network, self._stick, self._deliver = network, stick, deliver

    @property
    def connected(self) -> bool:
        """Whether asking for a blob makes sense."""
        return self._network.connected or self._stick.present

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Sends; False when it could not."""
        return self._network.publish(topic, payload, qos=qos, retain=retain)

    def subscribe(self, topics: list[str]) -> None:
        """Delivers what the stick has, subscribes to the rest."""
        rest = []
        for topic in topics:
            data = self._stick.blob(topic)
            if data is None:
                rest.append(topic)
            else:
                self._deliver(Incoming(topic, data))
        self._network.subscribe(rest)

    def unsubscribe(self, topics: list[str]) -> None:
        """Ends subscriptions."""
        self._network.unsubscribe(topics)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(data)


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file() or path.is_symlink():
        raise _no_export(path, "a file", "nothing")
    with path.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise _no_export(path, f"<= {limit} bytes", f"{path.stat().st_size} bytes")
    return data


def _no_export(path: Path, expected: object, got: object) -> InputError:
    return InputError("import.not_an_export", f"{path}: no folder of `sortline export`.", expected=expected, got=got)
