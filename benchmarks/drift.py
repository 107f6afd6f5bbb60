"""Detection on simulated fleets: false alarms, delays and causes: `python -m benchmarks.drift [--quick]`.

A fleet of two sites with four lines each is learnt for some days, then three things are measured from there:

* *Benign days*: lots change, light wanders, day follows night, nothing is wrong. Every finding that begins is a false
  alarm; one of the same key within its refractory time (1 h for cameras, lanes and ejectors, 4 h for lots) counts once.
* *Faults*: each is put into a fresh copy of the learnt fleet. The delay runs from the fault to the first finding with
  the right cause at the right place; the cause that is named first fills the confusion matrix.
* *Peers* read the same counts: PSI above 0.2 by hour, a KS test by five minutes, river's ADWIN and Page-Hinkley where
  they are installed, and a detector that always alarms. PSI and KS also get the lowest threshold with which they
  would have raised no false alarm at all: their own maximum on the benign days.

The exit status is not zero when a bound is missed.
"""

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks.drift_peers import TUNED, Peer, peers
from benchmarks.drift_streams import BUNDLE, VARIETIES, Fault, Population, Site
from benchmarks.figures import Bound, Figures, Row
from control_plane.detection.accuracy import AccuracyState, accuracy_of
from control_plane.detection.finding import Cause, Detector, Finding, LineSum
from control_plane.detection.watch import Watch
from models.windows import Window, merge

SPAN_S: Final = 120.0
FINE_S: Final = 10.0
DAY_S: Final = 86_400.0
BUDGET: Final = 1.0 / 30.0
"""False alarms a camera and day, for each severity."""
SLOW: Final = frozenset({Detector.COVARIATE, Detector.LABEL, Detector.ACCURACY})
LEAD_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Case:
    """A fault, and what should be said of it."""

    name: str
    fault: str
    cause: Cause
    horizon_h: float
    whole_site: bool = False
    ramp_h: float = 0.0
    size: float = 1.0
    span_s: float = FINE_S
    with_sensor: bool = True


CASES: Final = (
    Case("brightness -25 %", "brightness", Cause.LIGHT_LEVEL, 1.0),
    Case("lamp colour +-10 %", "colour", Cause.LIGHT_COLOUR, 1.0),
    Case("blur", "blur", Cause.CAMERA_BLURRED, 1.0),
    Case("dirt, sudden", "dirt", Cause.CAMERA_DIRTY, 1.0),
    Case("dirt, creeping over 2 h", "dirt", Cause.CAMERA_DIRTY, 3.0, ramp_h=2.0, span_s=60.0),
    Case("bump, 13 px", "bump", Cause.CAMERA_MOVED, 1.0),
    Case("brightness, no camera sensor", "brightness", Cause.LIGHT_LEVEL, 3.0, span_s=30.0, with_sensor=False),
    Case("blur, no camera sensor", "blur", Cause.CAMERA_BLURRED, 3.0, span_s=30.0, with_sensor=False),
    Case("bump, no camera sensor", "bump", Cause.CAMERA_MOVED, 3.0, span_s=30.0, with_sensor=False),
    Case("one lane darker", "lane", Cause.LANE_DIFFERS, 4.0, span_s=60.0),
    Case("weak valve, 15 % miss", "weak valve", Cause.WEAK_EJECTOR, 8.0, span_s=60.0),
    Case("scale +5 % over 2 h", "scale drift", Cause.SCALE_DRIFT, 10.0, ramp_h=2.0, span_s=SPAN_S),
    Case("prior shift, +22 points of rot", "prior shift", Cause.PRIOR_SHIFT, 16.0, whole_site=True, span_s=SPAN_S),
    Case("new variety, announced", "announced variety", Cause.NEW_VARIETY, 1.0, whole_site=True, span_s=60.0),
    Case("new variety, not announced", "new variety", Cause.NEW_VARIETY, 16.0, whole_site=True, span_s=SPAN_S),
    Case("new defect on 10 %", "new defect", Cause.COVARIATE_SHIFT, 16.0, whole_site=True, span_s=SPAN_S),
    Case("concept drift, 10 % of truths", "concept drift", Cause.CONCEPT_DRIFT, 16.0, whole_site=True, span_s=SPAN_S),
)


@dataclass(slots=True)
class Episode:
    """What became of one fault."""

    case: Case
    named: str = ""
    """Cause of the first finding; empty = nothing was found."""
    delay_s: float | None = None
    """To the right cause."""
    delay_items: int = 0
    delay_lots: int = 0
    beside: int = 0
    """Findings elsewhere that the fault does not explain."""
    peers_s: dict[str, float | None] = field(default_factory=dict)


def clopper_pearson(count: int, exposure: float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate, events per unit of exposure (Garwood 1936, Poisson form of Clopper & Pearson)."""
    tail = (1.0 - level) / 2.0
    low = stats.chi2.ppf(tail, 2 * count) / 2.0 if count else 0.0
    return float(low / exposure), float(stats.chi2.ppf(1.0 - tail, 2 * count + 2) / 2.0 / exposure)


def fleet(population: Population, seed: int, items_per_s: float) -> list[Site]:
    return [Site(population, f"site-{k}", seed=seed + k, items_per_s=items_per_s) for k in range(2)]


def spans(sites: list[Site], until_s: float, span_s: float) -> Iterator[tuple[float, list[LineSum]]]:
    while sites[0].now_s < until_s:
        sums = [given for site in sites for given in site.span(span_s)]
        yield sites[0].now_s, sums


def learn(population: Population, days: float, items_per_s: float) -> tuple[Watch, list[Site], list[Finding]]:
    """A fleet that was watched from its first minute, and what it was told meanwhile."""
    sites = fleet(population, 100, items_per_s)
    watch = Watch({BUNDLE: population.facts})
    seen: dict[str, Finding] = {}
    for now_s, sums in spans(sites, days * DAY_S, SPAN_S):
        for finding in watch.step(now_s, sums):
            seen.setdefault(finding.key, finding)
    return watch, sites, list(seen.values())


class Raised:
    """Counts conditions that begin, each once within its refractory time."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self.found: list[tuple[float, Finding]] = []

    def take(self, now_s: float, findings: list[Finding]) -> list[Finding]:
        """Returns those that begin now."""
        begun = []
        for finding in findings:
            quiet_s = 4 * 3600.0 if finding.detector in SLOW else 3600.0
            if now_s - self._last.get(finding.key, -1e9) > quiet_s:
                begun.append(finding)
                self.found.append((now_s, finding))
            self._last[finding.key] = now_s
        return begun


def benign(population: Population, state: bytes, sites: list[Site], days: float, runs: int) -> dict[str, Any]:
    """Days without any fault, in several futures of the learnt fleet."""
    raised, compared = [], peers(population.profile)
    exposure, errors = 0.0, []
    for run in range(runs):
        here = copy.deepcopy(sites)
        for k, site in enumerate(here):
            site.reseed(5000 + 10 * run + k)
        watch = Watch.load(state, {BUNDLE: population.facts})
        counted = Raised()
        for peer in compared:
            peer.restart()
        began_s = here[0].now_s
        blocks = Blocks(population)
        for now_s, sums in spans(here, began_s + days * DAY_S, SPAN_S):
            counted.take(now_s, watch.step(now_s, sums))
            for peer in compared:
                peer.take(now_s, sums)
            blocks.take(here, sums)
        errors += blocks.errors
        exposure += days * sum(site.lines for site in here)
        raised += counted.found
    return {"found": raised, "camera_days": exposure, "peers": compared, "accuracy": errors}


class Blocks:
    """Accuracy without labels against the truth, in blocks of about 3,000 items a line."""

    def __init__(self, population: Population) -> None:
        self._facts = population.facts
        self._sums: dict[str, tuple[Window, int, int]] = {}
        self.errors: list[tuple[float, bool, float]] = []
        """Estimate - truth, whether the range covers the truth, error of the constant."""

    def take(self, sites: list[Site], sums: list[LineSum], causes: frozenset[Cause] = frozenset()) -> None:
        """Adds a span, and judges blocks that are full."""
        truth = [total for site in sites for total in site.truth]
        for given, total in zip(sums, truth, strict=True):
            window = given.window
            known = self._sums.get(given.line)
            if known is not None:
                window = merge(known[0], window)
            items, right = (known[1], known[2]) if known else (0, 0)
            self._sums[given.line] = (window, items + total.items, right + total.right)
            if items + total.items >= 3000:
                self._judge(*self._sums.pop(given.line), causes)

    def _judge(self, window: Window, items: int, right: int, causes: frozenset[Cause]) -> None:
        found = accuracy_of(window, self._facts, causes, 0.0)
        if found.state is AccuracyState.UNKNOWN or found.value is None:
            return
        truth = right / items
        covered = (found.low or 0.0) <= truth <= (found.high or 1.0)
        self.errors.append((found.value - truth, covered, (found.reference or 0.0) - truth))


def run_case(
    population: Population, state: bytes, sites: list[Site], case: Case, seed: int, watched: list[Peer], peers_h: float
) -> tuple[Episode, Blocks]:
    """Puts one fault into a copy of the learnt fleet; stops when the right cause is named, or at the horizon."""
    here = copy.deepcopy(sites)[:1]
    site = here[0]
    site.reseed(seed)
    site.with_sensor = case.with_sensor
    watch = Watch.load(state, {BUNDLE: population.facts})
    row = seed % site.lines
    for now_s, sums in spans(here, site.now_s + LEAD_S, SPAN_S):
        before = {f.key for f in watch.step(now_s, sums)}
    start_s = site.now_s
    lines = tuple(range(site.lines)) if case.whole_site else (row,)
    site.fault = Fault(case.fault, start_s, 3600.0 * case.ramp_h, lines, case.size)
    episode, blocks, lots = Episode(case), Blocks(population), site.lots
    places = {f"{site.name}/line-{k}" for k in lines}
    elapsed_s = 0.0
    items = 0
    for now_s, sums in _until(here, case):
        elapsed_s += case.span_s
        items += sum(s.window.items for s in sums if s.line in places) // len(places)
        findings = [f for f in watch.step(now_s, sums) if f.key not in before]
        blocks.take(here, sums)
        for peer in watched:
            peer.take(now_s, [s for s in sums if s.line in places])
        ours = [f for f in findings if f.line in places or not f.line]
        episode.beside += sum(f.line != "" and f.line not in places for f in findings)
        if ours and not episode.named:
            episode.named = str(ours[0].cause)
        if any(f.cause is case.cause for f in ours):
            episode.delay_s, episode.delay_items, episode.delay_lots = elapsed_s, items, site.lots - lots
            break
    _rest_for_peers(here, watched, places, start_s + 3600.0 * min(case.horizon_h, peers_h))
    episode.peers_s = {peer.name: peer.first_s - start_s if peer.first_s else None for peer in watched}
    return episode, blocks


def _rest_for_peers(here: list[Site], watched: list[Peer], places: set[str], until_s: float) -> None:
    """Lets the peers go on when the right cause is already named."""
    for now_s, sums in spans(here, until_s, SPAN_S):
        for peer in watched:
            peer.take(now_s, [s for s in sums if s.line in places])


def _until(here: list[Site], case: Case) -> Iterator[tuple[float, list[LineSum]]]:
    """Spans over the horizon, counted in hours of production."""
    for _ in range(round(3600.0 * case.horizon_h / case.span_s)):
        sums = [given for site in here for given in site.span(case.span_s)]
        yield here[0].now_s, sums


def show(figures: Figures, found: dict[str, Any], episodes: list[Episode], learnt: list[Finding]) -> None:
    """All tables with their bounds."""
    days = found["camera_days"]
    by_severity = Counter(str(f.severity) for _, f in found["found"])
    rows: list[Row] = [("benign camera-days", days, "")]
    bounds: dict[str, Bound] = {}
    for severity in ("info", "warning", "critical"):
        low, high = clopper_pearson(by_severity[severity], days)
        name = f"false alarms a camera-day, {severity}"
        rows += [(name, by_severity[severity] / days, f"(95 %: {low:.4f} to {high:.4f})")]
        bounds[name] = ("<=", BUDGET)
    rows.append(
        (
            "which",
            ", ".join(f"{n} x {k}" for k, n in Counter(str(f.cause) for _, f in found["found"]).items()) or "none",
            "",
        )
    )
    rows.append(("while learning", ", ".join(sorted({f.key for f in learnt})) or "none", ""))
    figures.table("false alarms", rows, bounds)
    causes(figures, episodes)
    delays(figures, episodes)
    comparison(figures, found, episodes)


def causes(figures: Figures, episodes: list[Episode]) -> None:
    """The confusion matrix as rows, and the share of right causes among what was found."""
    rows: list[Row] = []
    for case in CASES:
        named = Counter(e.named or "nothing" for e in episodes if e.case is case)
        rows.append((case.name, ", ".join(f"{cause} {n}" for cause, n in named.most_common()), ""))
    right = sum(e.named == e.case.cause for e in episodes)
    name = "first cause is the right one"
    rows.append((name, 100.0 * right / len(episodes), f"% of {len(episodes)}"))
    figures.table("causes", rows, {name: (">=", 95.0)})


def delays(figures: Figures, episodes: list[Episode]) -> None:
    """Median delays of those found, and how many were."""
    rows: list[Row] = []
    for case in CASES:
        own = [e for e in episodes if e.case is case]
        done = [e for e in own if e.delay_s is not None]
        if not done:
            rows.append((case.name, "not found", f"in {case.horizon_h:g} h, 0 of {len(own)}"))
            continue
        minutes = float(np.median([e.delay_s or 0.0 for e in done])) / 60.0
        items = float(np.median([e.delay_items for e in done]))
        lots = float(np.median([e.delay_lots for e in done]))
        rows.append((case.name, minutes, f"min, {items:,.0f} items, {lots:g} lots, {len(done)} of {len(own)}"))
    whole = "found with the right cause within the horizon"
    rows.append((whole, 100.0 * sum(e.delay_s is not None for e in episodes) / len(episodes), "%"))
    figures.table("median delay to the right cause", rows, {whole: (">=", 95.0)})


def comparison(figures: Figures, found: dict[str, Any], episodes: list[Episode]) -> None:
    """The peers on the same benign days, and how many faults each found before ours or at all."""
    days = found["camera_days"]
    rows: list[Row] = [("ours: false alarms a camera-day", len(found["found"]) / days, "")]
    for peer in found["peers"]:
        rows.append((f"{peer.name}: false alarms a camera-day", peer.alarms / days, _found_by(peer.name, episodes)))
        tuned = f"{peer.name}{TUNED}"
        if any(tuned in e.peers_s for e in episodes):
            rows.append((f"... at its benign maximum of {peer.largest:.3g}", 0.0, _found_by(tuned, episodes)))
    figures.table("peers on the same streams", rows, {})


def _found_by(name: str, episodes: list[Episode]) -> str:
    """How many faults a peer alarmed on within the horizon, whatever the cause, and after how long."""
    seen = [seconds for e in episodes if (seconds := e.peers_s.get(name)) is not None]
    delay = f", median {np.median(seen) / 60.0:,.0f} min" if seen else ""
    return f"; alarms after {len(seen)} of {len(episodes)} faults{delay}"


def accuracy(figures: Figures, benign_errors: list[tuple[float, bool, float]], by_case: dict[str, Blocks]) -> None:
    """Error of the label-free accuracy against the truth."""
    rows: list[Row] = []
    for name, errors in (("benign", benign_errors), *((n, b.errors) for n, b in by_case.items())):
        if not errors:
            continue
        table = np.array([(100.0 * e, c, 100.0 * k) for e, c, k in errors])
        covers = f"range covers {100.0 * table[:, 1].mean():.0f} % of {len(table)} blocks"
        about = f"bias {table[:, 0].mean():+.2f}; constant {np.abs(table[:, 2]).mean():.2f}; {covers}"
        rows.append((name, float(np.abs(table[:, 0]).mean()), f"points off; {about}"))
    bounds: dict[str, Bound] = {"benign": ("<=", 1.0)} if benign_errors else {}
    figures.table("accuracy without labels, blocks of 3,000 items", rows, bounds)


def main() -> int:
    """Prints the tables; the status says whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer days and one episode of each fault")
    parser.add_argument("--episodes", type=int, default=4, help="of each fault, without --quick")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    figures = Figures(Console(width=170))
    population = Population()
    rate = 1.5
    watch, sites, learnt = learn(population, 2.0 if given.quick else 3.0, rate)
    state = watch.dump()
    figures.console.print(f"learnt in {time.monotonic() - began:.0f} s: {watch.readiness()}")
    found = benign(population, state, sites, 1.0 if given.quick else 2.0, 1 if given.quick else 2)
    figures.console.print(
        f"{time.monotonic() - began:.0f} s: {found['camera_days']:g} benign camera-days: {len(found['found'])} alarms"
    )
    largest = {peer.name: peer.largest for peer in found["peers"]}
    episodes, blocks = [], {}
    for number, case in enumerate(CASES):
        for episode in range(1 if given.quick else given.episodes):
            seed = 9000 + 100 * number + episode
            watched = peers(population.profile, largest)
            one, seen = run_case(population, state, sites, case, seed, watched, 2.0 if given.quick else 4.0)
            episodes.append(one)
            known = blocks.setdefault(case.name, seen)
            if known is not seen:
                known.errors += seen.errors
        own = [e for e in episodes if e.case is case]
        seen_as = ", ".join(f"{e.named or 'nothing'} ({'-' if e.delay_s is None else round(e.delay_s)} s)" for e in own)
        figures.console.print(f"{time.monotonic() - began:.0f} s: {case.name}: {seen_as}")
    show(figures, found, episodes, learnt)
    accuracy(figures, found["accuracy"], blocks)
    figures.console.print(
        f"{time.monotonic() - began:.0f} s; varieties {', '.join(VARIETIES)}; {len(state):,} bytes of state"
    )
    if given.json:
        figures.write(given.json, {"quick": given.quick, "episodes": given.episodes})
    for line in figures.missed:
        print("MISSED", line, file=sys.stderr)
    return 1 if figures.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
