"""The folder for a line without network: `sortline export` writes it, `sortline-agent import` reads it.

Beside these three files is every blob of the bundle, under the path of its topic (`models.topics.blob_topic`).
"""

from typing import Final

SET: Final = "tuf.json"
"""The set of signed metadata, as the broker retains it."""
BIN: Final = "tuf-bin.json"
"""The part of the assignments that the agent is in."""
DESIRED: Final = "desired.json"
"""The agent's desired state."""
