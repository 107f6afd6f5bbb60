"""How the control plane's processes write their log: one line per event, foreign text made visible, no chatter."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from models.text import visible

log = logging.getLogger("sortline.log")
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


_OF_THE_DATABASE: Final = frozenset({"OperationalError", "InterfaceError", "TimeoutError"})
"""Exceptions of SQLAlchemy that say that the database is locked, slow, full or away."""
_MOST_REASONS: Final = 3
_LONGEST_REASON: Final = 300


class OutageFilter(logging.Filter):
    """Writes one line when the database goes, and one when it is back, with the number of lines between them.

    While it is away every thread and every request fails, and each would write a line or a traceback. A record belongs
    to the outage when it carries an exception of the database; the first is written as one line without a traceback, as
    is one for each other reason, up to three. An outage has ended when no record of it came for ten seconds.

    Args:
        clock: Monotonic seconds.
        start: Starts what watches for the end, given a function that returns when the outage is over.
    """

    QUIET_S: Final = 10.0

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        super().__init__()
        self._clock, self._start = clock, start or _start_thread
        self._lock = threading.Lock()
        self._began_s = self._last_s = 0.0
        self._reasons: set[str] = set()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is written; a record of an outage is shortened to one line."""
        reason = _reason_of(record)
        if not reason:
            return True
        with self._lock:
            self._last_s = self._clock()
            known = bool(self._reasons)
            if reason in self._reasons or len(self._reasons) >= _MOST_REASONS:
                self._left_out += 1
                return False
            if not known:
                self._began_s = self._last_s
            self._reasons.add(reason)
        if not known:
            self._start(self._watch)
        record.msg, record.args = "the database is away, which is written once: %s", (reason,)
        record.exc_info = record.exc_text = record.stack_info = None
        return True

    def _watch(self) -> None:
        pause = threading.Event()
        while not self.look():
            pause.wait(1.0)

    def look(self) -> bool:
        """Returns whether no outage is under way; one that has ended is written down."""
        with self._lock:
            if not self._reasons:
                return True
            if self._clock() - self._last_s < self.QUIET_S:
                return False
            lasted_s, left_out = self._last_s - self._began_s, self._left_out
            self._reasons, self._left_out = set(), 0
        log.warning("the database was away for %.0f s; %s lines that said so were left out", lasted_s, left_out)
        return True


def _start_thread(watch: Callable[[], None]) -> None:
    threading.Thread(target=watch, name="outage", daemon=True).start()


def _reason_of(record: logging.LogRecord) -> str:
    """Returns the first line of the database's complaint that a record carries; empty where it carries none."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    carried = [record.exc_info[1] if record.exc_info else None, *arguments]
    for error in (found for one in carried if isinstance(one, BaseException) for found in _chain(one)):
        if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ in _OF_THE_DATABASE:
            lines = str(getattr(error, "orig", None) or error).splitlines()
            return lines[0][:_LONGEST_REASON] if lines else type(error).__name__
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def configure_logging() -> None:
    """Sends the log of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter(_FORMAT))
    handler.addFilter(OutageFilter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
