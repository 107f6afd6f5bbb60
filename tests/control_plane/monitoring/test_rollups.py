"""Sums over spans equal the sum of the windows, whatever order, repetition, restart or clock they arrive with."""

import random
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from functools import reduce

import msgspec
import numpy as np
import pytest
from sqlmodel import col, select

from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.windows import Rollup
from control_plane.fleet.ingest import Ingest
from control_plane.fleet.intake import Message
from control_plane.fleet.spooled import PictureShelf
from control_plane.monitoring.ledger import WindowLedger
from control_plane.monitoring.rollups import DAY, HOUR, MINUTE, fold_all, start_of
from control_plane.monitoring.windows import lots_of, spans_of
from control_plane.services import Services
from models.messages import Batch, Record, RecordKind, encode_batch
from models.topics import Channel
from models.windows import Window, merge
from tests.control_plane.fleet.test_fleet import A, B, window

BOOTS = ("0" * 16, "1" * 16)
NOW = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)


def counted(number: int, lot: str = "", bundle: str = A, started: datetime = NOW, **changes: object) -> Window:
    """A window whose every count is a function of its number."""
    items = number % 7 + 1
    features = np.zeros((2, 16), "<u4")
    features[0, number % 16] = items
    return window(
        items,
        bundle=bundle,
        lot=lot,
        started_ms=round(started.timestamp() * 1000),
        features=features.tobytes(),
        nulls=(0, items),
        views=3 * items,
        ejections={f"x{number % 3}": 1},
        **changes,
    )


def store(
    services: Services, windows: list[tuple[str, int, Window]], at: datetime = NOW, agent: str = "line-1"
) -> None:
    records = tuple(
        Record(boot_id=boot, seq=seq, kind=RecordKind.WINDOW, payload=msgspec.msgpack.encode(one))
        for boot, seq, one in windows
    )
    message = Message(0, at, agent, Channel.BATCH, encode_batch(Batch(records=records)), retained=False)
    assert services.ingest.store([message]) == []


def restart(services: Services) -> None:
    """Everything an ingest keeps in memory is gone."""
    services.ingest = Ingest(
        services.engine,
        services.intake,
        services.outbox,
        lambda _agent, _request: None,
        services.counters,
        WindowLedger(services.counters),
        PictureShelf(services.store.put, services.counters),
    )


def comparable(one: Window | None) -> dict:
    """What is exact of a sum: all but the lead times, which are those of one of its windows."""
    assert one is not None
    return msgspec.to_builtins(msgspec.structs.replace(one, lead_ms={}), builtin_types=(bytes,))


def expected(windows: list[Window], span_s: int) -> dict[tuple, dict]:
    groups: dict[tuple, list[Window]] = defaultdict(list)
    for one in windows:
        start = start_of(datetime.fromtimestamp(one.started_ms / 1000, UTC), span_s)
        groups[start, one.bundle, one.lot, one.variety].append(one)
    return {key: comparable(reduce(merge, found)) for key, found in groups.items()}


def found(services: Services, span_s: int) -> dict[tuple, dict]:
    with reading(services.engine) as session:
        sums = spans_of(session, "line-1", span_s, NOW - timedelta(days=20), NOW + timedelta(days=20))
    return {(one.start, one.bundle, one.lot, one.variety): comparable(one.window) for one in sums}


@pytest.mark.parametrize("seed", range(8))
def test_sums_equal_the_windows_in_any_order_with_duplicates_and_restarts(services: Services, seed: int) -> None:
    chance = random.Random(seed)
    windows, lot, count, pace_s = [], "a", chance.randint(1, 90), chance.choice([10, 400, 9000])
    for number in range(count):
        lot = chance.choice("abc") if chance.random() < 0.1 else lot
        started = NOW - timedelta(seconds=pace_s * (count - number))
        bundle = A if chance.random() < 0.8 else B
        windows.append((chance.choice(BOOTS), number, counted(chance.randrange(99), lot, bundle, started)))
    sent = windows + chance.choices(windows, k=count // 3)
    if chance.random() < 0.7:
        chance.shuffle(sent)
    while sent:
        size = chance.choice([1, 1, 5, 40])
        store(services, sent[:size])
        sent = sent[size:]
        if chance.random() < 0.2:
            restart(services)
        if chance.random() < 0.1:
            with writing(services.engine) as session:
                fold_all(session, NOW + timedelta(days=1), chance.choice([1, 1000]))
                session.commit()
    for span_s in (MINUTE, HOUR, DAY):
        assert found(services, span_s) == expected([one for *_, one in windows], span_s)
    with reading(services.engine) as session:
        by_lot = lots_of(session, "line-1", NOW - timedelta(days=30))
    assert sum(one.window.items for one in by_lot) == sum(one.items for *_, one in windows)
    assert {one.lot for one in by_lot} == {one.lot for *_, one in windows}


def test_the_row_of_a_longer_span_is_the_sum_of_the_folded_rows_below(services: Services) -> None:
    start = datetime(2026, 3, 13, 9, 58, tzinfo=UTC)
    for number in range(60):
        store(services, [(BOOTS[0], number, counted(number, started=start + timedelta(seconds=10 * number)))])
    with reading(services.engine) as session:
        rows = session.exec(select(Rollup).order_by(col(Rollup.span_s), col(Rollup.start))).all()
    minutes, hours = ([row for row in rows if row.span_s == span] for span in (MINUTE, HOUR))
    assert [row.folded for row in minutes] == [True] * 9 + [False]
    assert [row.items for row in hours] == [
        sum(row.items for row in minutes if row.folded and row.start.hour == hour) for hour in (9, 10)
    ]
    assert [row.folded for row in hours] == [True, False]
    assert [row.items for row in rows if row.span_s == DAY] == [hours[0].items]
    with writing(services.engine) as session:
        assert fold_all(session, start + timedelta(days=3), 100) == 2
        session.commit()
    with reading(services.engine) as session:
        (day,) = session.exec(select(Rollup).where(Rollup.span_s == DAY)).all()
    assert (day.windows, day.items) == (60, sum(number % 7 + 1 for number in range(60)))


@pytest.mark.parametrize("jump", [timedelta(days=365), timedelta(days=-365), timedelta(minutes=10)])
def test_a_window_of_a_clock_that_jumped_is_placed_by_its_arrival(services: Services, jump: timedelta) -> None:
    at = utc_now()
    store(services, [(BOOTS[0], 0, counted(1, started=at - timedelta(seconds=10)))], at)
    store(services, [(BOOTS[0], 1, counted(2, started=at + jump))], at)
    with reading(services.engine) as session:
        sums = spans_of(session, "line-1", MINUTE, at - timedelta(minutes=5), at + timedelta(minutes=5))
    assert sum(one.windows for one in sums) == 2
    assert sum(one.by_arrival for one in sums) == 1
    assert services.counters["windows_by_arrival"] == 1


def test_windows_that_do_not_add_are_counted_as_left_out_and_hide_no_others(services: Services) -> None:
    other = window(4, features=bytes(64 * 3), nulls=(4, 4, 4), started_ms=round(NOW.timestamp() * 1000))
    store(services, [(BOOTS[0], 0, counted(1)), (BOOTS[0], 1, other), (BOOTS[0], 2, counted(2))])
    with reading(services.engine) as session:
        (one,) = spans_of(session, "line-1", MINUTE, NOW, NOW + timedelta(minutes=1))
    assert (one.windows, one.left_out, one.window.items) == (3, 1, 2 + 3)


def test_counts_beyond_the_format_are_left_out_and_later_windows_are_added(services: Services) -> None:
    most = window(2**53, features=b"", nulls=(), started_ms=round(NOW.timestamp() * 1000))
    store(services, [(BOOTS[0], number, most) for number in range(2)])
    store(services, [(BOOTS[0], 2, counted(2))])
    with reading(services.engine) as session:
        (one,) = spans_of(session, "line-1", MINUTE, NOW, NOW + timedelta(minutes=1))
    assert (one.windows, one.left_out, one.window.items) == (3, 2, 3)


def test_a_lot_is_the_sum_of_its_rows_and_one_that_comes_again_is_another(services: Services) -> None:
    start = NOW - timedelta(hours=20)
    plan = [("7", start), ("8", start + timedelta(hours=1)), ("7", start + timedelta(hours=15))]
    sent = [
        (BOOTS[0], 1000 * k + n, counted(n, lot, started=at + timedelta(minutes=n)))
        for k, (lot, at) in enumerate(plan)
        for n in range(90 if k == 0 else 30)
    ]
    store(services, sent)
    with reading(services.engine) as session:
        lots = lots_of(session, "line-1", start)
        assert [(one.lot, one.windows) for one in lots] == [("7", 90), ("8", 30), ("7", 30)]
        assert lots[0].first_at == start
        assert lots[0].window.items == sum(n % 7 + 1 for n in range(90))
        assert [one.lot for one in lots_of(session, "line-1", NOW - timedelta(hours=6))] == ["7"]
