"""From the fused class probabilities of an item to its verdict, grade and outlet (`recipe.json`).

The recipe is business, not vision: it changes with the market without touching the model. An item takes the grade
whose expected loss is smallest (Bayes decision, Berger 1985) under the calibrated probabilities of its classes and
the *terms* of its variety and lot: what a grade pays, what an escaped defect and a wasted good item cost. A
threshold is no setting; it follows from the terms (`Recipe.cuts`).

Where a second look could save more than `abstain_above`, the line abstains (Chow 1970): the item takes the `unsure`
outlet. The limit is learnt from held-out items so that at most `abstain_budget` of all items do.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, InputError
from models.fusion import FusionSpec, fuse
from models.versioning import version_in

VERSION: Final = 2
UNSURE: Final = "unsure"
"""Grade of an item on which the line abstains; no other grade has this name."""
_TIE: Final = 1e-12
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z")]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Cost = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Money = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prices of grades and costs of mistakes, in the plant's currency per item; None = as in the layer below."""

    prices: dict[Name, Money] = {}
    """Grade -> what an item is paid for in it; a grade that is not listed pays nothing."""
    escaped: Cost | None = None
    """A defective item in the grade of good ones, on top of the price: claim, complaint, spoilt neighbours."""
    escaped_by_class: dict[Name, Cost] = {}
    """The same cost for single classes: rot spreads, a scar does not."""
    wasted: Cost | None = None
    """A good item in a grade of defective ones, on top of the price that is lost."""
    misgraded: Cost | None = None
    """A defective item in the grade of another defect."""
    recirculated: Cost | None = None
    """One more pass, or one look of a person: the line does not abstain where it could save less."""
    defect_share: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] | None = None
    """Share of defective items that is expected; None = the share at which the fusion is calibrated."""
    abstain_budget: Share | None = None
    """At most this share of the items takes the unsure outlet."""
    abstain_above: Cost | None = None
    """The regret from which the line abstains; learnt for the budget."""


BASE: Final = Terms(escaped=1.0, wasted=1.0, misgraded=0.0, recirculated=0.0, abstain_budget=0.0)
"""The terms where none are given: every mistake costs the same, and the line never abstains."""


def layered(layers: Iterable[Terms]) -> Terms:
    """Merges layers into one set of terms; a later layer overrides an earlier one, name by name and price by price."""
    found: dict[str, object] = {"prices": {}, "escaped_by_class": {}}
    for layer in layers:
        for name in Terms.__struct_fields__:
            value = getattr(layer, name)
            if isinstance(value, dict):
                found[name] = {**found[name], **value}  # type: ignore[dict-item]
            elif value is not None:
                found[name] = value
    return Terms(**found)  # type: ignore[arg-type]


class Grade(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grade: the outlet for items of some classes."""

    outlet: Name
    classes: tuple[Name, ...] = ()
    """Classes that belong into the grade."""


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """Where decisions change as the defect probability of an item grows, for a defect of one class."""

    good: tuple[float, float] | None
    """The interval in which the good grade is chosen; it starts at 0 unless another grade pays more for good items."""
    unsure: tuple[float, float] | None
    """The interval in which the line abstains; None = it never abstains."""

    @property
    def threshold(self) -> float | None:
        """The probability from which an item leaves the good grade; None = it never does."""
        if self.good is None:
            return 0.0
        return None if self.good[1] >= 1.0 else self.good[1]


@dataclass(frozen=True, slots=True)
class Policy:
    """The terms of one variety and lot, ready to decide.

    Attributes:
        grades: Names, the good one first.
        losses: float64 (G, C): loss of an item of class c in grade g.
        shift: float64 (C,): weights that bring probabilities to the expected share of defects (Saerens et al. 2002).
        holds: bool (G, C): class c belongs into grade g.
        abstain_above: Regret from which the line abstains; infinite = never.
        budget: Largest share of items that may be abstained from.
        recirculated: Cost of abstaining.
    """

    grades: tuple[str, ...]
    losses: NDArray[np.float64]
    shift: NDArray[np.float64]
    holds: NDArray[np.bool_]
    abstain_above: float
    budget: float
    recirculated: float

    def choose(self, fused: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Returns the grade with the smallest expected loss for each item, and what certainty would save.

        Equal losses are decided by the probability of the classes that belong into the grade, then by its place.

        Args:
            fused: (N, C) probabilities of `fuse`.

        Returns:
            (N,) rows of `grades`, (N,) regrets: expected loss above that of an item whose class is known.
        """
        posterior = fused * self.shift
        posterior = posterior / posterior.sum(axis=1, keepdims=True)
        expected = posterior @ self.losses.T
        least = expected.min(axis=1)
        near = expected <= least[:, None] + _TIE * (1.0 + np.abs(least[:, None]))
        chosen = np.where(near, posterior @ self.holds.T, -1.0).argmax(axis=1)
        return chosen, np.maximum(least - posterior @ self.losses.min(axis=0), 0.0)


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The mapping from classes to grades to outlets by expected loss."""

    schema_version: Literal[2] = VERSION
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=64)]
    """Names of the model's outputs, in their order."""
    good_class: Name
    fusion: FusionSpec = FusionSpec()
    grades: dict[Name, Grade] = {}
    """Every class belongs into one grade; empty = each class is its own grade, see `graded`."""
    terms: Terms = Terms()
    varieties: dict[Name, Terms] = {}
    """Terms per variety, as differences from `terms`."""
    lots: dict[Name, Terms] = {}
    """Terms per lot, as differences from the terms of its variety."""
    unsure_outlet: Name = "pass"
    late_outlet: Name = "pass"
    """The outlet of an item whose verdict came too late: the one that needs no action."""
    replaces: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """Digest of the bundle that this recipe was derived from; empty = the recipe was made in training."""
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """Reason of the change, for people."""

    def check(self) -> None:
        """Refuses a recipe that contradicts itself.

        Raises:
            BundleError: `recipe.inconsistent`.
        """
        if len(set(self.classes)) != len(self.classes):
            raise _inconsistent("class names are unique", self.classes)
        if self.good_class not in self.classes:
            raise _inconsistent(f"good_class is one of {list(self.classes)}", self.good_class)
        if UNSURE in self.graded:
            raise _inconsistent(f"no grade is named {UNSURE}: that is where the line abstains", UNSURE)
        held = sorted(name for grade in self.graded.values() for name in grade.classes)
        if held != sorted(self.classes):
            raise _inconsistent(f"each of {list(self.classes)} belongs into one grade", held)
        for terms in (self.terms, *self.varieties.values(), *self.lots.values()):
            if unknown := sorted(set(terms.prices) - set(self.graded)):
                raise _inconsistent(f"prices are given for grades among {list(self.graded)}", unknown)
            if unknown := sorted(set(terms.escaped_by_class) - (set(self.classes) - {self.good_class})):
                raise _inconsistent("costs of escape are given for classes that are not good", unknown)

    @property
    def good(self) -> int:
        """Column of the good class in the outputs of the model."""
        return self.classes.index(self.good_class)

    @cached_property
    def graded(self) -> dict[str, Grade]:
        """The grades; where none are listed each class is its own: the good one passes, the others are rejected."""
        if self.grades:
            return self.grades
        return {
            name: Grade(outlet="pass" if name == self.good_class else "reject", classes=(name,))
            for name in self.classes
        }

    @property
    def outlets(self) -> frozenset[str]:
        """All outlets that a verdict may name: those of the grades, of unsure items and of late verdicts."""
        return frozenset({grade.outlet for grade in self.graded.values()} | {self.unsure_outlet, self.late_outlet})

    def check_outlets(self, known: Iterable[str]) -> None:
        """Refuses a line that lacks an outlet of this recipe: its items would stay on the belt and count as ejected.

        Args:
            known: Outlets of the line, with those that need no ejection.

        Raises:
            BundleError: `recipe.unknown_outlet`; give the line the outlet, or change the recipe.
        """
        have = set(known)
        if lacking := sorted(self.outlets - have):
            raise BundleError(
                "recipe.unknown_outlet",
                "The recipe sends items to an outlet that the line does not have.",
                expected=f"outlets among {sorted(have)}",
                got=lacking,
            )

    def terms_of(self, variety: str = "", lot: str = "") -> Terms:
        """Returns the terms in force: those of the lot over those of the variety over the recipe's own."""
        layers = (BASE, self.terms, self.varieties.get(variety, Terms()), self.lots.get(lot, Terms()))
        return layered(layers)

    def terms_source(self, variety: str = "", lot: str = "") -> Literal["lot", "variety", "recipe"]:
        """Returns which layer the terms come from: this lot, this variety, or the recipe where it lists neither."""
        if lot in self.lots:
            return "lot"
        return "variety" if variety in self.varieties else "recipe"

    @cached_property
    def _policies(self) -> dict[tuple[str, str], Policy]:
        """Policies by variety and lot, each made once."""
        return {}

    def policy(self, variety: str = "", lot: str = "") -> Policy:
        """Returns the policy of this variety and lot; for unknown names that of the recipe's own terms."""
        key = (variety if variety in self.varieties else "", lot if lot in self.lots else "")
        found = self._policies.get(key)
        if found is None:
            found = self._policies[key] = self.policy_under(self.terms_of(*key))
        return found

    def policy_under(self, terms: Terms) -> Policy:
        """Returns the policy of this recipe's grades under other terms."""
        terms = layered((BASE, terms))
        names = sorted(self.graded, key=lambda name: self.good_class not in self.graded[name].classes)
        holds = np.array([[c in self.graded[g].classes for c in self.classes] for g in names])
        escape = [terms.escaped_by_class.get(name, terms.escaped) for name in self.classes]
        penalty = np.full(holds.shape, terms.misgraded, np.float64)
        penalty[0] = escape
        penalty[:, self.good] = terms.wasted
        penalty[holds] = 0.0
        prices = np.array([terms.prices.get(name, 0.0) for name in names])
        share = self.fusion.prior if terms.defect_share is None else terms.defect_share
        shift = np.full(len(self.classes), share / self.fusion.prior)
        shift[self.good] = (1.0 - share) / (1.0 - self.fusion.prior)
        budget, again = terms.abstain_budget or 0.0, terms.recirculated or 0.0
        limit = math.inf if budget == 0.0 else max(again, terms.abstain_above or 0.0)
        return Policy(tuple(names), penalty - prices[:, None], shift, holds, limit, budget, again)

    def decide(self, view_probabilities: NDArray[np.floating], variety: str = "", lot: str = "") -> "Verdict":
        """Judges one item from the probabilities of its views.

        Args:
            view_probabilities: (V, C), V >= 1.
            variety: Variety of the present lot; it chooses the terms.
            lot: The present lot; its terms override those of the variety.

        Raises:
            InputError: `recipe.wrong_classes` and those of `fuse`.
        """
        if view_probabilities.ndim != 2 or view_probabilities.shape[1] != len(self.classes):
            raise InputError(
                "recipe.wrong_classes",
                "The model does not answer for the recipe's classes.",
                expected=f"(V, {len(self.classes)})",
                got=view_probabilities.shape,
            )
        fused = fuse(view_probabilities, self.fusion, self.good)
        policy = self.policy(variety, lot)
        chosen, regret = policy.choose(fused[None])
        row = int(chosen[0])
        unsure = float(regret[0]) > policy.abstain_above
        name = policy.grades[row]
        of_grade = np.where(policy.holds[row], fused, -1.0)
        return Verdict(
            klass=self.classes[int((of_grade if policy.holds[row].any() else fused).argmax())],
            grade=UNSURE if unsure else name,
            outlet=self.unsure_outlet if unsure else self.graded[name].outlet,
            defect=1.0 - float(fused[self.good]),
            probabilities=tuple(float(p) for p in fused),
            views=len(view_probabilities),
        )

    def cuts(self, variety: str = "", lot: str = "") -> dict[str, Threshold]:
        """Derives the thresholds from the terms, for an item that is either good or of one defect class.

        Returns:
            Threshold of each defect class, on the scale of `Verdict.defect`.
        """
        policy = self.policy(variety, lot)
        return {name: self._cut(policy, k) for k, name in enumerate(self.classes) if k != self.good}

    def _cut(self, policy: Policy, k: int) -> Threshold:
        """Expected losses are straight lines in the probability t of class k: from a_g at 0 to b_g at 1."""
        a = policy.losses[:, self.good] - policy.losses[:, self.good].min()
        b = policy.losses[:, k] - policy.losses[:, k].min()
        band = _where_positive(a - policy.abstain_above, b - policy.abstain_above)
        good = _where_positive(a[1:] - a[0], b[1:] - b[0], or_zero=True)
        back = float(policy.shift[self.good] / policy.shift[k])

        def unshifted(t: float) -> float:
            return float(t * back / (t * back + 1.0 - t))

        def on_scale(interval: tuple[float, float] | None) -> tuple[float, float] | None:
            return None if interval is None else (unshifted(interval[0]), unshifted(interval[1]))

        return Threshold(good=on_scale(good), unsure=on_scale(band) if math.isfinite(policy.abstain_above) else None)

    def threshold(self, variety: str = "", lot: str = "") -> float | None:
        """Returns the smallest of the thresholds: no item below it leaves the good grade."""
        found = [cut.threshold for cut in self.cuts(variety, lot).values() if cut.threshold is not None]
        return min(found, default=None)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The decision on one item after its last view."""

    klass: str
    grade: str
    outlet: str
    defect: float
    """Calibrated probability that the item is not of the good class, at the fusion's share of defects."""
    probabilities: tuple[float, ...]
    """Fused probability of each class, in the order of the recipe."""
    views: int


def parse_recipe(data: bytes) -> Recipe:
    """Reads `recipe.json`.

    Raises:
        BundleError: `recipe.wrong_version`, `recipe.malformed`, `recipe.inconsistent`.
    """
    version = version_in(data, absent=VERSION)
    if version is not None and version != VERSION:
        raise BundleError(
            "recipe.wrong_version",
            "The recipe has an unknown version.",
            expected=VERSION,
            got=version,
        )
    try:
        recipe = msgspec.json.decode(data, type=Recipe)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            "recipe.malformed", "recipe.json is not a recipe.", expected=f"Recipe, schema_version {VERSION}", got=error
        ) from error
    recipe.check()
    return recipe


def _where_positive(
    at_0: NDArray[np.float64], at_1: NDArray[np.float64], *, or_zero: bool = False
) -> tuple[float, float] | None:
    """Returns the interval of 0..1 in which all of these lines are positive (or zero); None = there is none."""
    low, high = 0.0, 1.0
    for start, end in zip(at_0.tolist(), at_1.tolist(), strict=True):
        if min(start, end) < 0.0 < max(start, end):  # their product could vanish
            zero = start / (start - end)
            low, high = (max(low, zero), high) if end > 0.0 else (low, min(high, zero))
        elif min(start, end) < 0.0 or (max(start, end) == 0.0 and not or_zero):
            return None
    return (low, high) if low < high else None


def _inconsistent(expected: str, got: object) -> BundleError:
    return BundleError("recipe.inconsistent", "The recipe contradicts itself.", expected=expected, got=got)
