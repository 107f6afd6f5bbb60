"""What planning looks at and what it answers: a rollout, its agents, findings of gates, and typed steps. Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from control_plane.database.tables.rollouts import RolloutState
from control_plane.fleet.reports import NO_REPORT
from control_plane.rollouts.policy import Outcome, RolloutPolicy
from models.messages import Mode, Phase, Reported, SafeState


class Return(StrEnum):
    """The outcome of an agent that was sent back by an abort or a rollback."""

    NONE = ""
    """It was not sent back."""
    PENDING = "PENDING"
    """It was sent back and has not yet reported what came of it."""
    BACK = "BACK"
    """It reports that it runs a bundle it had committed before."""
    SAFE = "SAFE"
    """It had no way back and reports the safe state that was requested."""
    NO_WAY_BACK = "NO_WAY_BACK"
    """There is no bundle to go back to; the reason says what the agent does now."""
    REFUSED = "REFUSED"
    """The bundle it was sent back to failed there or was not trusted."""
    TIMED_OUT = "TIMED_OUT"
    """It did not report in time; the desired state stays, so it goes back when it is heard from again."""
    OVERTAKEN = "OVERTAKEN"
    """A newer desired state took the agent over first."""
    GONE = "GONE"
    """It left the rollout by rule before it reported."""


RETURNED = frozenset(Return) - {Return.NONE, Return.PENDING}
"""Conclusions; they stay, whatever the agent reports later."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    """The rollout, as far as planning needs it."""

    rollout_id: int
    state: RolloutState
    bundle: str
    wave: int
    """The last open wave, from 0."""
    policy: RolloutPolicy
    mode: Mode = Mode.LIVE
    min_items: int = 1
    """Items an agent must have judged with the bundle before it counts as succeeded."""
    dynamic: bool = False
    """Agents that appear later join the last wave; the rollout stays open for them."""
    cleared_wave: int = -1
    """A person went on in spite of this wave's thresholds."""
    safe_state: SafeState = SafeState.NONE
    """What agents without a way back do after an abort or a rollback, as a person requested it."""
    released: frozenset[str] | None = None
    """Digests that the release key lists; None = nothing is signed, so nothing is excluded."""
    watched_since: datetime | None = None
    """Since when agents could be heard without interruption; None = silence proves nothing."""


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent's part in the rollout, and what it reports."""

    agent_id: str
    wave: int
    reported: Reported = NO_REPORT
    labels: Mapping[str, object] = field(default_factory=dict)
    seen_at: datetime | None = None
    """Last sign of life; None = there was none."""
    gone: str = ""
    """Why the agent can take no part any more (revoked, forgotten, excluded); empty = it can."""
    generation: int = 0
    """Desired generation that this rollout gave the agent; 0 = its turn has not come."""
    attempt: int = 0
    outcome: Outcome = Outcome.QUEUED
    """As concluded so far."""
    assigned_at: datetime | None = None
    started_at: datetime | None = None
    """When the agent first reported that it had taken the bundle up."""
    tried: bool = False
    """It was seen in its trial."""
    previous_bundle: str = ""
    """What the agent reported as committed when it was given this rollout's bundle."""
    returned_generation: int = 0
    """Desired generation that sent it back; 0 = it was not sent back."""
    return_bundle: str = ""
    """Where it was sent back to; empty = a recall, because there was no way back."""
    return_safe_state: SafeState = SafeState.NONE
    """The safe state that the recall asked for."""
    returned_at: datetime | None = None
    returned: Return = Return.NONE
    """As concluded so far."""
    compared: int = 0
    """Items that champion and challenger both judged, in a rollout of mode shadow."""
    desired_generation: int = 0
    """Generation of the agent's newest desired state, of any origin."""
    desired_rollout: int = 0
    """The rollout that asked for it; 0 = none."""

    def overtaken_by(self, rollout_id: int) -> bool:
        """Returns whether a newer desired state has taken the agent over from this rollout."""
        latest = self.returned_generation or self.generation
        return self.desired_generation > latest if latest else self.desired_rollout > rollout_id

    @property
    def committed(self) -> str:
        """Digest of the bundle it has committed, by its last report; a bundle on trial is none. Empty = nothing."""
        return self.reported.previous if self.reported.phase is Phase.TRIAL else self.reported.active


@dataclass(frozen=True, slots=True)
class Finding:
    """What a quality gate found: a reason to act, from outside the planner."""

    gate: str
    state: RolloutState
    """PAUSED, ABORTED or ROLLING_BACK."""
    reason: str


@dataclass(frozen=True, slots=True)
class RecordProgress:
    """Step: this agent has taken the bundle up; `tried` when it is in its trial."""

    agent_id: str
    tried: bool


@dataclass(frozen=True, slots=True)
class Conclude:
    """Step: this agent is done with the bundle, and why."""

    agent_id: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Step: this agent gets the bundle."""

    agent_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Revert:
    """Step: this agent is sent back to a bundle; an empty one is a recall, which may ask for a safe state."""

    agent_id: str
    bundle: str
    safe_state: SafeState = SafeState.NONE


@dataclass(frozen=True, slots=True)
class ConcludeReturn:
    """Step: what became of this agent's way back, and why."""

    agent_id: str
    returned: Return
    reason: str


@dataclass(frozen=True, slots=True)
class Enrol:
    """Step: this agent takes part from now on."""

    agent_id: str
    wave: int


@dataclass(frozen=True, slots=True)
class OpenWave:
    """Step: the next wave begins."""

    wave: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChangeState:
    """Step: the rollout changes its state. A pause clears its wave's thresholds for the person who resumes."""

    state: RolloutState
    reason: str


Step = RecordProgress | Conclude | Assign | Revert | ConcludeReturn | Enrol | OpenWave | ChangeState
