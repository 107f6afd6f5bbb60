"""The file `connection.json`: whether the agent has its broker, and why not, for `sortline-agent status`."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_agent.delivery.state_file import StateFile
from edge_agent.state_directory import StateDirectory
from models.messages import Counter


class Connection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connection to the broker, as it changed last (`connection.json`)."""

    schema_version: Literal[1] = 1
    connected: bool = False
    at_ms: Counter = 0
    """When this was so, milliseconds since 1970 by the agent's clock."""
    broker: str = ""
    """Host and port."""
    code: str = ""
    """Why there is no connection, such as `broker.refused`; empty = there is one, or the cause is not known yet."""
    message: Annotated[str, msgspec.Meta(max_length=600)] = ""


def connection_file(root: Path) -> StateFile[Connection]:
    """Returns `connection.json` of a state directory."""
    return StateFile(StateDirectory(root).connection, Connection)
