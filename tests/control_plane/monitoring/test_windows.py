"""The one reader of windows reads by an index and adds by two merges; the board remembers and finds the same."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, text

from control_plane.database.engine import reading
from control_plane.database.tables.columns import utc_now
from control_plane.monitoring.board import FleetBoard
from control_plane.monitoring.windows import RollingSum, arrived, items_compared, items_per_s, merged_window, windows_of
from control_plane.services import Services
from models.messages import Phase, Presence, encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import BOOT, A, B, batch, reported, say, window
from tests.simulators.plane import make_services

START = datetime(2026, 3, 1, tzinfo=UTC)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 25)), max_size=60))
def test_a_rolling_sum_has_the_counts_of_what_is_not_expired(steps: list[tuple[int, int]]) -> None:
    sums, kept = RollingSum(), []
    for second, (items, expired) in enumerate(steps):
        at = START + timedelta(seconds=second)
        sums.add(at, window(items))
        kept.append((at, items))
        until = at - timedelta(seconds=expired)
        had = len(kept)
        kept = [(at, n) for at, n in kept if at > until]
        assert sums.expire(until) is (len(kept) < had)
        total = sums.total()
        assert (total.items if total else 0) == sum(n for _, n in kept)
        assert (total.duration_ms if total else 0) == 10_000 * len(kept)


def test_windows_that_do_not_add_are_left_out() -> None:
    sums = RollingSum()
    sums.add(START, window(3))
    sums.add(START, window(4, bundle=B))
    assert sums.total().items == 3
    assert merged_window([window(3), window(4, bundle=B), window(5)], A).items == 8
    assert merged_window([], A) is None


def test_a_board_with_a_cache_shows_the_same_as_a_new_one(services: Services) -> None:
    say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT)))
    say(services, Channel.REPORTED, encode(reported(active=A, phase=Phase.COMMITTED)))
    services.board.all()
    for number in range(5):
        say(services, Channel.BATCH, batch(window(number + 1), window(2, bundle=B), first=3 * number))
        remembered = services.board.all()
        (fresh,) = FleetBoard(services.engine, services.store, services.live, services.signer.released_now).all()
        assert remembered[0].figures == fresh.figures
        assert remembered[0].completeness == fresh.completeness
        assert (remembered[0].state, remembered[0].runs, remembered[0].health) == (
            fresh.state,
            fresh.runs,
            fresh.health,
        )
    assert remembered[0].figures.items == 15
    assert remembered[0].completeness == pytest.approx(10 / 14)
    say(services, Channel.REPORTED, encode(reported(active=B, phase=Phase.COMMITTED)))
    assert services.board.all()[0].figures.items == 10, "the figures are those of the bundle that judges now"
    assert services.board.one("none") is None


def test_windows_give_champions_and_challengers(services: Services) -> None:
    beside = window(10, shadow={"pass>pass": 8, "pass>reject": 2, "skipped": 5}, shadow_bundle=B)
    say(services, Channel.BATCH, batch(window(20), beside, window(4, classes={"sound": 1})))
    with reading(services.engine) as session:
        now = utc_now()
        assert items_per_s(session, ["line-1", "line-2"], now) == {"line-1": 1.5}
        assert items_per_s(session, ["line-1"], now + timedelta(seconds=400)) == {}
        assert items_compared(session, "line-1", B, now - timedelta(seconds=60)) == 10
        assert items_compared(session, "line-1", A, now - timedelta(seconds=60)) == 0


def test_no_question_reads_the_whole_history(tmp_path: Path) -> None:
    """Every statement of the reader finds its rows by an index, and none of them sorts what it finds.

    On SQLite alone: a planner with statistics may rightly prefer a scan of a small table.
    """
    services = make_services(tmp_path / "plane")
    say(services, Channel.BATCH, batch(*(window() for _ in range(3))))
    asked: list[tuple[str, tuple[object, ...]]] = []
    event.listen(
        services.engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, parameters, *_: asked.append((statement, parameters)),
    )
    now = utc_now()
    with reading(services.engine) as session:
        windows_of(session, agent_id="line-1", usable=True, limit=360)
        windows_of(session, agent_id="line-1", since=now - timedelta(days=1))
        (newest, *_) = windows_of(session, limit=1)
        windows_of(session, before=newest.cursor)
        windows_of(session, bundle=A, limit=60)
        arrived(session, {"line-1": now - timedelta(seconds=30)})
        plans = []
        selects = [(s, p) for s, p in asked if re.search(r"FROM (window|event)\b", s)]
        for statement, parameters in selects:
            if statement.startswith("SELECT"):
                rows = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plans.append((statement, [row[-1] for row in rows]))
        session.connection().execute(text("SELECT 1"))
    assert len(plans) == 7
    for statement, plan in plans:
        steps = " | ".join(plan)
        assert "USING INDEX" in steps or "USING COVERING INDEX" in steps, (statement, plan)
        # What is left to sort has one time of arrival, or is what came in the last seconds.
        whole = [step for step in plan if "TEMP B-TREE FOR ORDER BY" in step]
        assert not whole or " IN (" in statement, (statement, plan)
    services.engine.dispose()
