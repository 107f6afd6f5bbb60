"""From the pattern of the channels to a cause and one instruction. The rules are a table, read from the top.

A rule applies when all signals it needs are present and none that it excludes. It then explains signals: what a dirty
lens does to the items is no second finding. A rule takes only signals that no rule above has explained, so causes that
have nothing to do with each other are found side by side. What nothing explains is reported as unknown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from control_plane.detection.class_shares import true_shares
from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Cause, Finding, Level, Severity, Signal

_ITEMS: Final = ("camera", "lane", "covariate", "odd-lot", "label", "scale", "errors")
"""Signals that come from the items, all of which a faulty camera may change."""
_OPTICS: Final = ("focus", "exposure", "colour", "flicker", *_ITEMS)


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table."""

    cause: Cause
    needs: tuple[str, ...]
    """Signals, `a|b` = either; `signal:mark` = with this mark."""
    action: str
    """May name {line}, {lane}, {site} and the words of the signal."""
    severity: Severity = Severity.WARNING
    without: tuple[str, ...] = ()
    explains: tuple[str, ...] = ()
    """Besides those needed."""
    critical_from: float = math.inf
    """Size of the effect from which the finding is critical."""
    level: Level = Level.LINE


RULES: Final = (
    Rule(
        Cause.FROZEN,
        ("repeated",),
        "Restart the camera of {line}: it repeats old pictures, so items pass unseen.",
        severity=Severity.CRITICAL,
        explains=("dirt", *_OPTICS),
    ),
    Rule(
        Cause.CAMERA_MOVED,
        ("shift",),
        "Fasten the camera of {line} and calibrate it again: the picture has moved by {direction}.",
        explains=("dirt", "focus", *_ITEMS),
        critical_from=20.0,
    ),
    Rule(
        Cause.CAMERA_DIRTY,
        ("dirt",),
        "Wipe the lens of {line}; the dirt is at the {where}.",
        explains=_OPTICS,
        critical_from=0.15,
    ),
    Rule(
        Cause.LIGHT_COLOUR,
        ("colour",),
        "Check the lamp of {line} and the white balance of its camera: the light has become {direction}.",
        explains=("exposure", "focus", *_ITEMS),
        critical_from=0.25,
    ),
    Rule(
        Cause.LIGHT_LEVEL,
        ("exposure",),
        "Check the lamp of {line} and the exposure of its camera: the picture has become {direction}.",
        explains=("focus", "flicker", *_ITEMS),
        critical_from=0.5,
    ),
    Rule(
        Cause.FLICKER,
        ("flicker",),
        "Check the power supply of the lamp of {line}: its light flickers.",
        explains=("focus", *_ITEMS),
    ),
    Rule(
        Cause.CAMERA_BLURRED,
        ("focus",),
        "Focus the camera of {line} and look for mist on its lens: the picture is less sharp than it was.",
        explains=_ITEMS,
        critical_from=1.4,
    ),
    Rule(
        Cause.CAMERA_MOVED,
        ("camera:place",),
        "Fasten the camera of {line} and calibrate it again: items lie elsewhere in its picture than on other lines.",
        explains=_ITEMS,
    ),
    Rule(
        Cause.CAMERA_BLURRED,
        ("camera:sharp",),
        "Focus the camera of {line} and look for mist or dirt on its lens: its items are less sharp than those of the "
        "lines beside.",
        explains=_ITEMS,
    ),
    Rule(
        Cause.LIGHT_LEVEL,
        ("camera:light",),
        "Check lamp, lens and exposure of {line}: its items look darker or brighter than those of the lines beside.",
        explains=_ITEMS,
    ),
    Rule(
        Cause.UNKNOWN,
        ("camera",),
        "Look at pictures of {line} beside those of the other lines of {site}: the same lot looks different there, "
        "most of all in {feature}.",
        explains=_ITEMS,
    ),
    Rule(
        Cause.LANE_DIFFERS,
        ("lane",),
        "Look at lane {lane} of {line}: the same lot looks different there than in the lanes beside, most of all in "
        "{feature}.",
        level=Level.LANE,
    ),
    Rule(
        Cause.WEAK_EJECTOR,
        ("ejector",),
        "Check valve, nozzle and air pressure of outlet {outlet}, lane {lane} of {line}: {percent} of its shots miss.",
        critical_from=0.3,
        level=Level.LANE,
    ),
    Rule(
        Cause.SCALE_DRIFT,
        ("scale",),
        "Clean and tare the scale of {line}: items weigh {percent} too {direction} for their size.",
        without=("odd-lot",),
        critical_from=0.1,
    ),
    Rule(
        Cause.NEW_VARIETY,
        ("variety",),
        "Have {samples} items of {variety} labelled: the bundle on {line} has never seen this variety, its accuracy is "
        "not known.",
        explains=("covariate", "odd-lot", "label", "scale"),
    ),
    Rule(
        Cause.NEW_VARIETY,
        ("odd-lot:shape|covariate:shape",),
        "Check which variety runs on {line}: the items have another shape than any lot of the announced variety.",
        explains=("covariate", "odd-lot", "label", "scale"),
    ),
    Rule(
        Cause.CONCEPT_DRIFT,
        ("errors",),
        "Have 100 items of {line} reviewed and train again: items of known truth are judged wrong in {percent}, and "
        "the camera shows no fault.",
        severity=Severity.CRITICAL,
        explains=("covariate", "odd-lot", "label"),
    ),
    Rule(
        Cause.COVARIATE_SHIFT,
        ("odd-lot|covariate",),
        "Have 100 items of {line} reviewed: its items differ from all lots of the reference, most of all in {feature}.",
        explains=("covariate", "odd-lot", "label"),
    ),
    Rule(
        Cause.PRIOR_SHIFT,
        ("label",),
        "Look at the crop, not at the machine: {line} gets {direction} {class} than usual; adjust prices or grades if "
        "it lasts.",
        severity=Severity.INFO,
    ),
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """All signals of one line that are present now."""

    site: str
    line: str
    signals: Sequence[Signal]
    facts: BundleFacts | None = None


def explain(pattern: Pattern, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Returns the findings of a line in the order of their rules; each signal is in one, or explained by one."""
    left = list(pattern.signals)
    present = {name for signal in left for name in (signal.name, *(f"{signal.name}:{m}" for m in signal.marks))}
    found: list[Finding] = []
    for rule in rules:
        names = _names(left)
        if not all(_met(need, names) for need in rule.needs) or any(name in present for name in rule.without):
            continue
        shown = [signal for signal in left if any(_fits(signal, need) for need in rule.needs)]
        gone = {signal.name for signal in shown} | set(rule.explains)
        explained = [signal for signal in left if signal.name in gone and signal not in shown]
        left = [signal for signal in left if signal.name not in gone]
        # Ejectors and lanes have a signal each; every other cause speaks of its strongest one.
        chosen = shown if rule.level is Level.LANE else [max(shown, key=lambda signal: signal.ratio)]
        found += [_finding(rule, pattern, signal, explained) for signal in chosen]
    return found + [_finding(_LEFT_OVER, pattern, signal, []) for signal in left]


_LEFT_OVER: Final = Rule(
    Cause.UNKNOWN, (), "Look at {line}: its statistics have left what is usual, and no rule names the reason."
)


def _names(signals: Iterable[Signal]) -> set[str]:
    return {name for s in signals for name in (s.name, *(f"{s.name}:{mark}" for mark in s.marks))}


def _met(need: str, names: set[str]) -> bool:
    return any(option in names for option in need.split("|"))


def _fits(signal: Signal, need: str) -> bool:
    return _met(need, _names([signal]))


class _Words(dict[str, str]):
    """Words for an instruction; one that is missing is left out instead of failing the report."""

    def __missing__(self, key: str) -> str:
        return ""


def _finding(rule: Rule, pattern: Pattern, signal: Signal, explained: Sequence[Signal]) -> Finding:
    words = _Words(line=pattern.line, site=pattern.site, lane="" if signal.lane is None else str(signal.lane))
    words.update(signal.words)
    evidence: dict[str, Any] = {"signal": signal.name, "strength": round(signal.ratio, 3), **signal.evidence}
    if explained:
        evidence["explains"] = {s.name: s.evidence for s in explained}
    interval, effect = signal.interval, signal.effect
    if rule.cause is Cause.PRIOR_SHIFT and pattern.facts is not None and pattern.facts.confusion:
        effect, interval, evidence["true_shares"] = _prior(signal, pattern.facts)
    critical = abs(signal.effect) >= rule.critical_from
    return Finding(
        detector=signal.detector,
        cause=rule.cause,
        severity=Severity.CRITICAL if critical else rule.severity,
        level=rule.level,
        site=pattern.site,
        line=pattern.line,
        lane=signal.lane,
        lots=signal.lots,
        effect=effect,
        effect_unit=signal.effect_unit,
        interval=interval,
        items=signal.items,
        delay_items=signal.delay_items,
        delay_s=signal.delay_s,
        evidence=evidence,
        action=rule.action.format_map(words),
    )


def _prior(signal: Signal, facts: BundleFacts) -> tuple[float, tuple[float, float], dict[str, Any]]:
    """Returns the change of the true share of the class that changed most, its interval, and all estimated shares."""
    counts = np.array([signal.evidence["counts"][name] for name in facts.classes], np.float64)
    shares, ends = true_shares(counts, np.asarray(facts.confusion, np.float64))
    k = facts.classes.index(signal.words["class"])
    usual = np.array([signal.evidence["usual_shares"][name] for name in facts.classes], np.float64)
    before = true_shares(usual * counts.sum(), np.asarray(facts.confusion, np.float64))[0][k]
    table: Mapping[str, Any] = {
        name: {"share": round(float(s), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
        for name, s, (low, high) in zip(facts.classes, shares, ends, strict=True)
    }
    return float(shares[k] - before), (float(ends[k, 0] - before), float(ends[k, 1] - before)), dict(table)


_SHARED: Final = frozenset({Cause.PRIOR_SHIFT, Cause.COVARIATE_SHIFT, Cause.NEW_VARIETY, Cause.CONCEPT_DRIFT})
_LEAST_LINES: Final = 3
_LEAST_SITES: Final = 2
_SHARE_OF_LINES: Final = 0.6


def raise_level(findings: Sequence[Finding], lines_of_site: Mapping[str, int]) -> list[Finding]:
    """Merges what most lines of a site show at once into one finding, and so for most sites of the fleet.

    Lines of a site see the same lots, and lines of a fleet run the same bundle: a cause that lies in either is one
    finding, not one for each line. A fault of a camera stays with its line.

    Args:
        findings: Of lines and lanes.
        lines_of_site: Site -> lines that report now.
    """
    kept = list(findings)
    for site, lines in lines_of_site.items():
        for cause in _SHARED:
            same = [f for f in kept if f.site == site and f.cause is cause and f.level is Level.LINE]
            if len(same) >= max(_LEAST_LINES, _SHARE_OF_LINES * lines):
                kept = [f for f in kept if f not in same]
                kept.append(_merged(same, Level.SITE, site, sorted(f.line for f in same)))
    for cause in _SHARED:
        same = [f for f in kept if f.cause is cause and f.level is Level.SITE]
        if len(same) >= max(_LEAST_SITES, _SHARE_OF_LINES * len(lines_of_site)):
            kept = [f for f in kept if f not in same]
            kept.append(_merged(same, Level.FLEET, "", sorted(f.site for f in same)))
    return kept


def _merged(same: Sequence[Finding], level: Level, site: str, members: list[str]) -> Finding:
    first = max(same, key=lambda f: (f.severity.rank, abs(f.effect)))
    subject = first.line or first.site
    return Finding(
        detector=first.detector,
        cause=first.cause,
        severity=first.severity,
        level=level,
        site=site,
        lots=tuple(dict.fromkeys(lot for f in same for lot in f.lots))[-8:],
        effect=first.effect,
        effect_unit=first.effect_unit,
        interval=first.interval,
        items=sum(f.items for f in same),
        delay_items=min(f.delay_items for f in same),
        delay_s=min(f.delay_s for f in same),
        evidence={**first.evidence, "members": members},
        action=first.action.replace(subject, site or "the fleet") if subject else first.action,
    )
