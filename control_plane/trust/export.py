"""Writes a folder for an agent without network, with the same bytes that other agents get from the broker."""

from pathlib import Path
from typing import Any, Protocol

from models.bundle import blobs_of, parse_manifest
from models.errors import ConflictError, InputError
from models.files import write_atomically
from models.messages import Desired, decode
from models.offline_export import BIN, DESIRED, SET, export_folder
from models.topics import BLOBS, blob_topic

_TRIES = 10


class Source(Protocol):
    """A control plane that answers."""

    def get(self, path: str) -> Any:
        """Returns the decoded answer to a GET request."""


def export_agent(source: Source, agent_id: str, to: Path) -> dict[str, Any]:
    """Writes `tuf.json`, `tuf-bin.json`, `desired.json` and every blob of the bundle under the path of its topic.

    They go into `sortline/AGENT` of the folder, whatever else is in it. An export that is there is brought up to date:
    blobs that it holds already are not written again, those of other bundles are removed.

    Raises:
        InputError: `agent.bad_id`; `export.not_writable`; `trust.unknown`: nothing is assigned to this agent.
        ConflictError: `export.changing`.
    """
    folder = export_folder(to, agent_id)
    signed = _signed(source, agent_id)
    desired = decode(signed[DESIRED], Desired)
    manifest = parse_manifest(bytes(source.get(f"/api/v1/blobs/{desired.bundle}")), digest=desired.bundle)
    blobs = blobs_of(manifest, lambda entry: bytes(source.get(f"/api/v1/blobs/{entry.sha256}")))
    # The signed files go last: a stick that is pulled out early holds the blobs that they name, or the former ones.
    files = {blob_topic(digest): data for digest, data in blobs} | signed
    written = 0
    try:
        for name, data in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, data)
                written += 1
        _remove_others(folder, set(files))
    except OSError as error:
        raise InputError(
            "export.not_writable", f"{folder} cannot be written.", expected="a place to write", got=error.strerror
        ) from error
    facts = {"files": len(files), "written": written, "bytes": sum(map(len, files.values()))}
    return facts | {"bundle": desired.bundle, "folder": str(folder)}


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Removes blobs of bundles that were exported here before, and nothing else."""
    for path in (folder / BLOBS).rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()


def _signed(source: Source, agent_id: str) -> dict[str, bytes]:
    """Returns documents that belong together: every signing changes the set, so reads between two equal sets match."""
    paths = {DESIRED: f"/api/v1/agents/{agent_id}/assignment", BIN: f"/api/v1/agents/{agent_id}/bin"}
    before = bytes(source.get("/api/v1/trust/set"))
    for _ in range(_TRIES):
        found = {name: bytes(source.get(path)) for name, path in paths.items()}
        after = bytes(source.get("/api/v1/trust/set"))
        if after == before:
            return found | {SET: after}
        before = after
    raise ConflictError("export.changing", "Assignments change all the time; export once the rollout is quiet.")
