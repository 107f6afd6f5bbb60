"""The log: foreign text cannot forge a line, and libraries do not chatter."""

import logging
import sys

from control_plane.logs import VisibleFormatter


def line(message: str, *arguments: object, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("sortline.test", logging.INFO, __file__, 1, message, arguments, info)
    return VisibleFormatter("%(name)s %(levelname)s %(message)s").format(record)


def test_foreign_text_stays_within_its_line() -> None:
    found = line("agent says %s", "x\n2026-01-01 sortline.api INFO forged\x1b[2J")
    assert found == "sortline.test INFO agent says x\\n2026-01-01 sortline.api INFO forged\\x1b[2J"


def test_a_traceback_keeps_its_lines_and_nothing_else() -> None:
    try:
        raise ValueError("bad \x1b[31m text")
    except ValueError:
        found = line("failed", error=sys.exc_info()[1])
    assert "\x1b" not in found
    assert found.splitlines()[0] == "sortline.test INFO failed"
    assert found.splitlines()[-1] == "ValueError: bad \\x1b[31m text"
