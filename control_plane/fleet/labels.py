"""Labels of an agent: what it reports of itself, what a person assigned, and which of the two holds.

Rule of precedence: a label that a person assigned holds over one of the same name that the agent reports; every other
reported label holds as it was reported last, so a label that the agent drops is gone.
"""

from collections.abc import Mapping
from typing import Final

from models.errors import InputError

MAX_LABELS: Final = 32
MAX_NAME: Final = 63
MAX_VALUE: Final = 128
"""Characters."""


def fits(name: str, value: str) -> bool:
    """Returns whether a label is within its bounds: 1 to 63 and at most 128 printable characters."""
    return 0 < len(name) <= MAX_NAME and len(value) <= MAX_VALUE and (name + value).isprintable()


def bounded(reported: Mapping[str, str]) -> dict[str, str]:
    """Returns the reported labels that are within bounds, by name; at most 32."""
    good = {name: reported[name] for name in sorted(reported) if fits(name, reported[name])}
    return dict(list(good.items())[:MAX_LABELS])


def effective(reported: Mapping[str, str], assigned: Mapping[str, str]) -> dict[str, str]:
    """Returns the labels that hold: rollouts select by them."""
    return bounded(reported) | dict(assigned)


def check_assigned(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns labels a person may assign.

    Raises:
        InputError: `agent.bad_labels`.
    """
    bad = [name for name, value in labels.items() if not fits(name, value)]
    if bad or len(labels) > MAX_LABELS:
        raise InputError(
            "agent.bad_labels",
            "These labels cannot be assigned.",
            expected=f"at most {MAX_LABELS}, names of 1 to {MAX_NAME} and values of at most {MAX_VALUE} characters",
            got=[name[:80] for name in bad[:3]] or len(labels),
        )
    return dict(labels)
