"""Writes what an agent without network needs into a folder: the same bytes that agents with one get from the broker."""

from pathlib import Path
from typing import Any, Protocol

from models.bundle import blobs_of, parse_manifest
from models.errors import InputError
from models.files import write_atomically
from models.messages import Desired, blob_topic, decode

SET, DESIRED = "tuf.json", "desired.json"


class Source(Protocol):
    """A control plane that answers."""

    def get(self, path: str) -> Any:
        """Reads."""


def export_agent(source: Source, agent_id: str, to: Path) -> dict[str, Any]:
    """Writes `tuf.json`, `desired.json` and every blob of the bundle under the path of its topic.

    Raises:
        InputError: `export.not_empty`; `trust.unknown`: nothing is assigned to this agent.
    """
    if to.exists() and any(to.iterdir()):
        raise InputError("export.not_empty", f"{to} is not empty.", expected="a new folder", got=str(to))
    document = bytes(source.get(f"/api/v1/agents/{agent_id}/assignment"))
    desired = decode(document, Desired)
    manifest = parse_manifest(bytes(source.get(f"/api/v1/blobs/{desired.bundle}")), digest=desired.bundle)
    blobs = blobs_of(manifest, lambda entry: bytes(source.get(f"/api/v1/blobs/{entry.sha256}")))
    files = {blob_topic(digest): data for digest, data in blobs}
    files |= {DESIRED: document, SET: bytes(source.get("/api/v1/trust/set"))}
    for name, data in files.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    return {"files": len(files), "bytes": sum(map(len, files.values())), "bundle": desired.bundle}
