"""Divides agents into waves, which get the bundle one after the other. Pure.

Laws: every agent is in exactly one wave, and waves have no holes.
"""

import math
from collections.abc import Sequence

from models.errors import InputError

Wave = int | str | Sequence[str]
"""A number of agents, a percentage (`"50%"`), or the agents' names."""


def divide(agents: Sequence[str], waves: Sequence[Wave]) -> dict[str, int]:
    """Puts agents into waves.

    Args:
        agents: Ids, in the order in which they get the bundle.
        waves: Cumulative sizes, growing, as numbers or percent; or a list of names, which forms a wave of its own.
            The agents that are left form a last wave.

    Returns:
        Wave (from 0) by agent, in the order of the waves.

    Raises:
        InputError: `rollout.bad_waves`.
    """
    found: dict[str, int] = {}
    named = {name for wave in waves if not isinstance(wave, int | str) for name in wave}
    strangers = named - set(agents)
    if strangers:
        raise _bad_waves("A wave names agents that the selector does not mean.", sorted(strangers))
    queue = [agent for agent in agents if agent not in named]
    number = 0
    for wave in waves:
        if isinstance(wave, int | str):
            size = _bound(wave, len(agents)) - len(found)
            if size < 0:
                raise _bad_waves("Waves grow.", list(waves))
            members, queue = queue[:size], queue[size:]
        else:
            members = [name for name in wave if name not in found]
        found |= dict.fromkeys(members, number)
        number += bool(members)
    return found | dict.fromkeys(queue, number)


def _bound(wave: int | str, total: int) -> int:
    text = str(wave)
    digits = text.removesuffix("%")
    if not digits.isdecimal() or int(digits) == 0 or (text.endswith("%") and int(digits) > 100):
        raise _bad_waves("This is no size of a wave.", wave)
    return min(total, math.ceil(total * int(digits) / 100) if text.endswith("%") else int(digits))


def _bad_waves(message: str, got: object) -> InputError:
    return InputError("rollout.bad_waves", message, expected="such as 1, 50%, 100%, or names of agents", got=got)
