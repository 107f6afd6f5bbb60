"""Writes a folder for an agent without network, with the same bytes that other agents get from the broker."""

from pathlib import Path
from typing import Any, Protocol

from models.bundle import blobs_of, parse_manifest
from models.errors import ConflictError, InputError
from models.files import write_atomically
from models.messages import Desired, decode
from models.offline_export import BIN, DESIRED, SET
from models.topics import blob_topic

_TRIES = 10


class Source(Protocol):
    """A control plane that answers."""

    def get(self, path: str) -> Any:
        """Returns the decoded answer to a GET request."""


def export_agent(source: Source, agent_id: str, to: Path) -> dict[str, Any]:
    """Writes `tuf.json`, `tuf-bin.json`, `desired.json` and every blob of the bundle under the path of its topic.

    Raises:
        InputError: `export.not_empty`; `trust.unknown`: nothing is assigned to this agent.
        ConflictError: `export.changing`.
    """
    if to.exists() and any(to.iterdir()):
        raise InputError("export.not_empty", f"{to} is not empty.", expected="a new folder", got=str(to))
    signed = _signed(source, agent_id)
    desired = decode(signed[DESIRED], Desired)
    manifest = parse_manifest(bytes(source.get(f"/api/v1/blobs/{desired.bundle}")), digest=desired.bundle)
    blobs = blobs_of(manifest, lambda entry: bytes(source.get(f"/api/v1/blobs/{entry.sha256}")))
    files = {blob_topic(digest): data for digest, data in blobs} | signed
    for name, data in files.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return {"files": len(files), "bytes": sum(map(len, files.values())), "bundle": desired.bundle}


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
