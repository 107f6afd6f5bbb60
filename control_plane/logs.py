"""How the control plane's processes write their log: one line per event, foreign text made visible, no chatter."""

import logging
from typing import Final

from models.text import visible

_FORMAT: Final = "%(asctime)s %(name)s %(levelname)s %(message)s"
_CHATTER: Final = ("alembic", "tuf", "securesystemslib", "httpx", "httpx2", "httpcore", "asyncio", "multipart")
"""Libraries that write an INFO line at every operation; their warnings stay."""


class VisibleFormatter(logging.Formatter):
    """Writes control characters of messages as escapes, so that no foreign text forges a line or moves a cursor.

    A traceback keeps its own line feeds; each of its lines is made visible.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  name given by the standard library
        """Returns the line of a record."""
        record.message = visible(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802  name given by the standard library
        """Returns the traceback, line by line."""
        return "\n".join(map(visible, super().formatException(ei).split("\n")))  # type: ignore[arg-type]


def configure_logging() -> None:
    """Sends the log of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter(_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
