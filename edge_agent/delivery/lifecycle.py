"""The life cycle of bundles on the box: one transition table, one small file.

The state is persisted before its effect, so whatever line of code the power fails at, the next start finds either the
old bundle or the new one and knows how often it was tried. The commit is local and final. Identity and configuration
live elsewhere and are never touched here.

Laws (property-tested): `active` is always a bundle that passed its self-test, or none; a blocked digest is never
tried again; `tries` never exceeds its limit; the generation never falls.
"""

from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from models.errors import ConflictError
from models.messages import Digest, OptionalDigest, Phase, Swap

_MAX_BLOCKED: Final = 32


class Trigger(StrEnum):
    """What happens to a bundle."""

    DESIRED = "desired"
    FETCHED = "fetched"
    TEST_STARTED = "test-started"
    TEST_PASSED = "test-passed"
    TEST_FAILED = "test-failed"
    TRIAL_STARTED = "trial-started"
    TRIAL_PASSED = "trial-passed"
    TRIAL_FAILED = "trial-failed"


# What may happen in which phase, and where it leads. Everything else is refused.
TRANSITIONS: Final[dict[tuple[Phase, Trigger], Phase]] = {
    (Phase.IDLE, Trigger.DESIRED): Phase.FETCHING,
    (Phase.FETCHING, Trigger.DESIRED): Phase.FETCHING,
    (Phase.VERIFIED, Trigger.DESIRED): Phase.FETCHING,
    (Phase.SELF_TEST, Trigger.DESIRED): Phase.FETCHING,
    (Phase.TRIAL, Trigger.DESIRED): Phase.FETCHING,
    (Phase.COMMITTED, Trigger.DESIRED): Phase.FETCHING,
    (Phase.ROLLED_BACK, Trigger.DESIRED): Phase.FETCHING,
    (Phase.FETCHING, Trigger.FETCHED): Phase.VERIFIED,
    (Phase.VERIFIED, Trigger.TEST_STARTED): Phase.SELF_TEST,
    # A crash during the self-test starts it again.
    (Phase.SELF_TEST, Trigger.TEST_STARTED): Phase.SELF_TEST,
    (Phase.SELF_TEST, Trigger.TEST_PASSED): Phase.TRIAL,
    (Phase.SELF_TEST, Trigger.TEST_FAILED): Phase.ROLLED_BACK,
    (Phase.FETCHING, Trigger.TEST_FAILED): Phase.ROLLED_BACK,
    (Phase.TRIAL, Trigger.TRIAL_STARTED): Phase.TRIAL,
    (Phase.TRIAL, Trigger.TRIAL_PASSED): Phase.COMMITTED,
    (Phase.TRIAL, Trigger.TRIAL_FAILED): Phase.ROLLED_BACK,
}


class SlotState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that must survive."""

    schema_version: Literal[1] = 1
    generation: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Newest desired state that was taken up."""
    phase: Phase = Phase.IDLE
    active: OptionalDigest = ""
    """What the line loads at start."""
    previous: OptionalDigest = ""
    """What a failed trial goes back to."""
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


def advance(state: SlotState, trigger: Trigger, **changes: object) -> SlotState:
    """The next state; pure.

    Args:
        state: Now.
        trigger: What happened.
        changes: With DESIRED: generation, target, trial_items, trial_s, rollout_id, swap, swap_within_s.

    Raises:
        ConflictError: `slots.not_allowed`: this cannot happen in this phase.
    """
    phase = TRANSITIONS.get((state.phase, trigger))
    if phase is None:
        allowed = sorted(t for p, t in TRANSITIONS if p is state.phase)
        raise ConflictError(
            "slots.not_allowed", f"A bundle in phase {state.phase} cannot be {trigger}.", expected=allowed, got=trigger
        )
    match trigger:
        case Trigger.DESIRED:
            # A trial that is overtaken by a newer wish goes back first; its digest is not to blame.
            returned = {"active": state.previous, "previous": ""} if state.phase is Phase.TRIAL else {}
            changes = {"tries": 0} | returned | changes
        case Trigger.TEST_PASSED:
            changes = {"active": state.target, "previous": state.active, "target": "", "tries": 0}
        case Trigger.TEST_FAILED:
            changes = {"target": "", "blocked": _block(state.blocked, state.target)}
        case Trigger.TRIAL_STARTED:
            changes = {"tries": state.tries + 1}
        case Trigger.TRIAL_FAILED:
            blocked = _block(state.blocked, state.active)
            changes = {"active": state.previous, "previous": "", "blocked": blocked, "tries": 0}
        case _:
            changes = {}
    return msgspec.structs.replace(state, phase=phase, **changes)


def already_running(state: SlotState, **changes: object) -> SlotState:
    """The desired bundle is the committed one: only the generation moves."""
    return msgspec.structs.replace(state, phase=Phase.COMMITTED, target="", **changes)


def _block(blocked: tuple[str, ...], digest: str) -> tuple[str, ...]:
    if not digest:
        return blocked
    return (*(d for d in blocked if d != digest), digest)[-_MAX_BLOCKED:]
