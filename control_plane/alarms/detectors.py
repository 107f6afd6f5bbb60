"""Connects detection with what is stored here: facts of bundles from their files, fidelity from the database."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Final

from sqlmodel import Session

from control_plane.detection.facts import BundleFacts, facts_of
from control_plane.detection.finding import Cause, Detector, Finding, Level, Severity
from control_plane.detection.watch import Watch
from control_plane.monitoring.fidelity import Fidelity, fidelity_between
from models.profile import Profile
from models.recipe import Recipe

_LINES_A_LOOK: Final = 20
"""Lines whose fidelity is looked up in one look: a line of a fleet of 10,000 comes around every 40 minutes."""
_SPAN: Final = timedelta(hours=1)
_LEAST_WINDOWS: Final = 30
"""Five minutes of windows: of fewer, one that is late counts too much."""
_COMPLETE: Final = 0.98
_COMPLETE_CRITICAL: Final = 0.8
_CLOCK_MS: Final = 5000
"""Offsets up to here are transport and gathering of records; a wrong clock is off by minutes or hours."""


class KnownBundles(Mapping[str, BundleFacts]):
    """The facts of bundles by digest, read when they are first asked for; unknown ones are asked for again.

    Args:
        profile: Returns the profile of a bundle; None = not known here.
        recipe: Returns its recipe; None = not known here.
    """

    def __init__(self, profile: Callable[[str], Profile | None], recipe: Callable[[str], Recipe | None]) -> None:
        self._profile, self._recipe = profile, recipe
        self._facts: dict[str, BundleFacts] = {}

    def __getitem__(self, bundle: str) -> BundleFacts:
        """Returns the facts of a bundle.

        Raises:
            KeyError: The bundle was never pushed here.
        """
        if bundle not in self._facts:
            profile, recipe = self._profile(bundle), self._recipe(bundle)
            if profile is None or recipe is None:
                raise KeyError(bundle)
            outlets = {name: grade.outlet for grade in recipe.graded.values() for name in grade.classes}
            self._facts[bundle] = facts_of(
                profile,
                outlets=outlets,
                varieties=tuple(profile.varieties),
                scalar_edges={name: bins.edges for name, bins in profile.scalars.items()},
            )
        return self._facts[bundle]

    def __iter__(self) -> Iterator[str]:
        """Yields the digests that were asked for."""
        return iter(self._facts)

    def __len__(self) -> int:
        """Returns how many are known by now."""
        return len(self._facts)


def open_watch(facts: Mapping[str, BundleFacts]) -> Callable[[bytes], Watch]:
    """Returns what makes the detectors' watch from its kept state; an empty state learns from nothing."""
    return lambda state: Watch.load(state, facts) if state else Watch(facts)


class FidelityChecks:
    """Finds lines whose data are incomplete or whose clock is wrong: some lines a look, all of them in turn."""

    def __init__(self) -> None:
        self._present: dict[str, list[Finding]] = {}
        self._next = ""

    def look(self, session: Session, sites: Mapping[str, str], now: datetime) -> list[Finding]:
        """Looks at the next lines and returns everything that is present, as of the last look at each line.

        Args:
            session: Reads.
            sites: Site of each line of which something was stored lately.
            now: Aware.
        """
        names = sorted(sites)
        later = [name for name in names if name > self._next] or names
        for name in later[:_LINES_A_LOOK]:
            found = fidelity_between(session, name, now - _SPAN, now + _SPAN)
            self._present[name] = [] if found is None else list(findings_of(name, sites[name], found))
            self._next = name
        self._present = {name: found for name, found in self._present.items() if name in sites}
        return [finding for found in self._present.values() for finding in found]


def findings_of(line: str, site: str, fidelity: Fidelity) -> Iterator[Finding]:
    """Yields what is wrong with the data of one line.

    Args:
        line: Agent id.
        site: Its site.
        fidelity: Of the last hour or two.
    """
    if fidelity.windows < _LEAST_WINDOWS:
        return
    evidence = {
        "windows": fidelity.windows,
        "missing_records": fidelity.missing_records,
        "missing_items": fidelity.missing_items,
        "duplicates": fidelity.duplicates,
        "late": fidelity.late,
        "backfilled": fidelity.backfilled,
        "refused": fidelity.refused,
        "impossible": fidelity.impossible,
    }
    complete = fidelity.complete
    if complete is not None and complete < _COMPLETE:
        accounted = complete if fidelity.items_accounted is None else fidelity.items_accounted
        yield Finding(
            detector=Detector.FIDELITY,
            cause=Cause.INCOMPLETE,
            severity=Severity.CRITICAL if complete < _COMPLETE_CRITICAL else Severity.WARNING,
            level=Level.LINE,
            site=site,
            line=line,
            effect=1.0 - complete,
            effect_unit="share of the data missing",
            items=fidelity.items,
            evidence=evidence | {"items_accounted": accounted},
            action=f"Look at the network and the disk of {line}: {accounted:.1%} of its items are accounted for.",
        )
    offset_ms = fidelity.clock_offset_ms
    if offset_ms is not None and abs(offset_ms) > _CLOCK_MS:
        way = "ahead of" if offset_ms > 0 else "behind"
        yield Finding(
            detector=Detector.FIDELITY,
            cause=Cause.CLOCK,
            severity=Severity.WARNING,
            level=Level.LINE,
            site=site,
            line=line,
            effect=offset_ms / 1000.0,
            effect_unit="s",
            items=fidelity.items,
            evidence=evidence | {"clock_offset_ms": offset_ms, "by_arrival": fidelity.by_arrival},
            action=f"Set the clock of {line}: it is {abs(offset_ms) / 1000:.0f} s {way} the control plane's.",
        )
