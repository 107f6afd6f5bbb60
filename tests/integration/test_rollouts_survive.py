"""Real control planes, killed and stopped at the worst moments, with a fleet over a real broker.

Whatever happens, every agent is asked exactly once, no wave is skipped, and every record is stored exactly once.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from sqlmodel import select

from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import open_database, reading
from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.database.tables.audit import Audit
from control_plane.database.tables.leases import Lease
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from tests.control_plane.fleet.test_fleet import register_tiny
from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.mortal_plane import POINTS
from tests.simulators.plane import make_services
from tests.simulators.postgres import empty
from tests.simulators.processes import embedded_broker, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 1.5
pytestmark = pytest.mark.slow


@dataclass
class Site:
    """Broker, database and bundle; control planes come and go."""

    root: Path
    broker: int
    database: str
    planes: list[subprocess.Popen] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Migrations, development keys and the store; the processes that follow find them.
        self.services = make_services(self.root / "data", database=self.database)
        self.engine = self.services.engine
        self.bundle = self.register("bundle", padding=30_000)

    def register(self, name: str, **options: object) -> str:
        return register_tiny(self.services, self.root / name, **options)

    @property
    def url(self) -> str:
        return self.database or f"sqlite:///{self.root / 'data' / 'sortline.sqlite'}"

    def start(self, point: str = "never", *, wait: bool = True) -> subprocess.Popen:
        port = free_port()
        environment = os.environ | {
            "SORTLINE__DATA_DIR": str(self.root / "data"),
            "SORTLINE__DATABASE": self.database,
            "SORTLINE__DATABASE_WAIT_S": "1.0",
            "SORTLINE__SERVER__PORT": str(port),
            "SORTLINE__BROKER__PORT": str(self.broker),
            "SORTLINE__JOBS__WORKERS": "0",
            "SORTLINE__ROLLOUTS__LEASE_S": str(LEASE_S),
            "SORTLINE__ROLLOUTS__PERIOD_S": "0.1",
        }
        with (self.root / f"plane-{len(self.planes)}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.simulators.mortal_plane", point]
            plane = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, stdout=log)
        self.planes.append(plane)
        self.urls.append(f"http://127.0.0.1:{port}")
        if wait:
            wait_until(lambda: self.ready(-1) or plane.poll() is not None, "a control plane")
        return plane

    def log(self, number: int) -> str:
        return (self.root / f"plane-{number}.log").read_text(errors="replace")

    def ready(self, number: int) -> bool:
        try:
            return httpx2.get(f"{self.urls[number]}/readyz", timeout=5.0, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def create(self, **body: object) -> int:
        answer = self.call("POST", "/api/v1/rollouts", json={"model": "tiny", "trial_items": 5, "actor": "t"} | body)
        assert answer.status_code == 201, answer.text
        return int(answer.json()["id"])

    def call(self, method: str, path: str, number: int = -1, **options: object) -> httpx2.Response:
        return httpx2.request(method, self.urls[number] + path, timeout=20.0, trust_env=False, **options)

    def rollout(self, rollout_id: int) -> Rollout:
        with reading(self.engine) as session:
            return session.get(Rollout, rollout_id)

    def stored(self) -> list[tuple[str, str, int]]:
        with reading(self.engine) as session:
            rows = [*session.exec(select(WindowRow)), *session.exec(select(EventRow))]
        return [(row.agent_id, row.boot_id, row.seq) for row in rows]

    def lease(self) -> Lease | None:
        with reading(self.engine) as session:
            return session.get(Lease, "rollouts")

    def end(self) -> None:
        for plane in self.planes:
            if plane.poll() is None:
                plane.send_signal(signal.SIGCONT)
                plane.terminate()
        for plane in self.planes:
            try:
                plane.wait(30)
            except subprocess.TimeoutExpired:
                plane.kill()
                plane.wait()
        self.engine.dispose()

    def check(self, rollout_id: int, fleet: SimulatedFleet, waves: int) -> None:
        """Every agent asked exactly once, waves in order, none early; the audit trail whole."""
        with reading(self.engine) as session:
            parts = session.exec(select(RolloutAgent).where(RolloutAgent.rollout_id == rollout_id)).all()
            audit = session.exec(select(Audit).order_by(Audit.id)).all()
            assert broken_audit_entry(session) is None
        assert [entry.details["wave"] for entry in audit if entry.action == "rollout.wave"] == list(range(1, waves))
        asked = [a for entry in audit if entry.action == "rollout.assign" for a in entry.details["agents"]]
        assert sorted(asked) == sorted(fleet.agents)
        assert {(part.attempt, part.outcome) for part in parts} == {(1, "SUCCEEDED")}
        for part in parts:
            agent = fleet.agents[part.agent_id]
            assert agent.taken == [(part.generation, self.bundle)], part.agent_id
            before = [fleet.agents[p.agent_id].committed_s[self.bundle] for p in parts if p.wave < part.wave]
            assert not before or agent.taken_s[self.bundle] > max(before), "a wave began before the one before was done"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    database = ""
    if request.param == "postgresql":
        database = request.getfixturevalue("postgres")
        empty(database)
    with embedded_broker(tmp_path) as port:
        found = Site(tmp_path, port, database)
        yield found
        found.end()


def manner(**changes: object) -> Manner:
    values = {"window_s": 0.5, "items_per_s": 100.0, "retry_s": 1.0, "report_s": 0.5, "reconnect_s": (0.1, 0.5)}
    return Manner(**(values | changes))


def test_a_rollout_killed_at_every_transition_continues_from_the_database(site: Site) -> None:
    with SimulatedFleet(site.broker, 6, manner=manner()) as fleet:
        site.start()
        wait_until(lambda: len(site.call("GET", "/api/v1/agents").json()) == 6, "all agents to report")
        rollout_id = site.create(waves=[1, 3, "100%"])
        site.planes[-1].kill()
        lives = 0
        while site.rollout(rollout_id).state == RolloutState.RUNNING:
            # Each life ends at its first turn that does something, at the next point: so every transition is cut off
            # before its commit, then between commit and publication, then after it.
            plane = site.start(POINTS[lives % len(POINTS)], wait=False)
            assert plane.wait(120) == -signal.SIGKILL, site.log(-1)
            lives += 1
            assert lives < 60, "the rollout does not move"
        assert lives > 12
        assert site.rollout(rollout_id).state == RolloutState.COMPLETED
        site.start()
        for agent in fleet.agents.values():
            agent.manner.window_s = 0.0
        wait_until(lambda: fleet.waiting() == 0, "every record to be acknowledged")
        site.check(rollout_id, fleet, waves=3)
        stored = site.stored()
        assert sorted(stored) == sorted(fleet.produced())


# A process that is stopped within a transaction keeps a SQLite file locked: replicas need PostgreSQL.
@pytest.mark.parametrize("site", [pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True)
def test_one_of_two_replicas_leads_and_one_that_slept_writes_nothing(site: Site) -> None:
    sleeper = site.start("stop-after-lease")
    with SimulatedFleet(site.broker, 9, manner=manner()) as fleet:
        wait_until(lambda: len(site.call("GET", "/api/v1/agents").json()) == 9, "all agents to report")
        fence = site.lease().fence
        site.start()
        rollout_id = site.create(waves=[2, 5, "100%"])
        stopped = Path(f"/proc/{sleeper.pid}/stat")
        wait_until(lambda: stopped.read_text().rsplit(")")[1].split()[0] == "T", "the leader to be stopped")
        # A busy machine may see the first wave only when the second has begun.
        wait_until(lambda: site.rollout(rollout_id).wave >= 1, "the second replica to lead")
        assert site.lease().fence == fence + 1
        holder = site.lease().holder
        sleeper.send_signal(signal.SIGCONT)
        wait_until(lambda: "nothing was written" in site.log(0), "the sleeper to notice")
        wait_until(lambda: site.rollout(rollout_id).state == RolloutState.COMPLETED, "the rollout")
        assert (site.lease().holder, site.lease().fence) == (holder, fence + 1), "the sleeper does not lead again"
        for agent in fleet.agents.values():
            agent.manner.window_s = 0.0
        wait_until(lambda: fleet.waiting() == 0, "every record to be acknowledged")
        site.check(rollout_id, fleet, waves=3)
        stored = site.stored()
        assert len(stored) == len(set(stored)) == len(fleet.produced())


@contextmanager
def locked(site: Site, request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks every write: by another process' transaction (SQLite), or by stopping the server (PostgreSQL)."""
    if not site.database:
        connection = sqlite3.connect(site.root / "data" / "sortline.sqlite", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")
            connection.close()
        return
    engine = open_database(site.database)
    with engine.connect() as connection:
        # Every table is locked by a session that does nothing: nothing can be read or written.
        for table in ("agent", "rollout", "rollout_agent", '"window"', "event", "lease", "audit"):
            connection.exec_driver_sql(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield
        connection.rollback()
    engine.dispose()


def test_while_the_database_is_away_nothing_is_acknowledged_and_nothing_is_lost(
    site: Site, request: pytest.FixtureRequest
) -> None:
    site.start()
    with SimulatedFleet(site.broker, 5, manner=manner()) as fleet:
        wait_until(lambda: len(site.call("GET", "/api/v1/agents").json()) == 5, "all agents to report")
        wait_until(lambda: fleet.figures()["counters"].get("acknowledged", 0) > 5, "records to flow")
        with locked(site, request):
            time.sleep(1.5)  # what was on its way has arrived
            before = fleet.figures()["counters"]["acknowledged"]
            answer = site.call("POST", "/api/v1/rollouts", json={"model": "tiny"})
            assert answer.status_code == 503, answer.text
            assert answer.json()["code"] == "database.unavailable"
            page = site.call("GET", "/", headers={"accept": "text/html"})
            assert page.status_code in ({200} if not site.database else {503})
            if site.database:
                assert "database does not answer" in page.text
            fleet.do(lambda agent: agent.cut(0.5), "sim-001")
            fleet.do(lambda agent: agent.reboot(), "sim-002")
            time.sleep(4.0)
            assert fleet.figures()["counters"]["acknowledged"] == before, "no acknowledgement without a commit"
            assert fleet.waiting() > 5 * 5
        wait_until(lambda: site.ready(-1), "the control plane to be ready again")
        for agent in fleet.agents.values():
            agent.manner.window_s = 0.0
        wait_until(lambda: fleet.waiting() == 0, "every record to be acknowledged")
        stored = site.stored()
        assert sorted(stored) == sorted(fleet.produced())
        online = {a["id"]: a["connection"] for a in site.call("GET", "/api/v1/agents").json()}
        assert set(online.values()) == {"live"}
        rollout_id = site.create(waves=["100%"])
        wait_until(lambda: site.rollout(rollout_id).state == RolloutState.COMPLETED, "the rollout")


def test_an_abort_reaches_agents_online_and_those_that_come_back_later(site: Site) -> None:
    site.start()
    with SimulatedFleet(site.broker, 4, manner=manner()) as fleet:
        wait_until(lambda: len(site.call("GET", "/api/v1/agents").json()) == 4, "all agents to report")
        first = site.bundle
        site.create(waves=["100%"])
        wait_until(lambda: fleet.running(first) == 4, "the first bundle")
        second = site.register("second", bias=1.0)
        for agent in fleet.agents.values():
            agent.manner.verdict = "hang"
        rollout_id = site.create(model=second, waves=["100%"])
        wait_until(lambda: all(len(a.taken) == 2 for a in fleet.agents.values()), "all agents to begin")
        fleet.do(lambda agent: agent.cut(600.0), "sim-003")
        answer = site.call("POST", f"/api/v1/rollouts/{rollout_id}/abort", json={"reason": "r", "actor": "t"})
        assert answer.json()["state"] == "aborted"
        online = [agent for agent in fleet.agents.values() if agent.id != "sim-003"]
        wait_until(lambda: all(len(agent.taken) == 3 for agent in online), "the recall to reach who is online")
        assert all(agent.held.active == first for agent in online)
        fleet.do(lambda agent: agent.cut(0.0), "sim-003")
        late = fleet.agents["sim-003"]
        wait_until(lambda: late.held.active == first and len(late.taken) == 3, "the recall to reach who was not")
        assert late.taken[-1][1] == first
