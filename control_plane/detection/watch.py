"""The watch over a fleet: sums of windows in, all that is present now out; what it has learnt is one value.

It refuses to know where sums come from and what becomes of findings. Rules:

* Every sum is given once, oldest first for each line; sums of several lines may come in any order.
* A sum that contradicts itself, or is of an unknown bundle, is counted by its reason and used as far as it can be: the
  camera and the ejectors need no bundle.
* Time is the end of the window on the agent's clock, kept between the line's last one and `now`: a clock that jumps
  neither ages nor rejuvenates a condition.
* A line that has sent nothing for a quarter of an hour has no findings: silence is a matter of fidelity.

False alarms. Thresholds are maxima over held-out data of the fleet, over all features and speeds at once, times a
margin; with ejectors it is a mean run length. The budget is one false alarm a camera and month for each severity;
`benchmarks/drift.py` measures what is kept. `false_alarm` raises the threshold of what a person found to be nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from control_plane.detection.causes import Pattern, explain, raise_level
from control_plane.detection.contrast import ContrastReference, Member, new_member, new_reference, step
from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Detector, Finding, LineSum, Signal
from control_plane.detection.line_watch import (
    CHUNK_ITEMS,
    LEAST_ITEMS,
    LineState,
    complete,
    contrast_signal,
    usable_counts,
)
from control_plane.detection.lot_channel import UNCLEAR, new_state, record_of
from control_plane.detection.moments import Floats, moments
from control_plane.detection.reference import Fit, LotReference
from control_plane.detection.sequential import decode_state, encode_state
from models.errors import MessageError
from models.windows import Window

SILENT_S: Final = 900.0
FORGET_S: Final = 30 * 86_400.0
"""A line that has been silent for so long is forgotten."""
MOST_BUNDLES: Final = 16
"""References are kept of so many bundles, those that ran last."""
LEAST_PEERS: Final = 4
"""A line and three siblings: with fewer, the median follows the faulty one."""
LEAST_LOT_ITEMS: Final = 200
"""A shorter lot is not learnt."""
PSEUDO_LOT_S: Final = 1800.0
"""Without names of lots half an hour counts as one."""
LONGEST_SPAN_S: Final = 3600.0
RAISED: Final = 1.1
AUDIT_ITEMS: Final = "100"


class WatchState(msgspec.Struct, kw_only=True, eq=False):
    """What a watch has learnt and follows."""

    schema_version: int = 1
    lines: dict[str, LineState] = {}
    lots: dict[str, dict[str, LotReference]] = {}
    """Bundle -> variety -> reference."""
    lanes: dict[str, ContrastReference] = {}
    """By bundle."""
    peers: dict[str, ContrastReference] = {}
    used_s: dict[str, float] = {}
    """Bundle -> when a line last ran it."""


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """Items of a line whose verdicts people have looked at since the last step."""

    line: str
    items: int
    wrong: int


class Watch:
    """Follows a fleet.

    Args:
        facts: Bundle digest -> what is known of it; the caller may add to it between steps.
        state: From `dump`; None = nothing is known.
    """

    def __init__(self, facts: Mapping[str, BundleFacts], state: WatchState | None = None) -> None:
        self.facts = facts
        self.state = state or WatchState()
        self.counters: Counter[str] = Counter()
        """Sums that could not be used in full, by reason: `inconsistent`, `unknown_bundle`, `other_features`."""
        self._functions: dict[str, Floats] = {}

    @classmethod
    def load(cls, data: bytes, facts: Mapping[str, BundleFacts]) -> "Watch":
        """Returns the watch that was dumped.

        Raises:
            MessageError: `detection.bad_state`; start a new watch, which learns again.
        """
        return cls(facts, decode_state(data, WatchState))

    def dump(self) -> bytes:
        """Returns everything that was learnt. Law: `Watch.load(w.dump(), facts)` continues as `w` would."""
        return encode_state(self.state)

    def step(self, now_s: float, sums: Sequence[LineSum], reviews: Sequence[Review] = ()) -> list[Finding]:
        """Takes new sums and returns everything that is present now, of all lines.

        Args:
            now_s: Seconds since 1970 on the server's clock.
            sums: New ones, each once.
            reviews: New ones, each once.
        """
        for given in sorted(sums, key=lambda s: (s.window.started_ms, s.line)):
            self._take(given, now_s)
        for review in reviews:
            self._review(review, now_s)
        self._compare_lines()
        self._forget(now_s)
        return self._findings(now_s)

    def relearn(self, line: str) -> None:
        """Forgets what is usual for a line's camera, after it was cleaned, focused, moved or replaced."""
        state = self.state.lines.get(line)
        if state is not None:
            fresh = LineState(site=state.site)
            fresh.ejectors, fresh.ejector_latches = state.ejectors, state.ejector_latches
            self.state.lines[line] = fresh

    def false_alarm(self, finding: Finding) -> None:
        """Raises the threshold behind a finding by 10 %."""
        state = self.state.lines.get(finding.line)
        if finding.detector in {Detector.CAMERA, Detector.LANE} and state is not None:
            pool = self.state.peers if finding.detector is Detector.CAMERA else self.state.lanes
            if state.bundle in pool:
                pool[state.bundle].largest *= RAISED
        for line in [finding.line] if finding.line else finding.evidence.get("members", ()):
            state = self.state.lines.get(line)
            if state is None:
                continue
            if finding.detector is Detector.TILE:
                state.camera.factor *= RAISED
            elif state.lot_state is not None and finding.detector in {Detector.COVARIATE, Detector.LABEL}:
                state.lot_state.factor *= RAISED

    def readiness(self) -> dict[str, dict[str, str]]:
        """Returns for each bundle and variety whether its reference is `learning`, `borrowing` or `ready`."""
        found: dict[str, dict[str, str]] = {}
        for bundle, varieties in self.state.lots.items():
            for variety, reference in varieties.items():
                fit = self._fit(bundle, variety)
                state = "learning" if fit is None else "ready" if reference.fit is not None else "borrowing"
                found.setdefault(bundle, {})[variety] = state
        return found

    # -- one sum -------------------------------------------------------------------------------------------------

    def _take(self, given: LineSum, now_s: float) -> None:
        window = given.window
        line = self.state.lines.setdefault(given.line, LineState(site=given.site))
        line.site = given.site
        span_s = min(max(window.duration_ms / 1000.0, 1.0), LONGEST_SPAN_S)
        end_s = (window.started_ms + window.duration_ms) / 1000.0
        line.last_s = min(max(end_s, line.last_s), max(now_s, line.last_s))
        line.take_camera(window, span_s, line.last_s)
        line.take_ejectors(window, line.last_s)
        facts = self.facts.get(window.bundle)
        if window.bundle != line.bundle:
            line.start_bundle(window.bundle, facts)
        if facts is None:
            self.counters["unknown_bundle"] += 1
            return
        self.state.used_s[window.bundle] = max(line.last_s, self.state.used_s.get(window.bundle, 0.0))
        self._follow_lot(line, given, facts)
        line.take_truth(window, facts, line.last_s)
        try:
            counts = usable_counts(given, facts)
        except MessageError:
            self.counters["inconsistent"] += 1
            return
        if counts is None:
            self.counters["other_features"] += bool(window.items)
            return
        self._take_items(line, given, facts, counts, span_s)

    def _follow_lot(self, line: LineState, given: LineSum, facts: BundleFacts) -> None:
        window = given.window
        lot = window.lot or f"~{int(line.last_s // PSEUDO_LOT_S)}"
        if (lot, window.variety) == (line.lot, line.variety):
            return
        finished = line.lot_sum
        unusual = any(line.signals.get(source) for source in ("lots", "peers"))
        if finished is not None and line.lot_clean and not unusual and finished.items >= LEAST_LOT_ITEMS:
            references = self.state.lots.setdefault(line.bundle, {})
            references.setdefault(line.variety, LotReference()).add(
                record_of(given.line, line.lot, finished, facts, self._basis(line.bundle))
            )
        line.start_lot(lot, window.variety, line.last_s)
        line.signals["variety"] = self._strange_variety(line, facts)

    def _take_items(self, line: LineState, given: LineSum, facts: BundleFacts, counts: Floats, span_s: float) -> None:
        functions = self._basis(line.bundle)
        size = 2 * len(facts.features)
        try:
            line.take_lanes(
                given.window, facts, functions, self.state.lanes.setdefault(line.bundle, new_reference(size))
            )
        except MessageError:
            self.counters["inconsistent"] += 1
        if line.camera_faulty:
            line.pending = line.peer_pending = None
            return
        chunk = line.chunk_of(given.window, facts, counts, span_s)
        for name in ("lot_sum", "pending", "peer_pending"):
            waiting = getattr(line, name)
            if waiting is None:
                setattr(line, name, msgspec.structs.replace(chunk))
            else:
                waiting.add(chunk)
        if line.pending is not None and line.pending.items >= CHUNK_ITEMS:
            self._judge_lot(line, given.line, facts, functions)

    def _judge_lot(self, line: LineState, name: str, facts: BundleFacts, functions: Floats) -> None:
        fit = self._fit(line.bundle, line.variety)
        if fit is None or line.pending is None or line.lot_sum is None:
            line.pending = None
            return
        if line.lot_state is None:
            line.lot_state = new_state(facts)
        line.signals["lots"] = line.lot_state.take(
            line.pending, line.lot_sum, fit, facts, functions, line=name, name=line.lot, now_s=line.last_s
        )
        line.pending = None

    def _fit(self, bundle: str, variety: str) -> Fit | None:
        """Returns the reference in use: the variety's own, else its own means with the spread of a known variety."""
        references = self.state.lots.get(bundle, {})
        own = references.get(variety)
        if own is None:
            return None
        if own.fit is not None:
            return own.fit
        known = [r.fit for r in references.values() if r.fit is not None]
        return own.borrowed(max(known, key=lambda f: f.lots)) if known else None

    def _strange_variety(self, line: LineState, facts: BundleFacts) -> list[Signal]:
        variety = line.variety
        if not variety or variety in facts.varieties:
            return []
        # What was learnt on the line says what is usual, not whether the bundle judges it right.
        if not facts.varieties and self._fit(line.bundle, variety) is not None:
            return []
        known = facts.varieties or tuple(
            v for v, reference in self.state.lots.get(line.bundle, {}).items() if reference.fit is not None
        )
        if not known:
            return []
        return [
            Signal(
                name="variety",
                detector=Detector.COVARIATE,
                ratio=1.0,
                effect=1.0,
                effect_unit="variety without reference",
                lots=(line.lot,),
                evidence={"variety": variety, "known": list(known)},
                words={"variety": variety, "samples": AUDIT_ITEMS},
            )
        ]

    def _review(self, review: Review, now_s: float) -> None:
        line = self.state.lines.get(review.line)
        facts = self.facts.get(line.bundle) if line is not None else None
        if line is None or facts is None or not 0 <= review.wrong <= review.items:
            self.counters["bad_review"] += 1
            return
        nothing = Window(started_ms=0, duration_ms=0, bundle=line.bundle)
        line.take_truth(nothing, facts, min(line.last_s, now_s), reviewed=(review.items, review.wrong))

    # -- lines beside each other ---------------------------------------------------------------------------------

    def _compare_lines(self) -> None:
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for name, line in self.state.lines.items():
            if line.peer_pending is not None and line.lot and not line.lot.startswith("~"):
                groups.setdefault((line.site, line.bundle, line.variety, line.lot), []).append(name)
        for (_, bundle, _, lot), names in groups.items():
            if len(names) >= LEAST_PEERS:
                self._compare_group(bundle, lot, names)

    def _compare_group(self, bundle: str, lot: str, names: list[str]) -> None:
        lines = [self.state.lines[name] for name in names]
        waiting = [line.peer_pending for line in lines if line.peer_pending is not None]
        longest_s = max(chunk.span_s for chunk in waiting)
        if not complete(min(chunk.items for chunk in waiting), longest_s):
            return
        facts, functions = self.facts[bundle], self._basis(bundle)
        size = 2 * len(facts.features)
        reference = self.state.peers.setdefault(bundle, new_reference(size))
        chosen: list[tuple[LineState, Member, int]] = []
        rows = []
        for line, chunk in zip(lines, waiting, strict=True):
            if chunk.items >= LEAST_ITEMS:
                line.peer = line.peer or new_member(size)
                chosen.append((line, line.peer, chunk.items))
                rows.append(moments(chunk.counts, functions))
        if len(chosen) >= LEAST_PEERS:
            found = step(reference, [member for _, member, _ in chosen], np.array(rows), span_s=longest_s, lot=lot)
            for (line, member, items), (ratio, *seen) in zip(chosen, found, strict=True):
                present = member.latch.take(ratio, line.last_s, items, lot)
                signal = contrast_signal("camera", Detector.CAMERA, member.latch, seen, facts)
                # Fruit that leaves the reference changes the differences between cameras, too, and names no fault then.
                changing = line.lot_state is not None and line.lot_state.covariate.ratio >= UNCLEAR
                line.signals["peers"] = [signal] if present and (signal.marks or not changing) else []
        for line in lines:
            line.peer_pending = None

    def _forget(self, now_s: float) -> None:
        """Drops lines that are gone, and references of bundles beyond those that ran last."""
        state = self.state
        for name in [name for name, line in state.lines.items() if now_s - line.last_s > FORGET_S]:
            del state.lines[name]
        if len(state.used_s) > MOST_BUNDLES:
            oldest = min(state.used_s, key=lambda bundle: state.used_s[bundle])
            del state.used_s[oldest]
            for table in (state.lots, state.lanes, state.peers, self._functions):
                table.pop(oldest, None)

    # -- what is present -----------------------------------------------------------------------------------------

    def _findings(self, now_s: float) -> list[Finding]:
        found: list[Finding] = []
        lines_of_site: Counter[str] = Counter()
        for name, line in self.state.lines.items():
            if now_s - line.last_s > SILENT_S:
                continue
            lines_of_site[line.site] += 1
            signals = [signal for signal in line.all_signals() if math.isfinite(signal.effect)]
            if signals:
                found += explain(Pattern(line.site, name, signals, self.facts.get(line.bundle)))
        return raise_level(found, lines_of_site)

    def _basis(self, bundle: str) -> Floats:
        if bundle not in self._functions:
            self._functions[bundle] = self.facts[bundle].functions()
        return self._functions[bundle]
