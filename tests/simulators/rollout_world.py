"""A rollout and its agents, invented: carries steps out as the executor does."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.planner import (
    AgentView,
    Assign,
    ChangeState,
    Conclude,
    Enrol,
    OpenWave,
    RecordProgress,
    Revert,
    RolloutView,
    plan,
)
from control_plane.rollouts.policy import Outcome, parse_policy
from models.messages import Phase

A, OLD = "a" * 64, "b" * 64
LENIENT = [{"failureType": "ALL", "thresholdPercentage": 100, "minNumberOfExecutedThings": 9}]
T0 = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)  # a Monday


def course(**changes: object) -> RolloutView:
    values = {"rollout_id": 5, "state": RolloutState.RUNNING, "bundle": A, "wave": 0, "policy": parse_policy({})}
    return RolloutView(**(values | changes))


def member(agent_id: str = "a0", wave: int = 0, **changes: object) -> AgentView:
    return AgentView(**({"agent_id": agent_id, "wave": wave, "reported": {}} | changes))


def given_bundle(**reported: object) -> AgentView:
    facts = {"generation": 3} | reported
    return member(reported=facts, generation=3, attempt=1, assigned_at=T0, started_at=T0, desired_generation=3)


@dataclass
class LineHardware:
    """A rollout and its agents; carries steps out as the executor does, and remembers them."""

    course: RolloutView
    members: dict[str, AgentView]
    now: datetime = T0
    given: list[tuple[datetime, str, int]] = field(default_factory=list)
    opened: list[int] = field(default_factory=lambda: [0])
    moves: list[RolloutState] = field(default_factory=list)

    def turn(self, **options: object) -> list[object]:
        steps = plan(self.course, list(self.members.values()), self.now, **options)
        for step in steps:
            self.carry_out(step)
        return steps

    def change(self, agent_id: str, **facts: object) -> None:
        self.members[agent_id] = replace(self.members[agent_id], **facts)

    def carry_out(self, step: object) -> None:
        match step:
            case Assign():
                generation = self.members[step.agent_id].desired_generation + 1
                self.given.append((self.now, step.agent_id, step.attempt))
                self.change(
                    step.agent_id,
                    generation=generation,
                    desired_generation=generation,
                    desired_rollout=self.course.rollout_id,
                    attempt=step.attempt,
                    assigned_at=self.now,
                    started_at=None,
                    tried=False,
                    outcome=Outcome.QUEUED,
                )
            case Revert():
                generation = self.members[step.agent_id].desired_generation + 1
                self.change(step.agent_id, returned_generation=generation, desired_generation=generation)
            case RecordProgress():
                m = self.members[step.agent_id]
                self.change(
                    step.agent_id, outcome=Outcome.IN_PROGRESS, tried=step.tried, started_at=m.started_at or self.now
                )
            case Conclude():
                self.change(step.agent_id, outcome=step.outcome)
            case Enrol():
                self.members[step.agent_id] = member(step.agent_id, step.wave)
            case OpenWave():
                self.opened.append(step.wave)
                self.course = replace(self.course, wave=step.wave)
            case ChangeState():
                self.moves.append(step.state)
                cleared = self.course.wave if step.state is RolloutState.PAUSED else self.course.cleared_wave
                self.course = replace(self.course, state=step.state, cleared_wave=cleared)

    def report(self, agent_id: str, what: str) -> None:
        """The agent says something about the newest wish it could have heard of."""
        m = self.members[agent_id]
        facts = {
            "takes": {"phase": Phase.FETCHING},
            "tries": {"phase": Phase.TRIAL, "active": A},
            "commits": {"phase": Phase.COMMITTED, "active": A, "items_on_active": 60},
            "fails": {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "trial.timeout"}},
            "rejects": {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "selftest.timeout"}},
            "returns": {"phase": Phase.COMMITTED, "active": m.previous_bundle},
        }[what]
        self.change(agent_id, reported={"generation": m.desired_generation} | facts)

    def resume(self) -> None:
        assert self.course.state is RolloutState.PAUSED
        self.course = replace(self.course, state=RolloutState.RUNNING)


def world(sizes: list[int], **changes: object) -> LineHardware:
    names = [(f"a{wave}-{k}", wave) for wave, size in enumerate(sizes) for k in range(size)]
    policy = parse_policy(changes.pop("policy", {}))
    members = {name: member(name, wave, previous_bundle=OLD) for name, wave in names}
    return LineHardware(course(policy=policy, **changes), members)
