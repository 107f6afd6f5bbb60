"""Findings that lines report themselves: a camera that is blind, an ejector whose shots a photo-eye does not see.

No statistics of pictures and no reference is needed for these, so they hold from the first minute of a line on. Takes
the same sums as the detectors and keeps five minutes of them per line; the state is small and goes over a restart.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from control_plane.detection.finding import Cause, Detector, Finding, Level, LineSum, Severity
from models.errors import MessageError
from models.statistics import wilson_interval

_KEPT_S: Final = 300.0
_FRESH_S: Final = 60.0
"""A camera fault counts as present for so long after the last window that names it: three windows and some delay."""
_BLIND_CRITICAL: Final = 0.2
"""Share of the last minute without sight from which fruit passes unjudged in numbers that matter."""
_MISS_LIMIT: Final = 0.02
"""Share of shots without effect from which an ejector is weak: twice what a valve at the end of its life shows."""
_MISS_CRITICAL: Final = 0.2
_MIN_SHOTS: Final = 30


class _Span(msgspec.Struct, frozen=True, array_like=True):
    """What one sum says."""

    end_s: float
    duration_s: float
    items: int
    lot: str
    camera: dict[str, int]
    ejectors: dict[str, int]


class _Line(msgspec.Struct, array_like=True):
    site: str
    spans: list[_Span]


class ReportedFaults:
    """The watch over what lines report themselves.

    Args:
        state: Of `dump`; empty = none.

    Raises:
        MessageError: `alarms.bad_state`: the state is of another version.
    """

    def __init__(self, state: bytes = b"") -> None:
        try:
            self._lines = msgspec.msgpack.decode(state, type=dict[str, _Line]) if state else {}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MessageError("alarms.bad_state", "The kept state of a watch cannot be read.", got=error) from error

    def dump(self) -> bytes:
        """Returns the state, for another process to go on with."""
        return msgspec.msgpack.encode(self._lines)

    def step(self, now_s: float, sums: Sequence[LineSum]) -> list[Finding]:
        """Takes new sums and returns what is present now.

        Args:
            now_s: Seconds since 1970 by the server's clock; agents' clocks may be wrong, so arrival counts.
            sums: Each once, oldest first per line.
        """
        for one in sums:
            window = one.window
            span = _Span(now_s, window.duration_ms / 1000.0, window.items, window.lot, window.camera, window.ejectors)
            line = self._lines.setdefault(one.line, _Line(one.site, []))
            line.site = one.site
            line.spans.append(span)
        findings: list[Finding] = []
        for name, line in list(self._lines.items()):
            line.spans = [span for span in line.spans if span.end_s > now_s - _KEPT_S]
            if not line.spans:
                del self._lines[name]
                continue
            findings += _camera(name, line, now_s)
            findings += _ejectors(name, line)
        return findings


def _camera(name: str, line: _Line, now_s: float) -> Iterator[Finding]:
    recent = [span for span in line.spans if span.end_s > now_s - _FRESH_S]
    faults: dict[str, int] = {}
    for span in recent:
        for code, count in span.camera.items():
            if code.startswith("camera.") and code != "camera.recovered":
                faults[code] = faults.get(code, 0) + count
    blind_s = sum(span.camera.get("blind_ms", 0) for span in recent) / 1000.0
    seconds = sum(span.duration_s for span in recent)
    share = min(1.0, blind_s / seconds) if seconds > 0.0 else 0.0
    if not faults and share <= 0.0:
        return
    code = max(faults, key=lambda c: faults[c], default="camera.failed")
    frozen = code == "camera.frozen"
    what = "repeats one picture" if frozen else f"reports {code}"
    yield Finding(
        detector=Detector.TILE,
        cause=Cause.FROZEN if frozen else Cause.CAMERA_BLIND,
        severity=Severity.CRITICAL if share >= _BLIND_CRITICAL else Severity.WARNING,
        level=Level.LINE,
        site=line.site,
        line=name,
        lots=_lots(recent),
        effect=round(share, 4),
        effect_unit="share of the last minute without sight",
        items=sum(span.items for span in recent),
        evidence={"faults": faults, "blind_s": round(blind_s, 1), "seconds": round(seconds, 1)},
        action=f"Look at the camera of {name} and its cable: it {what}. The line does what line.fail_safe says.",
    )


def _ejectors(name: str, line: _Line) -> Iterator[Finding]:
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for span in line.spans:
        for place, count in span.ejectors.items():
            lane, _, rest = place.partition("/")
            outlet, _, what = rest.rpartition("/")
            table = seen.setdefault((lane, outlet), {})
            table[what] = table.get(what, 0) + count
    for (lane, outlet), table in sorted(seen.items()):
        missed, shots = table.get("missed", 0), table.get("missed", 0) + table.get("confirmed", 0)
        low, high = wilson_interval(missed / shots if shots else 0.0, shots)
        if shots < _MIN_SHOTS or low <= _MISS_LIMIT or not lane.isdecimal():
            continue
        yield Finding(
            detector=Detector.EJECTOR,
            cause=Cause.WEAK_EJECTOR,
            severity=Severity.CRITICAL if low > _MISS_CRITICAL else Severity.WARNING,
            level=Level.LANE,
            site=line.site,
            line=name,
            lane=int(lane),
            lots=_lots(line.spans),
            effect=missed / shots,
            effect_unit="share of shots without effect",
            interval=(low, high),
            items=shots,
            evidence={"outlet": outlet, "shots": table},
            action=f"Check the valve of {name}, lane {lane}, outlet {outlet}: {missed} of {shots} shots had no effect.",
        )


def _lots(spans: Sequence[_Span]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(span.lot for span in spans if span.lot))
