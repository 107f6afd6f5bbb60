"""Makes evidence safe to store: finite numbers, plain types, a bounded size. Findings come from data of the field."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

MAX_BYTES: Final = 64 * 1024
"""A histogram of 16 features before and after, a grid of dirt and a small picture have about 20 kB."""
_DEPTH: Final = 8


def storable(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Returns evidence as a database and a browser take it.

    What is not finite becomes null, what is no plain value becomes text. While it is larger than `MAX_BYTES`, its
    largest entry is left out, and `left_out` names what was.
    """
    found = {str(name): _plain(value, 0) for name, value in evidence.items()}
    sizes = {name: len(json.dumps(value)) + len(name) + 6 for name, value in found.items()}
    left_out: list[str] = []
    while found and sum(sizes.values()) > MAX_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        del found[largest], sizes[largest]
        left_out.append(largest[:64])
    return found | ({"left_out": sorted(left_out)[:20]} if left_out else {})


def _plain(value: Any, depth: int) -> Any:
    if depth > _DEPTH:
        return "..."
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, depth + 1) for entry in value]
    # PostgreSQL stores no NUL in a text.
    return str(value).replace("\x00", "")
