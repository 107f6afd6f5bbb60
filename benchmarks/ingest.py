"""What it costs to store and add up windows, and to ask for a season of them: `python -m benchmarks.ingest [--quick]`.

Real batches go through the real ingest into SQLite, and into PostgreSQL where its programs are installed: as many
messages a transaction as a fleet of 10,000 cameras sends in 0.2 s. The baseline in the same run is the same ingest with
a ledger that counts nothing. Each window has 16 features and 4 lanes. The season is written as sums, as it is left when
the windows are gone, and asked for through the API and the pages.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from fastapi.testclient import TestClient
from rich.console import Console
from sqlalchemy import insert

from benchmarks.figures import Figures, Row
from control_plane.database.engine import writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.windows import FidelityHour, Rollup
from control_plane.fleet.ingest import Ingest
from control_plane.fleet.intake import Message
from control_plane.fleet.window_payload import pack_window
from control_plane.monitoring.ledger import WindowLedger
from control_plane.monitoring.retention import database_bytes
from control_plane.monitoring.rollups import DAY, HOUR, MINUTE
from control_plane.monitoring.upkeep import Upkeep
from control_plane.services import Services
from models.histogram import Histogram, pack_counts
from models.messages import Batch, Record, RecordKind, encode_batch
from models.topics import Channel
from models.windows import LaneCounts, Window
from tests.simulators.plane import make_client, make_services
from tests.simulators.postgres import empty, private_postgres

FEATURES: Final = 16
LANES: Final = 4
BUNDLE: Final = "a" * 64
PER_TRANSACTION: Final = 200
"""Messages of 0.2 s, at 1,000 a second."""
NEEDED_PER_S: Final = 500.0
"""Per core: 10,000 cameras with one window per 10 s send 1,000 to two replicas, each on a core."""
SLOWEST_PAGE_MS: Final = 100.0


class NoLedger:
    """Counts nothing: the baseline."""

    def record(self, session: object, arrivals: object, reports: object) -> None:
        """Does nothing."""


def made_window(rng: np.random.Generator, started: datetime, lot: str) -> Window:
    """A window of 60 items in four lanes."""
    lanes, whole = [], np.zeros((FEATURES, 16), np.int64)
    for _ in range(LANES):
        counts = np.stack([rng.multinomial(15, [1 / 16] * 16) for _ in range(FEATURES)])
        bad = int(rng.binomial(15, 0.1))
        tables = {"classes": {"sound": 15 - bad, "rot": bad}, "outlets": {"pass": 15 - bad, "reject": bad}}
        lanes.append(LaneCounts(items=15, features=pack_counts(counts), nulls=(0,) * FEATURES, **tables))
        whole += counts
    bad = sum(lane.classes["rot"] for lane in lanes)
    histograms = []
    for mean, count in ((2.0, 60), (1.0, 60), (-1.0, 8)):
        histogram = Histogram()
        for value in rng.lognormal(mean, 0.3, count):
            histogram.add(float(value))
        histograms.append(histogram)
    return Window(
        started_ms=round(started.timestamp() * 1000),
        duration_ms=10_000,
        bundle=BUNDLE,
        lot=lot,
        variety="gala",
        frames=300,
        items=60,
        views=600,
        lanes=(15,) * LANES,
        classes={"sound": 60 - bad, "rot": bad},
        outlets={"pass": 60 - bad, "reject": bad},
        latency_ms=histograms[0],
        inference_ms=histograms[1],
        jitter_ms=histograms[2],
        features=whole.astype("<u4").tobytes(),
        nulls=(0,) * FEATURES,
        by_lane=tuple(lanes),
        shots={"fired": bad},
        lead_ms={f"{lane}/reject": 30.0 for lane in range(LANES)},
    )


def messages_of(rng: np.random.Generator, cameras: int, rounds: int, begin: datetime) -> list[list[Message]]:
    """Returns transactions: every camera sends one window per round of ten seconds."""
    windows = [made_window(rng, begin, "lot 1") for _ in range(50)]
    found: list[Message] = []
    for number in range(rounds):
        started = begin + timedelta(seconds=10 * number)
        arrived = started + timedelta(seconds=10.3)
        for camera in range(cameras):
            window = msgspec.structs.replace(
                windows[(camera + number) % len(windows)],
                started_ms=round(started.timestamp() * 1000),
                lot=f"lot {number // 240}",
                lifetime_items=60 * (number + 1),
            )
            payload = msgspec.msgpack.encode(window)
            record = Record(boot_id="0" * 16, seq=number, kind=RecordKind.WINDOW, payload=payload)
            body = encode_batch(Batch(records=(record,)))
            found.append(Message(0, arrived, f"camera-{camera}", Channel.BATCH, body, retained=False))
    return [found[start : start + PER_TRANSACTION] for start in range(0, len(found), PER_TRANSACTION)]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def stored(services: Services, transactions: list[list[Message]], ledger: Any) -> dict[str, float]:
    """Stores everything; returns seconds of this process and of the clock per window, and how memory grew."""
    ingest = Ingest(services.engine, services.intake, services.outbox, lambda _a, _r: None, services.counters, ledger)
    services.outbox.acknowledge = lambda _agent, _ack: None
    for transaction in transactions[:2]:
        ingest.store(transaction)
    half, resident = len(transactions) // 2, 0.0
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for number, transaction in enumerate(transactions[2:]):
        if number == half:
            resident = resident_mb()
        ingest.store(transaction)
    count = sum(map(len, transactions[2:]))
    return {
        "cpu_ms": 1000.0 * (time.process_time() - cpu_s) / count,
        "wall_ms": 1000.0 * (time.perf_counter() - wall_s) / count,
        "grown_mb": resident_mb() - resident,
    }


def measure_ingest(figures: Figures, kind: str, fresh: Callable[[], Any], cameras: int, rounds: int) -> None:
    """Ingest without and with sums, retention, and the room that a day of a camera takes."""
    begin = utc_now() - timedelta(seconds=10 * rounds + 60)
    begin = datetime.fromtimestamp(begin.timestamp() // 60 * 60, UTC)
    transactions = messages_of(np.random.default_rng(1), cameras, rounds, begin)
    with fresh() as services:
        bare = stored(services, transactions, NoLedger())
    with fresh() as services:
        before = database_bytes(services.engine)
        whole = stored(services, transactions, WindowLedger(services.counters))
        day_mb = (database_bytes(services.engine) - before) / (cameras * rounds) * 8640 / 1e6
        upkeep = Upkeep(services.engine, services.config.retention, services.counters, "benchmark")
        wall_s = time.perf_counter()
        upkeep.turn(utc_now() + timedelta(days=services.config.retention.windows_days, hours=1))
        deleted = services.counters["deleted_windows"]
        deleting_s = time.perf_counter() - wall_s
    rows: list[Row] = [
        ("windows stored and added up", float(cameras * rounds), ""),
        ("time of one core per window, stored alone", bare["cpu_ms"], "ms"),
        ("time of one core per window, with sums and fidelity", whole["cpu_ms"], "ms"),
        ("with sums / stored alone", whole["cpu_ms"] / bare["cpu_ms"], ""),
        ("windows per second and core", 1000.0 / whole["cpu_ms"], "/s"),
        ("windows per second by the clock", 1000.0 / whole["wall_ms"], "/s"),
        ("memory grown in the second half", whole["grown_mb"], "MB"),
        ("room of a camera-day, windows and sums", day_mb, "MB"),
        ("windows deleted per second by the clock", deleted / deleting_s, "/s"),
    ]
    bounds = {
        "windows per second and core": (">=", NEEDED_PER_S),
        "windows deleted per second by the clock": (">=", NEEDED_PER_S),
        "memory grown in the second half": ("<=", 20.0),
    }
    figures.table(f"{kind}: ingest", rows, bounds)


def write_season(services: Services, lines: int, days: int) -> datetime:
    """Writes the sums of a season, two lots an hour; returns its end."""
    rng = np.random.default_rng(2)
    end = datetime.fromtimestamp(utc_now().timestamp() // DAY * DAY, UTC)
    windows = [made_window(rng, end, "") for _ in range(20)]
    packed = [(one.items, pack_window(msgspec.msgpack.encode(one))) for one in windows]
    with writing(services.engine) as session:
        for line in range(lines):
            agent = f"line-{line}"
            session.add(Agent(id=agent, window_at=end, stored_at=end))
            session.flush()
            sums, hours = [], []
            for day in range(days):
                midnight = end - timedelta(days=days - day)
                spans = [(DAY, 0, 86_400), *((HOUR, 3600 * hour, 1800) for hour in range(24))]
                if day >= days - 2:
                    spans += [(MINUTE, 60 * minute, 30) for minute in range(1440)]
                for span_s, offset_s, length_s in spans:
                    start = midnight + timedelta(seconds=offset_s)
                    for part in range(2):
                        first = start + timedelta(seconds=part * length_s % span_s)
                        items, payload = packed[(day + offset_s + part) % len(packed)]
                        sums.append(
                            {
                                "agent_id": agent,
                                "span_s": span_s,
                                "start": start,
                                "bundle": BUNDLE,
                                "lot": f"lot {day}.{first.hour // 2 * 2 + part}",
                                "variety": "gala",
                                "challenger": "",
                                "windows": 6,
                                "left_out": 0,
                                "by_arrival": 0,
                                "items": items,
                                "first_at": first,
                                "last_at": first + timedelta(seconds=min(length_s, span_s)),
                                "folded": span_s != DAY,
                                "payload": payload,
                            }
                        )
                hours += [
                    FidelityHour(
                        agent_id=agent,
                        hour=midnight + timedelta(hours=hour),
                        boot_id="0" * 16,
                        first_seq=360 * (24 * day + hour),
                        last_seq=360 * (24 * day + hour) + 359,
                        records=360,
                        windows=360,
                        items=21_600,
                    ).model_dump()
                    for hour in range(24)
                ]
            session.connection().execute(insert(Rollup), sums)
            session.connection().execute(insert(FidelityHour), hours)
        session.commit()
    return end


def median_ms(client: TestClient, path: str, params: dict[str, str], times: int = 5) -> tuple[float, float]:
    """Returns milliseconds of this process and of the clock: other work on the machine makes the second longer."""
    taken = []
    for _ in range(times):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        answer = client.get(path, params=params)
        taken.append((1000.0 * (time.process_time() - cpu_s), 1000.0 * (time.perf_counter() - wall_s)))
        if answer.status_code != 200:
            raise SystemExit(f"{path} answered {answer.status_code}: {answer.text[:300]}")
    cpu_ms, wall_ms = zip(*taken, strict=True)
    return statistics.median(cpu_ms), statistics.median(wall_ms)


def measure_season(figures: Figures, kind: str, fresh: Callable[[], Any], lines: int, days: int) -> None:
    """How long questions about a season take, through the API and the pages."""
    with fresh() as services:
        end = write_season(services, lines, days)
        client, path, until = make_client(services), "/api/v1/agents/line-1", end.isoformat()

        def asked(name: str, rest: str, back: timedelta = timedelta(), **options: str) -> list[Row]:
            given = {"until": until, "from": (end - back).isoformat()} if back else {}
            cpu_ms, wall_ms = median_ms(client, rest, given | options)
            return [(name, cpu_ms, "ms"), (f"... {name}, by the clock", wall_ms, "ms")]

        pairs = [
            asked("a day by hour", f"{path}/statistics", timedelta(days=1), span="hour"),
            asked("the first page of four hours by minute", f"{path}/statistics", timedelta(hours=4), span="minute"),
            asked("a month by day", f"{path}/statistics", timedelta(days=30), span="day"),
            asked("a week by lot", f"{path}/statistics", timedelta(days=7), span="lot"),
            asked("the fidelity of a week by hour", f"{path}/fidelity", timedelta(days=7)),
            asked("a moment two months ago", f"{path}/as-of", at=(end - timedelta(days=days - 1)).isoformat()),
            asked("the page of a line", "/agents/line-1"),
            asked("the page of a moment", "/agents/line-1/as-of", at=(end - timedelta(hours=30)).isoformat()),
        ]
        title = f"{kind}: questions about {days} days of {lines} lines, {database_bytes(services.engine) / 1e6:.0f} MB"
    bounds = {pair[0][0]: ("<=", SLOWEST_PAGE_MS) for pair in pairs}
    note = "Bounds hold for the time of one core of this process; a server's database works in another one."
    figures.table(title, [row for pair in pairs for row in pair], bounds, note=note)


@contextmanager
def plane(url: str) -> Iterator[Services]:
    """A fresh control plane; on SQLite in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="sortline-ingest-"))
    if url:
        empty(url)
    services = make_services(folder, database=url)
    try:
        yield services
    finally:
        services.engine.dispose()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Prints the figures; the status says whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cameras", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20, help="windows of each camera")
    parser.add_argument("--days", type=int, default=180)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="200 cameras, 15 rounds, 60 days of 3 lines")
    parser.add_argument("--only", default="", help="sqlite or postgresql")
    parser.add_argument("--stage", default="", help="ingest or season")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.cameras, given.rounds, given.days, given.lines = 200, 15, 60, 3
    figures = Figures(Console())

    def both(kind: str, url: str) -> None:
        if given.stage != "season":
            measure_ingest(figures, kind, lambda: plane(url), given.cameras, given.rounds)
        if given.stage != "ingest":
            measure_season(figures, kind, lambda: plane(url), given.lines, given.days)

    if given.only != "postgresql":
        both("SQLite", "")
    if given.only != "sqlite":
        if not sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
            figures.skip("PostgreSQL", "the server programs are not installed")
        else:
            server = private_postgres(Path(tempfile.gettempdir()))
            both("PostgreSQL", next(server))
            server.close()
    if given.json:
        given.json.write_text(json.dumps(figures.data, indent=2))
    for line in figures.missed:
        print("missed:", line)
    return 1 if figures.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
