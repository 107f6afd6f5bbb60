"""The log: foreign text cannot forge a line, and libraries do not chatter."""

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from control_plane.config import BrokerConfig
from control_plane.fleet.connection import BrokerConnection
from control_plane.logs import OutageFilter, VisibleFormatter
from tests.simulators.processes import embedded_broker, free_port, wait_until


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


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.StringIO, Clock, OutageFilter]]:
    """A logger behind the filter, what it wrote, and the filter with its clock; nothing looks by itself."""
    stream, clock = io.StringIO(), Clock()
    found, handler = OutageFilter(clock, lambda _watch: None), logging.StreamHandler(stream)
    handler.addFilter(found)
    logger = logging.getLogger("sortline")
    before = logger.propagate, logger.level
    logger.propagate, logger.level = False, logging.INFO
    logger.addHandler(handler)
    yield logging.getLogger("sortline.test"), stream, clock, found
    logger.removeHandler(handler)
    logger.propagate, logger.level = before


def away(reason: str = "connection refused") -> OperationalError:
    return OperationalError("SELECT 1", {}, Exception(reason))


def fail(logger: logging.Logger, error: Exception) -> None:
    try:
        raise RuntimeError("a turn failed") from error
    except RuntimeError:
        logger.exception("a rollout turn failed; it is tried again")


def test_an_outage_of_the_database_is_two_lines_however_many_fail(written) -> None:
    logger, stream, clock, outages = written
    for _ in range(5_000):
        fail(logger, away())
        logger.warning("%s refused, the database is away: %s", "/agents", away())
        clock.now += 0.01
    assert not outages.look()
    clock.now += OutageFilter.QUIET_S + 1.0
    assert outages.look()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "the database is away, which is written once: connection refused",
        "the database was away for 50 s; 9999 lines that said so were left out",
    ]


def test_another_reason_and_everything_else_are_written(written) -> None:
    logger, stream, clock, outages = written
    fail(logger, away("connection refused"))
    fail(logger, away("the database system is starting up"))
    logger.warning("agent %s says %s", "line-1", ValueError("no database error"))
    fail(logger, ValueError("a defect"))
    text = stream.getvalue()
    assert "starting up" in text
    assert "no database error" in text
    assert text.count("Traceback") == 1, "a defect keeps its traceback, an outage has none"
    clock.now += OutageFilter.QUIET_S + 1.0
    assert outages.look()
    fail(logger, away())
    assert stream.getvalue().count("written once: connection refused") == 2, "a later outage is written again"


def test_an_outage_of_the_broker_is_two_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port, counters = free_port(), Counter()
    connection = BrokerConnection(BrokerConfig(port=port), lambda *_: None, counters)
    for client in (connection.control, connection.bulk):
        client.reconnect_delay_set(1, 1)
    with caplog.at_level(logging.INFO, "sortline.fleet"):
        connection.start()
        wait_until(lambda: counters["disconnected"] >= 4, "some attempts")
        with embedded_broker(tmp_path, "--port", str(port)):
            wait_until(lambda: connection.connected, "both connections")
            wait_until(lambda: "back" in caplog.text, "the line")
            connection.stop()
    said = [record.getMessage() for record in caplog.records if record.name == "sortline.fleet"]
    assert len(said) == 2, said
    assert said[0].startswith(f"the broker at 127.0.0.1:{port} is away")
    assert said[1].startswith("the broker is back after ")
