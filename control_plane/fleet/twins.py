"""Notices two boxes under one identity: a cloned card speaks with two boot ids in turn.

A restart changes the boot id once and never goes back, because every start draws a new one. Two boxes with the same
identity push each other from the broker, so their boot ids alternate. Two returns to a boot id that was left before
are proof; one may be a message that was overtaken.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

RETURNS: Final = 2
WITHIN: Final = timedelta(minutes=10)
"""Returns are counted within this time, and the state ends when none came for so long."""
_SAVED: Final = timedelta(seconds=30)
_BOOTS: Final = 8


@dataclass(slots=True)
class _Seen:
    boots: dict[str, tuple[datetime, str]] = field(default_factory=dict)
    """Boot id -> when it spoke last, and what is known of its box."""
    current: str = ""
    returns: list[tuple[datetime, str, str]] = field(default_factory=list)
    """When, the boot id that came back, the one it took over from."""
    began: datetime | None = None
    """When the present case was found; None = one box."""
    saved_at: datetime | None = None
    saved: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Twins:
    """Two boxes under one identity.

    Attributes:
        began: When they were found; it names the case.
        boots: `boot_id` and `box` (what is known of the box; empty = nothing) of each, in the order of the boot ids.
        last_at: When the boot id changed last.
    """

    began: datetime
    boots: list[dict[str, str]]
    last_at: datetime

    def stored(self) -> dict[str, Any]:
        """Returns the form kept in `Agent.twins`, which `twins_of` reads."""
        return {"boots": self.boots, "last_at": self.last_at.isoformat()}

    @property
    def described(self) -> bool:
        """Whether something is known of both boxes."""
        return all(boot["box"] for boot in self.boots)

    def __str__(self) -> str:
        """Returns both boxes in one line."""
        return named(self.boots)


class TwinWatch:
    """Watches the boot ids of every agent, in the order in which their messages arrived."""

    def __init__(self) -> None:
        self._agents: dict[str, _Seen] = {}

    def observe(self, agent_id: str, boot_id: str, at: datetime, box: str) -> Twins | None:
        """Takes notice of one message that is no retained one.

        Args:
            agent_id: The identity.
            boot_id: What the message says.
            at: When it arrived.
            box: What is known of the box, such as its address; empty = nothing.

        Returns:
            The two boxes when they were found and what is known of them changed or was not returned lately; else None.
        """
        seen = self._agents.setdefault(agent_id, _Seen())
        before, seen.current = seen.current, boot_id
        if boot_id != before and boot_id in seen.boots and at - seen.boots[boot_id][0] <= WITHIN:
            seen.returns.append((at, boot_id, before))
        seen.returns = [r for r in seen.returns if at - r[0] <= WITHIN]
        seen.boots[boot_id] = (at, box or seen.boots.get(boot_id, (at, ""))[1])
        for old in sorted(seen.boots, key=lambda b: seen.boots[b][0])[:-_BOOTS]:
            del seen.boots[old]
        if len(seen.returns) < RETURNS:
            seen.began = seen.saved_at = None
            return None
        known = [{"boot_id": boot, "box": seen.boots.get(boot, (at, ""))[1]} for boot in sorted(seen.returns[-1][1:])]
        if seen.saved_at is not None and at - seen.saved_at < _SAVED and known == seen.saved:
            return None
        seen.began, seen.saved_at, seen.saved = seen.began or at, at, known
        return Twins(seen.began, known, seen.returns[-1][0])


def named(boots: list[dict[str, str]]) -> str:
    """Returns both boxes in one line, each by the start of its boot id and what is known of it."""
    return " and ".join(f"{b['boot_id'][:8]} ({b['box']})" if b["box"] else b["boot_id"][:8] for b in boots)


def twins_of(stored: dict[str, Any], now: datetime) -> list[dict[str, str]]:
    """Returns the two boots that speak in turn, each with `boot_id` and `box`; empty when that is over or never was."""
    if not stored or now - datetime.fromisoformat(stored["last_at"]) > WITHIN:
        return []
    boots: list[dict[str, str]] = stored["boots"]
    return boots
