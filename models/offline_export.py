"""The folder for a line without network: `sortline export` writes it, `sortline-agent import` reads it.

On a stick it is `sortline/AGENT`, so that a stick may hold other files and several lines. Beside the three files named
here is every blob of the bundle, under the path of its topic (`models.topics.blob_topic`).
"""

from pathlib import Path
from typing import Final

from models.topics import check_agent_id

SET: Final = "tuf.json"
"""The set of signed metadata, as the broker retains it."""
BIN: Final = "tuf-bin.json"
"""The part of the assignments that the agent is in."""
DESIRED: Final = "desired.json"
"""The agent's desired state."""
_HOME: Final = "sortline"


def export_folder(stick: Path, agent_id: str) -> Path:
    """Returns where the export of an agent is on a stick, or in any folder.

    Raises:
        InputError: `agent.bad_id`.
    """
    return stick / _HOME / check_agent_id(agent_id)


def find_export(place: Path, agent_id: str) -> Path:
    """Returns the folder of an export: the place itself where it is one, else the agent's folder in it."""
    return place if (place / DESIRED).exists() else export_folder(place, agent_id)
