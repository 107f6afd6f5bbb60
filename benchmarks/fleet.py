"""Cost of a fleet for the control plane: `python -m benchmarks.fleet [--quick] [--agents N] [--database URL]`.

The figures are processor time, because wall time depends on the other processes of the machine: storing what agents
send, one snapshot of the fleet, the rows for one open page, the page of one agent with a long history. Then the
database stalls: another connection holds the write lock while the agents go on, and the time from its end until no
message waits is measured. Windows have the shape of those of a real line (two lanes, nine items a second each,
twenty-one monitored features); agents are messages, not processes. The broker's client is measured over mosquitto.
"""

import argparse
import multiprocessing
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from sqlalchemy import text

from benchmarks.figures import Figures
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.window_payload import pack_window
from control_plane.monitoring.windows import windows_of
from control_plane.pages.live import RowFeed
from control_plane.services import Services
from models.histogram import Histogram
from models.messages import (
    Batch,
    Live,
    Phase,
    Presence,
    Record,
    RecordKind,
    Reported,
    RunningLot,
    encode,
    encode_batch,
)
from models.profile import BINS
from models.topics import Channel, agent_topic
from models.windows import Window
from tests.simulators.plane import make_services
from tests.simulators.processes import MOSQUITTO, mosquitto_broker

PERIOD_S = 10
"""Between two windows, and between two reports, of one agent."""
FEATURES = 21
INGEST_MS, LOOK_MS, PAGE_KB_S, DISK_MB, RECOVERED_S = 0.15, 100.0, 60.0, 12.0, 20.0
"""Bounds: milliseconds of processor time per agent and second; per look at 1,000 agents; of the stream; per agent and
day; from the end of a stall."""


QUICK_SLACK = 3.0
"""`--quick` shows that every stage works; a few seconds on a machine that does other things are judged by so many times
the bounds of processor time and of recovery."""


class Line:
    """One simulated agent: makes its messages."""

    def __init__(self, number: int, seed: int) -> None:
        self.id = f"line-{number:04d}"
        self.boot_id = f"{number:016x}"
        self.seq = 0
        self._rng = np.random.default_rng([seed, number])
        self._lifetime = 0
        self._shares = self._rng.dirichlet(np.full(BINS, 4.0), FEATURES)

    def window(self) -> bytes:
        rng = self._rng
        items = int(rng.integers(160, 200))
        self._lifetime += items
        bad = int(rng.binomial(items, 0.13))
        by_kind = {"sound": items - bad, "rot": bad // 2, "worm": bad - bad // 2}
        unsure = int(rng.integers(0, 5))
        counts = np.array([rng.multinomial(items, shares) for shares in self._shares], "<u4")
        latency, inference, jitter = Histogram(), Histogram(), Histogram()
        for value in rng.lognormal(2.1, 0.35, items):
            latency.add(float(value))
        for value in rng.lognormal(1.2, 0.15, 90):
            inference.add(float(value))
        for value in rng.lognormal(-1.0, 0.4, bad):
            jitter.add(float(value))
        window = Window(
            started_ms=time.time_ns() // 1_000_000 - 10_000,
            duration_ms=10_000,
            bundle="a" * 64,
            lot="L-2041",
            variety="gala",
            simulated=True,
            frames=300,
            items=items,
            lanes=(items // 2, items - items // 2),
            classes=by_kind,
            grades={"sound": items - bad - unsure, "rot": bad, "unsure": unsure},
            outlets={"pass": items - bad, "reject": bad},
            views=items * 9,
            latency_ms=latency,
            inference_ms=inference,
            features=counts.tobytes(),
            nulls=(0,) * FEATURES,
            ejections={"on_time": bad},
            ejectors={"0/reject/fired": bad // 2, "1/reject/fired": bad - bad // 2},
            shots={"fired": bad},
            lead_ms={"0/reject": 31.5, "1/reject": 30.2},
            jitter_ms=jitter,
            truth={"sound>pass": items - bad, "rot>reject": bad // 2, "worm>reject": bad - bad // 2},
            lifetime_items=self._lifetime,
        )
        window.check()
        return msgspec.msgpack.encode(window)

    def batch(self, windows: int = 1) -> bytes:
        records = []
        for _ in range(windows):
            records.append(Record(boot_id=self.boot_id, seq=self.seq, kind=RecordKind.WINDOW, payload=self.window()))
            self.seq += 1
        return encode_batch(Batch(records=tuple(records)))

    def report(self) -> bytes:
        return encode(
            Reported(
                boot_id=self.boot_id,
                at_ms=time.time_ns() // 1_000_000,
                generation=1,
                phase=Phase.COMMITTED,
                active="a" * 64,
                items_on_active=self._lifetime,
                line_running=True,
                camera="simulated line, 2 lanes, 1280 x 720, 30 frames/s",
                lot=RunningLot(lot="L-2041", variety="gala", begun=True, terms="recipe"),
                counters={"mqtt_connected": 1, "batches": self.seq, "swaps": 1, "records": self.seq},
                versions={"sortline": "0.1.0", "onnxruntime": "1.20.1", "opencv": "4.10.0", "numpy": "2.1.3"},
                hardware={"machine": "x86_64", "cores": "4"},
                trust={"root": "1", "targets": "3", "snapshot": "40", "timestamp": "912"},
                lanes=2,
                labels={"site": f"site-{int(self.id[-4:]) % 5}", "line": self.id[-4:]},
                rss_mb=143.0 + float(self._rng.random()),
            )
        )

    def live(self) -> bytes:
        rate = 18.0 + float(self._rng.normal(0.0, 0.4))
        return encode(Live(boot_id=self.boot_id, at_ms=1, items_per_s=rate, classes={"sound": 150, "rot": 20}))


class Site:
    """A control plane and its agents, by messages."""

    def __init__(self, services: Services, lines: list[Line]) -> None:
        self.services, self.lines = services, lines

    def connect(self) -> None:
        """Births and first reports."""
        for line in self.lines:
            birth = encode(Presence(online=True, boot_id=line.boot_id))
            self.services.intake.put(agent_topic(line.id, Channel.PRESENCE), birth)
            self.services.intake.put(agent_topic(line.id, Channel.REPORTED), line.report())
        self.drain()

    def second(self, second: int) -> Iterator[tuple[str, bytes]]:
        """Yields the messages of one second: a tenth of the agents send a window and a report each."""
        for line in self.lines[second % PERIOD_S :: PERIOD_S]:
            yield agent_topic(line.id, Channel.BATCH), line.batch()
            yield agent_topic(line.id, Channel.REPORTED), line.report()

    def drain(self) -> None:
        while messages := self.services.intake.take(0.0):
            self.services.ingest.store(messages)
            self.services.intake.done(messages)


def ingest(figures: Figures, site: Site, seconds: int, slack: float) -> None:
    """Storing, five transactions a second as the thread does it."""
    agents = len(site.lines)
    spent = 0.0
    windows = 0
    for second in range(seconds):
        messages = list(site.second(second))
        windows += len(messages) // 2
        size = max(1, len(messages) // 5)
        for start in range(0, len(messages), size):
            began = time.process_time()
            for topic, payload in messages[start : start + size]:
                site.services.intake.put(topic, payload)
            site.drain()
            spent += time.process_time() - began
    with reading(site.services.engine) as session:
        stored = session.connection().execute(text("SELECT COUNT(*) FROM window")).scalar_one()
    per_agent = spent / (agents * seconds) * 1000.0
    rows = [
        ("storing, per agent and second", per_agent, "ms"),
        ("storing, per window with its report", spent / windows * 1e6, "us"),
        ("windows lost", float(windows - stored), ""),
    ]
    figures.table(
        f"Ingest, {agents} agents, {seconds} s of their messages",
        rows,
        {"storing, per agent and second": ("<=", INGEST_MS * slack), "windows lost": ("<=", 0.0)},
        note="processor time; the client of the broker is not in it",
    )


def board(figures: Figures, site: Site, looks: int, slack: float) -> None:
    """A look each second, a tenth of the agents with a new window, and what watching pages get."""
    services, agents = site.services, len(site.lines)
    feed = RowFeed(services, "")
    began = time.process_time()
    services.board.all()
    cold_s = time.process_time() - began
    _, version = feed.news("", True)
    spent: dict[str, float] = {"look": 0.0, "rows": 0.0, "page": 0.0}
    sizes = []
    for second in range(looks):
        for topic, payload in site.second(second):
            services.intake.put(topic, payload)
        for line in site.lines:
            services.intake.put(agent_topic(line.id, Channel.LIVE), line.live())
        site.drain()
        a = time.process_time()
        statuses = services.board.snapshot(0.0)
        b = time.process_time()
        services.board.snapshot = lambda _age, found=statuses: found  # type: ignore[method-assign]
        chunk, version = feed.news(version, True)
        for _ in range(20):
            feed.news(version, True)
        c = time.process_time()
        "".join(row.html for row in feed.shown().rows)
        d = time.process_time()
        del services.board.snapshot  # type: ignore[method-assign]
        sizes.append(len(chunk))
        for name, value in (("look", b - a), ("rows", c - b), ("page", d - c)):
            spent[name] += value
    rows = [
        ("first look after a start", cold_s * 1000.0, "ms"),
        ("look", spent["look"] / looks * 1000.0, "ms"),
        ("changed rows for 20 watching pages", spent["rows"] / looks * 1000.0, "ms"),
        ("all rows of the document", spent["page"] / looks * 1000.0, "ms"),
        ("stream, per page", max(sizes) / 1000.0, "kB/s"),
    ]
    scale = agents / 1000.0
    figures.table(
        f"Fleet page, {agents} agents, all live",
        rows,
        {"look": ("<=", LOOK_MS * max(scale, 0.1) * slack), "stream, per page": ("<=", PAGE_KB_S * max(scale, 0.1))},
        note="processor time",
    )


def stall(figures: Figures, site: Site, path: Path, seconds: float, slack: float) -> None:
    """Another process holds the write lock while the agents send, and repeat what is not acknowledged."""
    services = site.services
    stop = threading.Event()

    def send() -> None:
        second = 0
        while not stop.is_set():
            began = time.monotonic()
            sent = list(site.second(second))
            for topic, payload in sent:
                services.intake.put(topic, payload)
            if second % 5 == 0:  # without acknowledgement they repeat
                for topic, payload in sent:
                    services.intake.put(topic, payload)
            second += 1
            stop.wait(max(0.0, 1.0 - (time.monotonic() - began)))

    sender = threading.Thread(target=send, name="agents")
    services.ingest.start()
    sender.start()
    time.sleep(2.0)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA busy_timeout=5000")
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        behind = services.intake.backlog()
        other.execute("ROLLBACK")
    ended, began = time.monotonic(), time.process_time()
    while services.intake.backlog().oldest_s > 1.5 and time.monotonic() - ended < 120.0:
        time.sleep(0.1)
    recovered_s = time.monotonic() - ended
    used_s = time.process_time() - began
    stop.set()
    sender.join()
    services.ingest.stop()
    rows = [
        ("messages that waited at its end", float(behind.waiting), ""),
        ("oldest of them", behind.oldest_s, "s"),
        ("recovered after", recovered_s, "s"),
        ("processor time meanwhile", used_s, "s"),
        ("batches left to their agents", float(services.counters["shed_batches"]), ""),
        ("repeated batches recognised", float(services.counters["repeated_batches"]), ""),
    ]
    bound = {"recovered after": ("<=", (RECOVERED_S if len(site.lines) <= 1000 else 60.0) * slack)}
    figures.table(f"A stall of the database, {seconds:g} s, {len(site.lines)} agents", rows, bound)


def history(figures: Figures, services: Services, days: tuple[int, ...]) -> None:
    """The windows of one agent's page, after so many days of ten-second windows; and what a day takes on disk."""
    line = Line(9_999, 7)
    payloads = [pack_window(line.window()) for _ in range(400)]
    rows: list[tuple[str, float | str, str]] = []
    made = 0
    with writing(services.engine) as session:
        session.add(Agent(id=line.id))
        session.commit()
    now = utc_now()
    path = services.engine.url.database
    pages = "SELECT (SELECT COUNT(*) FROM pragma_dbstat WHERE name GLOB '*window*') * 4096"
    for day in days:
        with writing(services.engine) as session:
            rows_of_days = [
                {
                    "agent_id": line.id,
                    "boot_id": line.boot_id,
                    "seq": n,
                    "started_at": now - timedelta(days=90) + timedelta(seconds=10 * n),
                    "received_at": now - timedelta(days=90) + timedelta(seconds=10 * n),
                    "bundle": "a" * 64,
                    "items": 180,
                    "refused": "",
                    "payload": payloads[n % 400],
                }
                for n in range(made, day * 8640)
            ]
            session.connection().execute(WindowRow.__table__.insert(), rows_of_days)  # type: ignore[attr-defined]
            session.commit()
        made = day * 8640
        best = min(_page_ms(services, line.id) for _ in range(5))
        rows.append((f"360 windows after {day} days", best, "ms"))
    if path:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            try:
                size = connection.execute(pages).fetchone()[0]
                total = connection.execute("SELECT COUNT(*) FROM window").fetchone()[0]
                rows.append(("disk, per agent and day", size / total * 8640 / 1e6, "MB"))
            except sqlite3.OperationalError:
                size = Path(path).stat().st_size
                total = connection.execute("SELECT COUNT(*) FROM window").fetchone()[0]
                rows.append(("disk, per agent and day", size / total * 8640 / 1e6, "MB"))
    first, last = float(rows[0][1]), float(rows[len(days) - 1][1])
    rows.append(("growth of the page", last / first, "times"))
    bounds = {"growth of the page": ("<=", 2.0)}
    if path:
        bounds["disk, per agent and day"] = ("<=", DISK_MB)
    figures.table("History of one agent", rows, bounds, note="processor time")


def _page_ms(services: Services, agent_id: str) -> float:
    began = time.process_time()
    with reading(services.engine) as session:
        windows_of(session, agent_id=agent_id, usable=True, limit=360)
    return (time.process_time() - began) * 1000.0


def _publish(port: int, agents: int, seconds: int) -> None:
    """Sends the messages of a fleet over one connection, at their pace."""
    lines = [Line(number, 3) for number in range(agents)]
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="agents", protocol=mqtt.MQTTv311)
    client.username_pw_set("line-0000", "x")
    client.connect("127.0.0.1", port)
    client.loop_start()
    due = time.monotonic()
    for second in range(seconds):
        for line in lines[second % PERIOD_S :: PERIOD_S]:
            client.publish(agent_topic(line.id, Channel.BATCH), line.batch(), 1)
            client.publish(agent_topic(line.id, Channel.REPORTED), line.report(), 1, retain=True)
        for line in lines:
            client.publish(agent_topic(line.id, Channel.LIVE), line.live(), 0)
        due += 1.0
        time.sleep(max(0.0, due - time.monotonic()))
    client.disconnect()


_PATIENCE_S = 120.0
"""A stage over the network that stands still for so long fails instead of waiting."""


def _wait(done: Callable[[], object], what: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come within {_PATIENCE_S:g} s")
        time.sleep(0.01)


def wire(figures: Figures, folder: Path, agents: int, seconds: int, slack: float) -> None:
    """The whole control plane over a real broker: processor time of this process while the agents are another one."""
    if not Path(MOSQUITTO).exists():
        figures.skipped.append("Over mosquitto: the program is not installed")
        return
    folder.mkdir()
    with mosquitto_broker(folder) as port:
        services = make_services(folder / "plane", port=port)
        services.start_fleet()
        _wait(lambda: services.connection.connected, "the connection to the broker")
        spent = {}
        for name, watched in (("no page is open", False), ("one page is open, with live figures", True)):
            if watched:
                services.live.watch()
                time.sleep(1.5)
            process = multiprocessing.get_context("spawn").Process(target=_publish, args=(port, agents, seconds))
            process.start()
            before = services.counters["received_batch"]
            _wait(lambda known=before: services.counters["received_batch"] > known, "the first batch")  # type: ignore[misc]
            began = time.process_time()
            until = time.monotonic() + seconds + _PATIENCE_S
            while process.is_alive() and time.monotonic() < until:
                if watched:
                    services.live.watch()
                time.sleep(0.05)
            process.terminate()  # does nothing to one that has ended
            spent[name] = (time.process_time() - began) / (agents * seconds) * 1000.0
            process.join()
        time.sleep(1.0)
        stored = services.counters["stored"]
        services.stop_fleet()
        services.engine.dispose()
    rows: list[tuple[str, float | str, str]] = [(f"{k}, per agent and second", v, "ms") for k, v in spent.items()]
    rows.append(("windows stored", float(stored), ""))
    figures.table(
        f"Over mosquitto, {agents} agents, {seconds} s",
        rows,
        {"no page is open, per agent and second": ("<=", INGEST_MS * slack)},
        note="processor time of the control plane: broker client, storing, acknowledging",
    )


def main() -> int:
    """Runs the stages; exit status 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--agents", type=int, action="append", help="several times for several sizes")
    parser.add_argument("--database", default="", help="URL; empty = SQLite in a temporary folder")
    parser.add_argument("--stall-s", type=float, default=0.0)
    given = parser.parse_args()
    sizes = given.agents or ([200] if given.quick else [10, 200, 1000, 3000])
    slack = QUICK_SLACK if given.quick else 1.0
    figures = Figures(Console())
    with tempfile.TemporaryDirectory() as name:
        for agents in sizes:
            folder = Path(name) / str(agents)
            services = make_services(folder, database=given.database, wait_s=1.0)
            site = Site(services, [Line(number, 1) for number in range(agents)])
            site.connect()
            ingest(figures, site, 10 if given.quick else 30, slack)
            board(figures, site, 5 if given.quick else 10, slack)
            if not given.database:
                seconds = given.stall_s or (5.0 if given.quick else 40.0)
                stall(figures, site, folder / "sortline.sqlite", seconds, slack)
            services.engine.dispose()
        services = make_services(Path(name) / "history", database=given.database)
        history(figures, services, (1, 3) if given.quick else (1, 7, 60))
        services.engine.dispose()
        wire(figures, Path(name) / "wire", sizes[-1], 5 if given.quick else 20, slack)
    for missed in figures.missed:
        figures.console.print(f"[red]{missed}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
