"""What shows an alarm: its finding's evidence, made safe to store; histograms before and since; pictures."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlmodel import Session, col, desc, select

from control_plane.database.tables.agents import EventRow
from control_plane.database.tables.alarms import Alarm
from control_plane.fleet.spooled import PICTURE
from control_plane.monitoring.rollups import MINUTE
from control_plane.monitoring.windows import SpanSum, spans_of
from models.errors import MessageError
from models.profile import Profile

MAX_BYTES: Final = 64 * 1024
"""A histogram of 16 features before and after, a grid of dirt and a small picture have about 20 kB."""
_DEPTH: Final = 8
_BEFORE: Final = timedelta(minutes=60)
_LONGEST: Final = timedelta(minutes=60)
"""Histograms show at most an hour on either side."""
_MOST_FEATURES: Final = 6
_MOST_PICTURES: Final = 4


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


def named_features(evidence: dict[str, Any]) -> list[str]:
    """Returns the features that the evidence names, the strongest first, at most six."""
    tables = [evidence, *(entry for entry in _tables(evidence.get("explains")))]
    found: dict[str, None] = {}
    for table in tables:
        named = table.get("features")
        if isinstance(named, dict):
            found |= dict.fromkeys(str(name) for name in named)
    return list(found)[:_MOST_FEATURES]


def _tables(value: object) -> Iterable[dict[str, Any]]:
    return [entry for entry in value.values() if isinstance(entry, dict)] if isinstance(value, dict) else []


def histograms_of(
    session: Session, alarm: Alarm, features: Sequence[str], profile: Profile | None
) -> dict[str, dict[str, list[float]]]:
    """Returns the shares of items per reference bin, `before` the alarm began and `since`, of each feature.

    Args:
        session: Reads.
        alarm: Of a line; alarms above the line have no histograms.
        features: Names of the bundle's features.
        profile: Of the line's bundle; None = the bins mean nothing here.
    """
    if not alarm.line or profile is None or not features:
        return {}
    began = alarm.raised_at - timedelta(seconds=max(0.0, alarm.delay_s))
    until = min(alarm.resolved_at or alarm.seen_at, began + _LONGEST) + timedelta(minutes=1)
    before = _counts(spans_of(session, alarm.line, MINUTE, began - _BEFORE, began), profile)
    since = _counts(spans_of(session, alarm.line, MINUTE, began, until), profile)
    found = {}
    for name in features:
        if name in profile.features:
            row = profile.features.index(name)
            found[name] = {"before": _shares(before[row]), "since": _shares(since[row])}
    return found


def _counts(spans: Sequence[SpanSum], profile: Profile) -> NDArray[np.int64]:
    total = np.zeros_like(profile.count_array())
    for span in spans:
        if span.window is None:
            continue
        try:
            counts = span.window.feature_counts()
        except MessageError:
            continue
        if counts.shape == total.shape:
            total += counts
    return total


def _shares(counts: NDArray[np.int64]) -> list[float]:
    total = int(counts.sum())
    return [round(float(count) / total, 5) if total else 0.0 for count in counts]


def pictures_of(session: Session, alarm: Alarm, now: datetime) -> list[dict[str, str]]:
    """Returns the pictures of the line from about that time, newest first: `sha256`, `quantity`, `side`, `at`."""
    if not alarm.line:
        return []
    began = alarm.raised_at - timedelta(seconds=max(600.0, alarm.delay_s + 120.0))
    query = select(EventRow).where(
        EventRow.agent_id == alarm.line,
        EventRow.code == PICTURE,
        col(EventRow.received_at) > began,
        col(EventRow.received_at) < (alarm.resolved_at or now) + timedelta(minutes=2),
    )
    rows = session.exec(query.order_by(desc(EventRow.received_at)).limit(_MOST_PICTURES))
    return [
        {name: str(row.facts.get(name, ""))[:64] for name in ("sha256", "quantity", "side")}
        | {"at": row.at.isoformat()}
        for row in rows
        if row.facts.get("sha256")
    ]


def is_picture(session: Session, digest: str) -> bool:
    """Returns whether an event of an agent names this digest as a picture, within the newest ten thousand."""
    query = select(EventRow.facts).where(EventRow.code == PICTURE).order_by(desc(EventRow.received_at)).limit(10_000)
    return any(facts.get("sha256") == digest for facts in session.exec(query))
