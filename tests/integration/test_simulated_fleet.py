"""The simulated fleet is a fleet: against a real control plane over real brokers, what it says arrives exactly once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlmodel import select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.rollouts import RolloutState
from control_plane.services import Services
from models.messages import Phase
from tests.control_plane.fleet.test_fleet import register_tiny, start_rollout, state_of
from tests.simulators.fleet import Manner, SimulatedFleet
from tests.simulators.plane import make_services
from tests.simulators.processes import embedded_broker, mosquitto_broker, wait_until

BROKERS = [
    pytest.param(embedded_broker, id="embedded"),
    pytest.param(mosquitto_broker, id="mosquitto", marks=[pytest.mark.mosquitto, pytest.mark.slow]),
]


@pytest.fixture(params=BROKERS)
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    opened: Callable = request.param
    with opened(tmp_path) as found:
        yield found


@pytest.fixture
def plane(port: int, tmp_path: Path) -> Iterator[Services]:
    services = make_services(tmp_path / "plane", port=port)
    services.start_fleet()
    wait_until(lambda: services.connection.connected, "the control plane's connections")
    services.rollouts.start()
    yield services
    services.rollouts.stop()
    services.stop_fleet()
    services.engine.dispose()


def lenient() -> dict[str, object]:
    """A policy that stops at 90 % failures only."""
    criteria = {"failureType": "ALL", "action": "CANCEL", "thresholdPercentage": 90, "minNumberOfExecutedThings": 5}
    return {"abortConfig": {"criteriaList": [criteria]}}


def stored(services: Services) -> set[tuple[str, str, int]]:
    with reading(services.engine) as session:
        rows = [*session.exec(select(WindowRow)), *session.exec(select(EventRow))]
    return {(row.agent_id, row.boot_id, row.seq) for row in rows}


def known(services: Services) -> dict[str, Agent]:
    with reading(services.engine) as session:
        return {agent.id: agent for agent in session.exec(select(Agent))}


@pytest.mark.slow
def test_a_fleet_takes_a_rollout_and_its_records_arrive_once(plane: Services, port: int, tmp_path: Path) -> None:
    bundle = register_tiny(plane, tmp_path / "b", padding=150_000)
    manner = Manner(window_s=0.3, items_per_s=200.0, retry_s=1.0, report_s=2.0, reconnect_s=(0.1, 0.5))
    with SimulatedFleet(port, 20, manner=manner) as fleet:
        wait_until(lambda: len(known(plane)) == 20, "all agents to report")
        fleet.agents["sim-003"].manner.verdict = "fail"
        rollout = start_rollout(plane, waves=("100%",), policy=lenient())
        wait_until(lambda: state_of(plane, rollout).state == RolloutState.COMPLETED, "the rollout")
        assert fleet.running(bundle) == 19
        assert fleet.agents["sim-003"].held.blocked == (bundle,)
        # Power cuts and pulled cables: the broker's will arrives, what was not acknowledged comes again.
        fleet.do(lambda agent: agent.reboot(), "sim-000", "sim-001")
        fleet.do(lambda agent: agent.cut(1.0), "sim-002")
        wait_until(lambda: not known(plane)["sim-002"].online, "the will of an agent whose cable was pulled")
        wait_until(lambda: fleet.connected() == 20 and known(plane)["sim-002"].online, "everyone to be back")
        assert fleet.agents["sim-000"].held.phase is Phase.COMMITTED
        for agent in fleet.agents.values():
            agent.manner.window_s = 0.0
        wait_until(lambda: fleet.waiting() == 0, "every record to be acknowledged")
        assert stored(plane) == fleet.produced()
        assert all(len({g for g, _ in a.taken}) == len(a.taken) == 1 for a in fleet.agents.values())
