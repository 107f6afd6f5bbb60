"""A fleet whose database, executor, planner and updaters are the product's own; broker, trust and lines are played.

`proven` is the small model beside it: what has passed a trial on which box. The box itself is the real `Updater` on a
real folder; only the fetch (a copy), the self-test and the line are answered by the test.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import msgspec
from sqlalchemy import Engine
from sqlmodel import select
from tuf.api.metadata import Metadata, TargetFile, Targets

from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.database.tables.rollouts import Rollout, RolloutAgent
from control_plane.database.tables.trust import TrustMetadata
from control_plane.rollouts.executor import RolloutExecutor
from control_plane.rollouts.records import Order, act, create_rollout
from control_plane.trust.online_signer import desired_of
from edge_agent.config import DeliveryConfig
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import champion_file
from edge_agent.delivery.updater import Updater
from edge_agent.line_protocol import Beat, ModelFailed
from models.errors import ConflictError, SortlineError
from models.messages import Desired, Fault, Live, Phase, Reported, SafeState
from tests.simulators.rollout_world import T0


class Copied:
    """Fetches by copying: what a transfer does at the end."""

    progress = 0.0

    def __init__(self, root: Path, bundles: dict[str, Path]) -> None:
        self._root, self._bundles = root, bundles

    def tick(self, digest: str) -> bool:
        slot = self._root / "slots" / digest
        if not slot.exists():
            shutil.copytree(self._bundles[digest], slot)
        return True

    def drop(self) -> None:
        pass


class Host:
    """A supervisor and a line without processes."""

    covered = True
    outlets = ("reject", "pass")

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.counters: Counter[str] = Counter()

    def event(self, code: str, message: str, **facts: str) -> None:
        pass

    def report_error(self, error: SortlineError) -> None:
        self.fault = Fault(code=error.code, message=str(error)[:600])

    def set_fault(self, fault: Fault) -> None:
        self.fault = fault

    def report(self) -> None:
        pass

    def enqueue(self, event: object) -> bool:
        return True

    def load_judging(self) -> None:
        pass


@dataclass
class Box:
    """One agent: the real updater, and the model's record of it."""

    name: str
    root: Path
    bundles: dict[str, Path]
    proven: set[str] = field(default_factory=set)
    connected: bool = True
    retained: Desired | None = None
    """Its newest desired state at the broker."""
    safe_state: SafeState = SafeState.NONE

    def __post_init__(self) -> None:
        self.root.mkdir()
        self.power_cut()

    def power_cut(self) -> None:
        self.host = Host()
        config = DeliveryConfig(reserve_bytes=0)
        self.updater = Updater(
            self.root, config, champion_file(self.root), Copied(self.root, self.bundles), self.host, self.host
        )
        self.updater.recover()

    @property
    def state(self) -> SlotState:
        return self.updater.state

    def hear(self, released: frozenset[str]) -> None:
        """Takes up its newest desired state, as far as it is proven: a bundle must be released."""
        wanted = self.retained
        if not self.connected or wanted is None or (wanted.bundle and wanted.bundle not in released):
            return
        if wanted.generation > self.state.generation:
            self.safe_state = wanted.safe_state
        self.updater.desire(wanted)

    def work(self, outcome: str) -> None:
        """One turn of the box: what is under way goes on, well or badly."""
        state = self.state
        if state.phase is Phase.SELF_TEST:
            fault = Fault(code="selftest.too_slow", message="x") if outcome == "refuses" else None
            self.updater.tested(SelfTestDone(state.target, fault))
        elif state.phase is Phase.TRIAL and outcome in {"refuses", "fails"}:
            self.updater.bundle_failed(
                ModelFailed(digest=state.active, fault=Fault(code="model.not_finite", message="x"))
            )
        else:
            items = 0 if outcome == "waits" else 60
            live = Live(boot_id="0" * 16, at_ms=0)
            beat = Beat(digest=state.active, items_on_bundle=items, belt_running=True, camera_fault="", live=live)
            self.updater.tick(0.25, beat)
        if self.state.phase is Phase.COMMITTED and state.phase is Phase.TRIAL:
            self.proven.add(self.state.active)

    def report(self) -> Reported:
        state = self.state
        return Reported(
            boot_id="0" * 16,
            at_ms=0,
            generation=state.generation,
            phase=state.phase,
            active=state.active,
            previous=state.previous,
            target=state.target,
            blocked=state.blocked,
            fault=self.host.fault,
            items_on_active=60,
            safe_state=self.safe_state,
        )


class Air:
    """The broker: keeps the newest desired state of each agent, if it could be signed."""

    connected = True

    def __init__(self, history: "History") -> None:
        self._history = history

    def publish_bundle(self, digest: str) -> None:
        pass

    def publish_desired(self, *agents: Agent) -> None:
        for agent in agents:
            if agent.desired_bundle in self._history.released | {""}:
                self._history.boxes[agent.id].retained = desired_of(agent)


class History:
    """The fleet and everything that may happen to it.

    Args:
        engine: A migrated, empty database.
        root: An empty folder.
        bundles: Folder by digest; all of them are registered and released.
        size: Number of boxes.
    """

    def __init__(self, engine: Engine, root: Path, bundles: dict[str, Path], size: int) -> None:
        self.engine, self.now, self.bundles = engine, T0, bundles
        self.digests = sorted(bundles)
        self.boxes = {f"box-{n}": Box(f"box-{n}", root / f"box-{n}", bundles) for n in range(size)}
        self.released: frozenset[str] = frozenset()
        self._targets = 0
        self.leader = 0
        with writing(engine) as session:
            model = Model(name="apples", created_at=T0)
            session.add(model)
            session.flush()
            for number, digest in enumerate(self.digests, 1):
                session.add(ModelVersion(model_id=model.id, number=number, bundle=digest, created_at=T0))
            for name in self.boxes:
                session.add(Agent(id=name, created_at=T0, seen_at=T0))
            session.commit()
        self.release(frozenset(self.digests))
        self.restart()
        for box in self.boxes.values():
            self.report(box)

    # -- what may happen --------------------------------------------------------------------------------------

    def release(self, digests: frozenset[str]) -> None:
        """The release key lists exactly these from now on."""
        self._targets += 1
        self.released = digests
        targets = {f"bundles/{d}": TargetFile(1, {"sha256": d}, f"bundles/{d}") for d in digests}
        data = Metadata(Targets(version=self._targets, targets=targets)).to_bytes()
        with writing(self.engine) as session:
            session.add(TrustMetadata(role="targets", version=self._targets, data=data, created_at=self.now))
            session.commit()

    def restart(self) -> None:
        """Another process leads from now on."""
        self.leader += 1
        self.now += timedelta(seconds=11)
        self.executor = RolloutExecutor(self.engine, Air(self), f"leader-{self.leader}")

    def create(self, digest: str, agents: tuple[str, ...], policy: dict[str, object]) -> None:
        with writing(self.engine) as session:
            waves = ("1", "100%")
            order = Order(digest, agents=agents, waves=waves, trial_items=5, policy=policy)
            create_rollout(session, order, actor="maria", now=self.now)
            session.commit()

    def act(self, action: str, which: int, safe_state: SafeState) -> bool:
        """A person acts on one of the rollouts; returns whether that was allowed."""
        with writing(self.engine) as session:
            ids = list(session.exec(select(Rollout.id).order_by(Rollout.id)))
            if not ids:
                return False
            number = ids[which % len(ids)]
            try:
                act(session, number, action, actor="otto", reason="", now=self.now, safe_state=safe_state)
            except ConflictError:
                return False
            session.commit()
            return True

    def turn(self, after: timedelta = timedelta(seconds=1)) -> None:
        self.now += after
        self.executor.step(self.now)

    def report(self, box: Box) -> None:
        """Stores a report as ingest does, and publishes the desired state again to a box that is behind."""
        if not box.connected:
            return
        with writing(self.engine) as session:
            agent = session.get_one(Agent, box.name)
            agent.reported = msgspec.to_builtins(box.report())
            agent.reported_at = agent.seen_at = self.now
            session.add(agent)
            session.commit()
            behind = box.state.generation < agent.generation
        if behind:
            Air(self).publish_desired(agent)

    def settle(self) -> None:
        """Every box is switched on and works well, until nothing moves any more; time-outs pass."""
        for box in self.boxes.values():
            box.connected = True
        for round_number in range(18):
            for box in self.boxes.values():
                box.hear(self.released)
                for _ in range(4):
                    box.work("well")
                self.report(box)
            self.turn(timedelta(minutes=61) if round_number % 5 == 4 else timedelta(seconds=11))

    # -- what is true -----------------------------------------------------------------------------------------

    def parts(self) -> list[tuple[Rollout, RolloutAgent, Agent]]:
        with reading(self.engine) as session:
            query = select(Rollout, RolloutAgent, Agent).where(
                Rollout.id == RolloutAgent.rollout_id, Agent.id == RolloutAgent.agent_id
            )
            return list(session.exec(query.order_by(Rollout.id)))

    def moved(self, agent: Agent, part: RolloutAgent) -> bool:
        """Returns whether the agent was asked for something newer than this part's return."""
        return agent.generation > part.returned_generation
