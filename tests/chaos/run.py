"""One run: a broker, the control plane, a real agent and many light ones, a bad network, and seeded random faults.

The oracle is what was produced: every record of the light agents, every number that the real agent's spool gave out,
and the bundles that were assigned. After the last fault the system gets time to settle; then every record must be in
the database once, no agent may run a bundle that was never assigned, and every agent must run the last one.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlmodel import col, select

from benchmarks.broker import packet, text
from benchmarks.receivers import connect
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.registry.versions import register
from control_plane.services import Services
from edge_agent.delivery.state_file import champion_file
from models.bundle import read_bundle
from models.errors import SortlineError
from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.plane import make_services, release
from tests.simulators.processes import MOSQUITTO, free_port
from tests.simulators.proxy import Noise, Proxy
from tests.simulators.tiny_bundle import tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
REAL = "line-1"
SETTLE_S = 120.0
ASSIGNED = 3
"""Bundles that are assigned in turn during the faults. A fault may fail a trial, which blocks its bundle; the last
assignment is therefore a bundle that no agent has tried, and every agent must come to run it."""


@dataclass
class Outcome:
    """The faults of one run, its counts, and the result of each check."""

    broker: str
    agents: int
    seconds: float
    faults: dict[str, int] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    oracle: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name -> (found, wanted)."""

    @property
    def ok(self) -> bool:
        return all(found == wanted for found, wanted in self.oracle.values())

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "faults": dict(self.faults), "ok": self.ok}


class Process:
    """A child that can be killed and started again."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.command, self.log, self.environment = command, log, environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | self.environment | environment
            )

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()


class Chaos:
    """One run on one kind of broker.

    Args:
        folder: Scratch space.
        kind: `embedded` or `mosquitto`.
        agents: Light agents.
        seed: Of every choice.
    """

    def __init__(self, folder: Path, kind: str, *, agents: int, seed: int) -> None:
        self.folder, self.kind, self.count = folder, kind, agents
        self.rng = random.Random(seed)
        self.port = free_port()
        self.broker = Process(self._broker_command(), folder / "broker.log")
        plane = [sys.executable, "-m", "tests.simulators.plane_process", "--root", str(folder / "plane")]
        self.plane = Process([*plane, "--port", str(self.port)], folder / "plane.log")
        self.state = folder / "agent"
        self.outcome = Outcome(kind, agents, 0.0)
        self.bundles: list[str] = []
        self.seen_active: Counter[str] = Counter()
        self.strange: list[str] = []
        self._generation = 0
        self._may_fill = False
        self._watching = threading.Event()

    def _broker_command(self) -> list[str]:
        if self.kind == "embedded":
            command = [sys.executable, "-m", "control_plane.broker", "--anonymous", "--port", str(self.port)]
            return [*command, "--limit=connections=1000"]
        config = self.folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 10000\n")
        return [MOSQUITTO, "-c", str(config)]

    # -- the run ----------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> Outcome:
        """Hurts the system for so long, lets it come to rest, and counts."""
        started = time.monotonic()
        services = make_services(self.folder / "plane")
        self._make_bundles(services)
        self.broker.start()
        _listening(self.port)
        self.plane.start()
        manner = Manner(window_s=0.5, items_per_s=200.0, retry_s=1.0, report_s=5.0, reconnect_s=(0.2, 3.0))
        with self._small_disk() as self._may_fill, Proxy(self.port, self.rng.getrandbits(32)) as proxy:
            command = [sys.executable, "-m", "edge_agent", "run", "--id", REAL, "--broker", f"127.0.0.1:{proxy.port}"]
            settings = {"BROKER__RECONNECT_MAX_S": "2", "LINE__WINDOW_S": "1", "SPOOL__RETRY_S": "2"}
            environment = {f"SORTLINE_AGENT__{key}": value for key, value in settings.items()}
            agent = Process([*command, "--state-dir", str(self.state)], self.folder / "agent.log", environment)
            (self.state / "trust").mkdir(parents=True, exist_ok=True)
            (self.state / "trust" / "root.json").write_bytes(
                (services.config.trust_folder / "1.root.json").read_bytes()
            )
            agent.start(**self._clock())
            watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
            watcher.start()
            try:
                with SimulatedFleet(proxy.port, self.count, manner=manner) as fleet:
                    self._hurt(services, proxy, fleet, agent, seconds)
                    self._settle(services, proxy, fleet, agent)
                    self.outcome.seconds = time.monotonic() - started
                    agent.stop()
                    self._drain_real(services, agent)
                    self._judge(services, fleet, proxy)
            finally:
                self._watching.set()
                watcher.join(5.0)
                for process in (agent, self.plane, self.broker):
                    process.stop()
                services.engine.dispose()
        return self.outcome

    def _make_bundles(self, services: Services) -> None:
        for number in range(ASSIGNED + 1):
            directory = self.folder / f"bundle-{number}"
            tiny_bundle(directory, bias=0.1 * number, padding=300_000 + number)
            with writing(services.engine) as session:
                self.bundles.append(register(session, services.store, directory, actor="c", now=utc_now()).bundle)
                session.commit()
            release(services, self.bundles[-1])

    def _hurt(self, services: Services, proxy: Proxy, fleet: SimulatedFleet, agent: Process, seconds: float) -> None:
        faults: dict[str, Callable[[], None]] = {
            "agent killed": lambda: self._restart(agent, self._spoil if self.rng.random() < 0.5 else None),
            "line killed": lambda: self._kill_line(agent),
            "broker killed, its store lost": lambda: self._restart(self.broker),
            "control plane killed": lambda: self._restart(self.plane),
            "partition": lambda: self._partition(proxy),
            "all connections cut": proxy.cut,
            "packets lost, repeated, overtaken": lambda: self._noise(proxy),
            "light agents rebooted": lambda: self._reboot(fleet),
            "flood by a rogue": self._flood,
            "assignment changed": lambda: self._assign(services),
        }
        if self._may_fill:
            faults["disk full"] = self._fill_disk
        until = time.monotonic() + seconds
        self._assign(services)
        names = list(faults)
        while time.monotonic() < until:
            # Each fault once in random order, then again: none is left out by bad luck.
            self.rng.shuffle(names)
            for name in names:
                if time.monotonic() >= until:
                    break
                faults[name]()
                self.outcome.faults[name] += 1
                time.sleep(self.rng.uniform(0.5, 3.0))

    # -- faults -----------------------------------------------------------------------------------------------

    def _restart(self, process: Process, between: Callable[[], None] | None = None) -> None:
        process.kill()
        if between is not None:
            between()
        time.sleep(self.rng.uniform(0.0, 1.5))
        process.start(**self._clock())

    def _clock(self) -> dict[str, str]:
        """The next start may find a clock ten years wrong (`tests/chaos/site`); only the real agent looks at it."""
        years = self.rng.choice([0, 0, 10, -10])
        if years:
            self.outcome.faults["clock jumped"] += 1
        paths = [str(ROOT / "tests" / "chaos" / "site"), os.environ.get("PYTHONPATH", "")]
        return {"SORTLINE_CHAOS_CLOCK_S": str(years * 31_557_600), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def _spoil(self) -> None:
        """Damages what a disk may damage: the state file (there is a backup), what is half fetched."""
        victims = [self.state / "state.json", *sorted((self.state / "fetch").glob("*"))]
        victim = self.rng.choice([path for path in victims if path.is_file()] or [self.state / "none"])
        with contextlib.suppress(OSError):
            data = bytearray(victim.read_bytes())
            if self.rng.random() < 0.5:
                del data[self.rng.randrange(len(data)) :]
            else:
                data[self.rng.randrange(len(data))] ^= 0xFF
            victim.write_bytes(bytes(data))
            self.outcome.faults["file corrupted"] += 1

    def _kill_line(self, agent: Process) -> None:
        """The line or, in a trial, perhaps the standby beside it."""
        with contextlib.suppress(OSError):
            found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
            victims = [pid for pid, command in commands.items() if re.search(rb"edge_agent\.(line|standby)", command)]
            if victims:
                os.kill(int(self.rng.choice(victims)), signal.SIGKILL)

    def _partition(self, proxy: Proxy) -> None:
        proxy.partitioned = True
        time.sleep(self.rng.uniform(1.0, 6.0))
        proxy.partitioned = False

    def _noise(self, proxy: Proxy) -> None:
        proxy.noise = Noise(lose=0.1, repeat=0.15, delay=0.15)
        time.sleep(self.rng.uniform(2.0, 5.0))
        proxy.noise = Noise()
        proxy.cut()  # what was lost is sent again after a reconnect only: that is the protocol

    def _reboot(self, fleet: SimulatedFleet) -> None:
        chosen = self.rng.sample(sorted(fleet.agents), max(1, len(fleet.agents) // 5))
        fleet.do(lambda light: light.reboot(), *chosen)

    def _flood(self) -> None:
        """A client that is let in sends rubbish, large and small, as fast as it can for a second."""
        with contextlib.suppress(OSError, AssertionError, IndexError):
            rogue = connect(self.port, "rogue")
            rogue.settimeout(1.0)
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                channel = self.rng.choice(["batch", "reported", "presence", "request", "live", "nonsense"])
                body = self.rng.randbytes(self.rng.choice([0, 10, 1000, 60_000]))
                rogue.sendall(packet(3, 0, text(f"sortline/v1/agents/rogue/{channel}") + body))
            rogue.close()

    def _assign(self, services: Services, last: str = "") -> None:
        """Everybody shall run another bundle, or this one."""
        with contextlib.suppress(Exception), writing(services.engine) as session:
            self._generation += 1
            bundle = last or self.bundles[self._generation % ASSIGNED]
            for name in [REAL, *(f"sim-{number:03d}" for number in range(self.count))]:
                agent = session.get(Agent, name) or Agent(id=name)
                agent.generation = max(agent.generation, int(agent.reported.get("generation", 0))) + 1
                agent.desired_bundle, agent.trial_items = bundle, 5
                session.add(agent)
            session.commit()

    @contextlib.contextmanager
    def _small_disk(self) -> Iterator[bool]:
        """A disk of its own for the real agent, where we may mount one."""
        self.state.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "sortline-chaos", str(self.state)]
        mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
        try:
            yield mounted
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(self.state)], check=False, capture_output=True)

    def _fill_disk(self) -> None:
        filler = self.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as stream:
            while True:
                stream.write(bytes(1 << 20))
        time.sleep(self.rng.uniform(2.0, 5.0))
        filler.unlink(missing_ok=True)

    # -- the oracle -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Checks again and again that the bundle the real agent would load is whole and was assigned."""
        while not self._watching.wait(0.2):
            if not (self.state / "state.json").exists():
                continue
            with contextlib.suppress(OSError, ValueError, KeyError):
                state = json.loads((self.state / "state.json").read_bytes())["state"]
                active = state.get("active", "")
                if not active:
                    continue
                self.seen_active[active] += 1
                try:
                    read_bundle(self.state / "slots" / active, digest=active)
                except SortlineError as error:
                    if json.loads((self.state / "state.json").read_bytes())["state"].get("active") == active:
                        self.strange.append(f"{active}: {error.code}")

    def _settle(self, services: Services, proxy: Proxy, fleet: SimulatedFleet, agent: Process) -> None:
        proxy.noise, proxy.partitioned = Noise(), False
        (self.state / "filler").unlink(missing_ok=True)
        agent.kill()
        agent.start()
        last = self.bundles[ASSIGNED]
        self._assign(services, last)
        cut_s, until = time.monotonic(), time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                held = champion_file(self.state).load()
                if fleet.running(last) == self.count and held.active == last and held.phase == "committed":
                    break
            if time.monotonic() - cut_s > 20.0:
                proxy.cut()
                cut_s = time.monotonic()
            time.sleep(0.2)
        self.outcome.counts["seconds to rest"] = int(SETTLE_S - max(0.0, until - time.monotonic()))
        self.outcome.oracle["light agents that run the last bundle"] = (fleet.running(last), self.count)
        self.outcome.oracle["real agents that run the last bundle"] = (
            int(champion_file(self.state).load().active == last),
            1,
        )
        for light in fleet.agents.values():
            light.manner.window_s = 0.0
        until = time.monotonic() + SETTLE_S / 2
        while fleet.waiting() and time.monotonic() < until:
            time.sleep(0.2)

    def _drain_real(self, services: Services, agent: Process) -> None:
        """The agent has stopped; once more it is started, so that its last words arrive, until its spool is empty."""
        agent.start(SORTLINE_AGENT__LINE__WINDOW_S="600")
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            time.sleep(0.5)
            with contextlib.suppress(sqlite3.Error):
                if not self._spooled()[1]:
                    break
        agent.stop()

    def _spooled(self) -> tuple[int, set[tuple[str, str, int]]]:
        """Records the real agent ever wrote, and the keys of those that still wait."""
        with contextlib.closing(sqlite3.connect(self.state / "spool.sqlite", timeout=5.0)) as spool:
            count = "SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name='record'"
            rows = spool.execute("SELECT boot_id, seq FROM record").fetchall()
            return int(spool.execute(count).fetchone()[0]), {(REAL, boot_id, seq) for boot_id, seq in rows}

    def _judge(self, services: Services, fleet: SimulatedFleet, proxy: Proxy) -> None:
        with reading(services.engine) as session:
            keys: list[tuple[str, str, int]] = []
            for table in (WindowRow, EventRow):
                rows = session.exec(
                    select(table.agent_id, table.boot_id, table.seq).where(col(table.agent_id) != "rogue")
                )
                keys += [(agent_id, boot_id, seq) for agent_id, boot_id, seq in rows]
            gaps_reported = session.exec(
                select(EventRow).where(EventRow.code == "spool.gap", EventRow.agent_id == REAL)
            ).all()
        stored, produced = set(keys), fleet.produced()
        light = {key for key in stored if key[0] != REAL}
        real = {key for key in stored if key[0] == REAL}
        written, waiting = self._spooled()
        # A record whose acknowledgement was lost may be stored and later be dropped: one number, accounted for twice.
        # One that a full disk refused has a number, is reported as a gap, and was never written.
        gone = {
            (REAL, row.facts["boot_id"], number)
            for row in gaps_reported
            for first, last in _ranges(row.facts["ranges"])
            for number in range(int(first), int(last) + 1)
        }
        known = real | gone | waiting
        o = self.outcome
        o.counts |= {
            "records produced by light agents": len(produced),
            "records produced by the real agent": written,
            "... more that its full disk refused, reported as gaps": max(0, len(known) - written),
            "packets lost": proxy.counters["lost"],
            "packets repeated": proxy.counters["repeated"],
            "packets overtaken": proxy.counters["delayed"],
            "times the real agent's bundle was looked at": sum(self.seen_active.values()),
            "assignments": self._generation,
        }
        o.oracle["records of light agents lost"] = (len(produced - light), 0)
        o.oracle["records of light agents never produced"] = (len(light - produced), 0)
        o.oracle["records stored twice"] = (len(keys) - len(stored), 0)
        o.oracle["numbers of the real agent not accounted for"] = (_holes(known), 0)
        o.oracle["records of the real agent stored, waiting or reported as gaps"] = (min(len(known), written), written)
        o.oracle["looks at a bundle that was neither old nor new"] = (
            len(self.strange) + sum(n for digest, n in self.seen_active.items() if digest not in self.bundles),
            0,
        )
        assigned = set(self.bundles) | {""}
        o.oracle["light agents with a bundle that was never assigned"] = (
            sum(a.held.active not in assigned for a in fleet.agents.values()),
            0,
        )


def _holes(keys: set[tuple[str, str, int]]) -> int:
    """Counts the missing numbers below the highest of each boot."""
    numbers: dict[str, list[int]] = {}
    for _, boot_id, seq in keys:
        numbers.setdefault(boot_id, []).append(seq)
    return sum(max(found) + 1 - len(found) for found in numbers.values())


def _ranges(text_: str) -> list[list[str]]:
    return [part.split("-") for part in text_.split(",") if part]


def _listening(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return
        time.sleep(0.05)
