"""The order of classes: the good class first, the others by name.

Data sets, bundles and pages use this order, so that column 0 is the good class and a class keeps its colour.
"""

from collections.abc import Iterable
from typing import Final

GOOD_NAMES: Final = ("sound", "good", "ok")
"""Names by which the good class is recognised where none is named; an earlier name wins."""


def good_class_among(names: Iterable[str]) -> str:
    """Returns the name that stands for the good class; empty where there is none."""
    present = set(names)
    return next((name for name in GOOD_NAMES if name in present), "")


def in_class_order(names: Iterable[str], good: str = "") -> list[str]:
    """Returns the names with the good class first and the others sorted by name.

    Args:
        names: Names of classes, each once.
        good: The good class; empty = recognised by its name.
    """
    present = list(names)
    first = good or good_class_among(present)
    return sorted(present, key=lambda name: (name != first, name))
