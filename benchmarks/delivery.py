"""Delivery of bundles, store and forward, rollouts and brokers: `python -m benchmarks.delivery [--quick]`.

Every ratio has its baseline in the same run. Prints tables, writes figures as JSON (`--json`) and plots as SVG
(`--plots`); exit status 1 when a bound is missed. Receivers and senders share this machine's processors, so seconds
are of the whole loop; bytes and ratios are what to read.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from sqlmodel import select

from benchmarks import broker as broker_cost
from benchmarks.fan_out import MEGA, broker, fan_out
from benchmarks.figures import Figures, Row
from benchmarks.flood import came_back, flood
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.registry.versions import register
from control_plane.rollouts.records import Order, create_rollout
from control_plane.services import Services
from edge_agent.delivery.fetch import Fetch
from edge_agent.telemetry.spool import Spool
from edge_agent.telemetry.uplink import Uplink
from models.bundle import RECIPE, blobs_of, read_bundle, write_bundle
from models.messages import Ack, Event, RecordKind, decode
from models.topics import Channel, agent_topic
from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.plane import make_services, release
from tests.simulators.tiny_bundle import tiny_files

# -- size of an update ---------------------------------------------------------------------------------------------


def fetch_all(root: Path, directory: Path) -> Counter[str]:
    """Fetches a bundle from memory and returns the agent's counters."""
    manifest = read_bundle(directory).manifest
    blobs = dict(blobs_of(manifest, lambda entry: (directory / entry.path).read_bytes()))
    fetch = Fetch(root, read_bundle(directory).digest, window=8, reserve_bytes=0, clock=time.monotonic)
    while not fetch.done:
        for digest in fetch.wanted():
            fetch.receive(blobs[digest], digest)
    return fetch.counters


def differences(figures: Figures, scratch: Path, megabytes: int) -> None:
    """Measures the bytes an agent fetches when little has changed; the model's graph is a real one of this size."""
    padding = megabytes * 1_000_000
    files = tiny_files(padding=padding)
    size = sum(map(len, files.values()))
    variants: dict[str, dict[str, bytes]] = {
        "first": files,
        "new head": tiny_files(padding=padding, bias=0.25),
        "new recipe": files | {RECIPE: files[RECIPE] + b"\n"},
        "new card": files | {"card.md": b"# other words\n"},
    }
    rows: list[Row] = []
    for name, parts in variants.items():
        directory = scratch / f"difference-{name.replace(' ', '-')}"
        write_bundle(directory, "large", parts)
        root = scratch / "difference-agent"
        fetched = fetch_all(root, directory)["bytes"]
        rows.append((name, fetched, f"bytes of {size:,}"))
        if name != "first":
            rows.append((f"{name}: share", fetched / size, ""))
    limit = 0.02 if megabytes >= 20 else 0.1
    bounds = {"new head: share": ("<=", limit), "new recipe: share": ("<=", limit), "new card: share": ("<=", limit)}
    figures.table("What an update moves", rows, bounds)


# -- store and forward ----------------------------------------------------------------------------------------


class Direct:
    """A link to the control plane's own ingest, with its database."""

    connected = True

    def __init__(self, services: Services) -> None:
        self.services, self.batches = services, 0
        self.acks: list[Ack] = []
        services.connection.bulk = self  # type: ignore[assignment]  # what it acknowledges comes here

    def publish(self, topic: str, payload: bytes, **_: object) -> bool:
        if topic.endswith("/ack"):
            self.acks.append(decode(payload, Ack))
        else:
            self.services.ingest.take(topic, payload)
            self.batches += 1
        return True


def partition(figures: Figures, scratch: Path, records: int) -> None:
    """Measures a day at ten records a second without connection, then its transfer into the database."""
    root = scratch / "spool"
    root.mkdir()
    spool = Spool(root, "0123456789abcdef", max_bytes=256_000_000, ballast_bytes=4 << 20)
    database = spool._database  # noqa: SLF001  a day of single commits would take a day
    database.execute("BEGIN")
    rows = ((spool._boot_id, number, str(RecordKind.EVENT), event(number)) for number in range(records))  # noqa: SLF001
    database.executemany("INSERT INTO record (boot_id, seq, kind, payload) VALUES (?, ?, ?, ?)", rows)
    database.execute("COMMIT")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # one transaction of a day made a log of a day
    spool._seq = records  # noqa: SLF001
    used = sum(path.stat().st_size for path in root.glob("spool.sqlite*")) / MEGA
    services = make_services(scratch / "partition")
    link = Direct(services)
    uplink = Uplink(spool, link, agent_topic("line-1", Channel.BATCH), retry_s=60.0)
    uplink.tick(0.0)
    spool.append(RecordKind.EVENT, event(records))
    started, busy = time.perf_counter(), time.process_time()
    fresh = 0.0
    while spool.last_id:
        for ack in link.acks[:]:
            uplink.acknowledged(ack)
        link.acks.clear()
        uplink.tick(0.0)
        if not fresh and not database.execute("SELECT 1 FROM record WHERE seq = ?", (records,)).fetchone():
            fresh = time.perf_counter() - started
    drained, used_s = time.perf_counter() - started, time.process_time() - busy
    stored = services.counters["stored"]
    figures.table(
        "A day without connection",
        [
            ("records", records, ""),
            ("on disk", used, "MB"),
            ("on disk, a day of it", used * 864_000 / records, "MB"),
            ("drained into the database", records / drained, "records/s on this machine now"),
            ("drained, spool and database in one process", records / used_s, "records per second of processor"),
            ("a record made meanwhile, late by", fresh, "s"),
            ("missing", records + 1 - stored, "records"),
            ("duplicates", services.counters["duplicates"], "records"),
        ],
        {
            "on disk, a day of it": ("<=", 256.0),
            "drained, spool and database in one process": (">=", 10_000.0),
            "a record made meanwhile, late by": ("<=", 5.0),
            "missing": ("<=", 0.0),
            "duplicates": ("<=", 0.0),
        },
    )
    spool.close()
    services.engine.dispose()


def event(number: int) -> bytes:
    """Returns an event of about 150 bytes."""
    facts = {"number": f"{number:08d}", "filler": "x" * 70}
    return msgspec.msgpack.encode(Event(at_ms=1_700_000_000_000 + number, code="benchmark.record", facts=facts))


# -- rollout --------------------------------------------------------------------------------------------------


def rollout(figures: Figures, scratch: Path, count: int, kind: str) -> None:
    """Measures the time from the order until 95 % of the agents report the bundle committed."""
    with broker(kind, scratch) as (port, _):
        services = make_services(scratch / f"rollout-{kind}", port=port)
        services.start_fleet()
        # A new broker is found empty once, and filled: what is ordered before that is published again.
        until(lambda: services.counters["republished"] > 0, 30.0)
        services.rollouts.start()
        directory = scratch / f"rollout-bundle-{kind}"
        write_bundle(directory, "rolled", tiny_files(padding=1_000_000))
        with writing(services.engine) as session:
            bundle = register(session, services.store, directory, actor="benchmark", now=utc_now()).bundle
            session.commit()
        release(services, bundle)
        manner = Manner(window_s=10.0, items_per_s=200.0, report_s=2.0)
        try:
            with SimulatedFleet(port, count, manner=manner) as fleet:
                until(lambda: known(services) == count, 120.0)
                started = time.perf_counter()
                with writing(services.engine) as session:
                    create_rollout(session, Order(reference="rolled"), actor="benchmark", now=utc_now())
                    session.commit()
                until(lambda: fleet.running(bundle) >= 0.95 * count, 240.0)
                on_agents = time.perf_counter() - started
                until(lambda: committed(services, bundle) >= 0.95 * count, 240.0)
                reported = time.perf_counter() - started
                sent = services.counters["bundle_bytes_published"]
                fleet.do(lambda agent: agent.cut(0.0))
                cut = time.perf_counter()
                until(lambda: fleet.connected() < count, 10.0)
                until(lambda: fleet.connected() == count, 120.0)
                back = time.perf_counter() - cut
        finally:
            services.rollouts.stop()
            services.stop_fleet()
            services.engine.dispose()
    size = sum(path.stat().st_size for path in directory.iterdir())
    figures.table(
        f"A rollout to {count} agents, {kind} broker",
        [
            ("95 % committed", on_agents, "s"),
            ("95 % reported and stored", reported, "s"),
            ("egress of the bundle", sent / size, "x bundle"),
            ("all back after all connections were cut", back, "s"),
        ],
        {
            "all back after all connections were cut": ("<=", 60.0),
            "egress of the bundle": ("<=", 1.05),
            "95 % committed": ("<=", 120.0),
        },
    )


def until(done: Callable[[], bool], seconds: float) -> None:
    limit = time.perf_counter() + seconds
    while not done():
        assert time.perf_counter() < limit, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.1)


def known(services: Services) -> int:
    with reading(services.engine) as session:
        return len([a for a in session.exec(_agents()) if a.reported])


def committed(services: Services, bundle: str) -> int:
    with reading(services.engine) as session:
        agents = session.exec(_agents()).all()
        return sum(a.reported.get("active") == bundle and a.reported.get("phase") == "committed" for a in agents)


def _agents() -> Any:
    return select(Agent)


# -- brokers' cost --------------------------------------------------------------------------------------------


def cost(figures: Figures, scratch: Path, *, quick: bool) -> None:
    """Measures processor time per delivered message, embedded broker against mosquitto."""
    rows: list[Row] = []
    with broker_cost.brokers(scratch, mutual_tls=False) as found:
        for name, qos, size, subscribers, messages in broker_cost.CASES:
            count = max(messages // 4, 150) if quick else messages
            used = {
                kind: broker_cost.measure(*place, qos, size, subscribers, count, None) for kind, place in found.items()
            }
            if "mosquitto" in used:
                rows.append((name, used["embedded"]["cpu_us"] / used["mosquitto"]["cpu_us"], "x mosquitto"))
    if not rows:
        figures.skip("CPU per message", "mosquitto is not installed")
        return
    figures.table("CPU per message, embedded broker", rows, {name: ("<=", 1.7) for name, _, _ in rows})


# -- floods ----------------------------------------------------------------------------------------


def floods(figures: Figures, scratch: Path, kinds: list[str], *, quick: bool) -> None:
    """Measures a flood of one agent, then the return of all agents at once (`benchmarks.flood`)."""
    for kind in kinds:
        flood(figures, scratch, kind, count=10 if quick else 20, seconds=3.0 if quick else 10.0)
    for kind in kinds:
        came_back(figures, scratch, kind, count=20 if quick else 200, watch_s=2.0 if quick else 5.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: fewer agents, a smaller bundle, no flood unless by --only"
    )
    parser.add_argument(
        "--only", action="append", choices=("fan-out", "differences", "partition", "rollout", "cost", "flood")
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for SVG plots")
    options = parser.parse_args()
    figures = Figures(Console())
    kinds = ["embedded", *(["mosquitto"] if Path(broker_cost.MOSQUITTO).exists() else [])]
    if len(kinds) == 1:
        figures.skip("mosquitto", "the program is not installed")
    quick = options.quick
    with tempfile.TemporaryDirectory(prefix="sortline-benchmark-") as folder:
        scratch = Path(folder)
        stages: dict[str, Callable[[], None]] = {
            "differences": lambda: differences(figures, scratch, 4 if quick else 20),
            "partition": lambda: partition(figures, scratch, 50_000 if quick else 864_000),
            "cost": lambda: cost(figures, scratch, quick=quick),
            "fan-out": lambda: fan_out(
                figures, scratch, (1, 5, 20) if quick else (1, 10, 50, 200), 2 if quick else 20, kinds
            ),
            "rollout": lambda: [rollout(figures, scratch, 50 if quick else 200, kind) for kind in kinds],  # type: ignore[func-returns-value]
            "flood": lambda: floods(figures, scratch, kinds, quick=quick),
        }
        for name, stage in stages.items():
            if name in options.only if options.only else not (quick and name == "flood"):
                stage()
    figures.skip("metadata refresh", "measured with the trust of assignments, not here")
    if options.json:
        figures.write(options.json, {"quick": quick})
    if options.plots:
        figures.write_plots(options.plots)
    for line in figures.missed:
        figures.console.print(f"[red]missed[/] {line}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())
