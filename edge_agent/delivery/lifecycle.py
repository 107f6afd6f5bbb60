"""The life cycle of bundles on the box: one transition table for the champion and for a challenger. Pure.

The state is persisted before its effect, so whatever line of code the power fails at, the next start finds either the
old bundle or the new one and the number of its tries. The commit is local and final. Identity and configuration are
stored elsewhere and are never touched here.

Laws (property-tested): `active` is always a bundle that passed its self-test, or none; outside a trial it has passed a
trial too; `previous` was committed before `active`; a blocked digest is neither of them and never tried again; `tries`
never exceeds its limit; the generation never falls.
"""

from enum import StrEnum
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from models.errors import ConflictError
from models.messages import Digest, OptionalDigest, Phase, SafeState, ShadowPhase, Swap

P = TypeVar("P", Phase, ShadowPhase)
_MAX_BLOCKED: Final = 32


class Trigger(StrEnum):
    """Events that move a bundle through its life cycle."""

    DESIRED = "desired"
    DROPPED = "dropped"
    """It is no longer wanted, and nothing else is."""
    FETCHED = "fetched"
    TEST_STARTED = "test-started"
    TEST_PASSED = "test-passed"
    TEST_FAILED = "test-failed"
    TRIAL_STARTED = "trial-started"
    """For a challenger: a line is asked to take it."""
    TRIAL_PASSED = "trial-passed"
    """For a challenger: the line has lived long enough with it."""
    TRIAL_FAILED = "trial-failed"


_Way = tuple[tuple[P, ...], P]
# What may happen in which phases, and where it leads: to the champion's next bundle, and to a challenger. Everything
# else is refused. A crash during the self-test starts it again.
_TABLE: Final[tuple[tuple[Trigger, _Way[Phase], _Way[ShadowPhase]], ...]] = (
    (Trigger.DESIRED, (tuple(Phase), Phase.FETCHING), (tuple(ShadowPhase), ShadowPhase.FETCHING)),
    (Trigger.DROPPED, (tuple(Phase), Phase.COMMITTED), (tuple(ShadowPhase), ShadowPhase.IDLE)),
    (Trigger.FETCHED, ((Phase.FETCHING,), Phase.VERIFIED), ((ShadowPhase.FETCHING,), ShadowPhase.SELF_TEST)),
    (
        Trigger.TEST_STARTED,
        ((Phase.VERIFIED, Phase.SELF_TEST), Phase.SELF_TEST),
        ((ShadowPhase.SELF_TEST,), ShadowPhase.SELF_TEST),
    ),
    (Trigger.TEST_PASSED, ((Phase.SELF_TEST,), Phase.TRIAL), ((ShadowPhase.SELF_TEST,), ShadowPhase.SHADOW)),
    (
        Trigger.TEST_FAILED,
        ((Phase.FETCHING, Phase.SELF_TEST), Phase.ROLLED_BACK),
        ((ShadowPhase.FETCHING, ShadowPhase.SELF_TEST), ShadowPhase.FAILED),
    ),
    (Trigger.TRIAL_STARTED, ((Phase.TRIAL,), Phase.TRIAL), ((ShadowPhase.SHADOW,), ShadowPhase.SHADOW)),
    (Trigger.TRIAL_PASSED, ((Phase.TRIAL,), Phase.COMMITTED), ((ShadowPhase.SHADOW,), ShadowPhase.SHADOW)),
    (Trigger.TRIAL_FAILED, ((Phase.TRIAL,), Phase.ROLLED_BACK), ((ShadowPhase.SHADOW,), ShadowPhase.FAILED)),
)
CHAMPION: Final[dict[tuple[Phase, Trigger], Phase]] = {
    (phase, trigger): to for trigger, (phases, to), _ in _TABLE for phase in phases
}
CHALLENGER: Final[dict[tuple[ShadowPhase, Trigger], ShadowPhase]] = {
    (phase, trigger): to for trigger, _, (phases, to) in _TABLE for phase in phases
}


class SlotState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the champion that must survive (`state.json`)."""

    schema_version: Literal[1] = 1
    generation: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Newest desired state that was taken up."""
    phase: Phase = Phase.IDLE
    active: OptionalDigest = ""
    """What the line loads at start."""
    previous: OptionalDigest = ""
    """What was committed before `active`; what a failed trial goes back to."""
    before: OptionalDigest | UnsetType = UNSET
    """In a trial, what was committed before `previous`; never written outside one."""
    target: OptionalDigest = ""
    """What is fetched or tested."""
    tries: Annotated[int, msgspec.Meta(ge=0)] = 0
    trial_items: Annotated[int, msgspec.Meta(ge=0)] = 0
    trial_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    rollout_id: str = ""
    swap: Swap = Swap.BELT_GAP
    """What the line waits for before the bundle on trial judges."""
    swap_within_s: float | None = None
    blocked: tuple[Digest, ...] = ()
    safe_state: SafeState | UnsetType = UNSET
    """What the line does instead of judging with a committed bundle; written only while it is asked for."""

    @property
    def committed(self) -> str:
        """The bundle that passed its trial last and judges outside a trial; empty = none did."""
        return self.previous if self.phase is Phase.TRIAL else self.active

    @property
    def settled(self) -> bool:
        """Whether nothing is being fetched, tested or tried."""
        return self.phase in {Phase.IDLE, Phase.COMMITTED, Phase.ROLLED_BACK}


class ChallengerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the challenger that must survive (`challenger.json`)."""

    schema_version: Literal[1] = 1
    generation: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Newest desired state that was taken up, of either mode."""
    phase: ShadowPhase = ShadowPhase.IDLE
    digest: OptionalDigest = ""
    tries: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Lines that took it and have not yet lived long with it."""


def advance(state: SlotState, trigger: Trigger, **changes: object) -> SlotState:
    """Returns the champion's next state.

    Args:
        state: Now.
        trigger: What happened.
        changes: With DESIRED: generation, target, trial_items, trial_s, rollout_id, swap, swap_within_s. With DROPPED:
            generation, rollout_id, safe_state.

    Raises:
        ConflictError: `slots.not_allowed`: this cannot happen in this phase.
    """
    phase = CHAMPION.get((state.phase, trigger))
    if phase is None:
        allowed = sorted(t for p, t in CHAMPION if p is state.phase)
        raise ConflictError(
            "slots.not_allowed", f"A bundle in phase {state.phase} cannot be {trigger}.", expected=allowed, got=trigger
        )
    match trigger:
        case Trigger.DESIRED | Trigger.DROPPED:
            # A trial that is overtaken goes back first; its digest is not blocked.
            changes = {"target": "", "tries": 0} | _returned(state, state.blocked) | changes
            if trigger is Trigger.DROPPED and not state.committed:
                phase = Phase.IDLE
        case Trigger.TEST_PASSED:
            changes = {"active": state.target, "previous": state.active, "before": state.previous, "target": ""}
            changes["tries"] = 0
        case Trigger.TEST_FAILED:
            blocked = _block(state.blocked, state.target)
            changes = {"target": "", "blocked": blocked, "previous": _unless_blocked(state.previous, blocked)}
        case Trigger.TRIAL_STARTED:
            changes = {"tries": state.tries + 1}
        case Trigger.TRIAL_FAILED:
            blocked = _block(state.blocked, state.active)
            changes = {"blocked": blocked, "tries": 0} | _returned(state, blocked)
        case Trigger.TRIAL_PASSED:
            # Only a bundle that has proven itself ends a safe state; one that fails its trial goes back to it.
            changes = {"before": UNSET, "safe_state": UNSET}
        case _:
            changes = {}
    return msgspec.structs.replace(state, phase=phase, **changes)


def _returned(state: SlotState, blocked: tuple[str, ...]) -> dict[str, object]:
    """Returns the slots after the end of a trial that did not pass; outside a trial nothing changes."""
    if state.phase is not Phase.TRIAL:
        return {}
    return {"active": state.previous, "previous": _unless_blocked(state.before or "", blocked), "before": UNSET}


def _unless_blocked(digest: str, blocked: tuple[str, ...]) -> str:
    return "" if digest in blocked else digest


def _block(blocked: tuple[str, ...], digest: str) -> tuple[str, ...]:
    if not digest:
        return blocked
    return (*(d for d in blocked if d != digest), digest)[-_MAX_BLOCKED:]


def advance_challenger(state: ChallengerState, trigger: Trigger, **changes: object) -> ChallengerState:
    """Returns the challenger's next state.

    Args:
        state: Now.
        trigger: What happened.
        changes: With DESIRED: generation, digest. With DROPPED: generation.

    Raises:
        ConflictError: `challenger.not_allowed`: this cannot happen in this phase.
    """
    phase = CHALLENGER.get((state.phase, trigger))
    if phase is None:
        allowed = sorted(t for p, t in CHALLENGER if p is state.phase)
        raise ConflictError(
            "challenger.not_allowed",
            f"A challenger in phase {state.phase} cannot be {trigger}.",
            expected=allowed,
            got=trigger,
        )
    match trigger:
        case Trigger.DESIRED:
            changes = {"tries": 0} | changes
        case Trigger.DROPPED:
            changes = {"tries": 0, "digest": ""} | changes
        case Trigger.TRIAL_STARTED:
            changes = {"tries": state.tries + 1}
        case Trigger.TRIAL_PASSED:
            changes = {"tries": 0}
        case _:
            changes = {}
    return msgspec.structs.replace(state, phase=phase, **changes)
