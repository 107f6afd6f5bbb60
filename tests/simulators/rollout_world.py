"""A rollout and its agents, invented: carries steps out as the executor does.

The agents keep for themselves what they have committed, and the planner learns it from their reports alone.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.planner import plan
from control_plane.rollouts.policy import Outcome, parse_policy
from control_plane.rollouts.views import (
    AgentView,
    Assign,
    ChangeState,
    Conclude,
    ConcludeReturn,
    Enrol,
    OpenWave,
    RecordProgress,
    Return,
    Revert,
    RolloutView,
)
from models.messages import Fault, Phase, Reported, ShadowPhase

A, OLD = "a" * 64, "b" * 64
LENIENT = [{"failureType": "ALL", "thresholdPercentage": 100, "minNumberOfExecutedThings": 9}]
T0 = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)  # a Monday


def report(**facts: Any) -> Reported:
    """A report of these facts; a fault is given as a dict."""
    if isinstance(fault := facts.get("fault"), dict):
        facts["fault"] = Fault(code=fault["code"], message=fault.get("message", ""))
    for name, kind in (("phase", Phase), ("shadow_phase", ShadowPhase)):
        if name in facts:
            facts[name] = kind(facts[name])
    return Reported(**({"boot_id": "0" * 16, "at_ms": 0} | facts | {"blocked": tuple(facts.get("blocked", ()))}))


def rollout(**changes: object) -> RolloutView:
    values = {"rollout_id": 5, "state": RolloutState.RUNNING, "bundle": A, "wave": 0, "policy": parse_policy({})}
    return RolloutView(**(values | changes))


def member(agent_id: str = "a0", wave: int = 0, **changes: object) -> AgentView:
    return AgentView(**({"agent_id": agent_id, "wave": wave} | changes))


def given_bundle(**reported: object) -> AgentView:
    facts = report(**({"generation": 3} | reported))
    return member(reported=facts, generation=3, attempt=1, assigned_at=T0, started_at=T0, desired_generation=3)


@dataclass
class RolloutWorld:
    """A rollout and its agents; carries steps out as the executor does, and remembers them."""

    course: RolloutView
    members: dict[str, AgentView]
    now: datetime = T0
    given: list[tuple[datetime, str, int]] = field(default_factory=list)
    opened: list[int] = field(default_factory=lambda: [0])
    moves: list[RolloutState] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

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
                m = self.members[step.agent_id]
                generation = m.desired_generation + 1
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
                    previous_bundle=m.committed if step.attempt == 1 else m.previous_bundle,
                )
            case Revert():
                generation = self.members[step.agent_id].desired_generation + 1
                self.change(
                    step.agent_id,
                    returned_generation=generation,
                    desired_generation=generation,
                    return_bundle=step.bundle,
                    return_safe_state=step.safe_state,
                    returned_at=self.now,
                    returned=Return.PENDING,
                )
            case ConcludeReturn():
                self.change(step.agent_id, returned=step.returned)
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
                self.reasons.append(step.reason)
                cleared = self.course.wave if step.state is RolloutState.PAUSED else self.course.cleared_wave
                self.course = replace(self.course, state=step.state, cleared_wave=cleared)

    def report(self, agent_id: str, what: str) -> None:
        """The agent says something about the newest desired state it could have heard of."""
        m = self.members[agent_id]
        before = {"active": m.committed, "previous": m.reported.previous if m.reported.phase is not Phase.TRIAL else ""}
        facts = {
            "takes": before | {"phase": Phase.FETCHING, "target": A},
            "tries": {"phase": Phase.TRIAL, "active": A, "previous": m.committed},
            "commits": {"phase": Phase.COMMITTED, "active": A, "previous": m.committed, "items_on_active": 60},
            "fails": before | {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "trial.timeout"}},
            "rejects": before | {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "selftest.timeout"}},
            "returns": {"phase": Phase.COMMITTED, "active": m.return_bundle or m.committed, "previous": m.committed},
        }[what]
        if facts["previous"] == facts["active"]:
            facts["previous"] = m.reported.previous if m.reported.previous != facts["active"] else ""
        kept = {"blocked": m.reported.blocked}
        reported = report(**({"generation": m.desired_generation} | kept | facts))
        self.change(agent_id, reported=reported, seen_at=self.now)

    def resume(self) -> None:
        assert self.course.state is RolloutState.PAUSED
        self.course = replace(self.course, state=RolloutState.RUNNING)


def world(sizes: list[int], **changes: object) -> RolloutWorld:
    names = [(f"a{wave}-{k}", wave) for wave, size in enumerate(sizes) for k in range(size)]
    policy = parse_policy(changes.pop("policy", {}))
    committed = report(active=OLD, phase=Phase.COMMITTED)
    members = {name: member(name, wave, reported=committed) for name, wave in names}
    return RolloutWorld(rollout(policy=policy, **changes), members)
