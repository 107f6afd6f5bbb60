"""From the fused class probabilities of an item to its verdict, grade and outlet (`recipe.json`).

The recipe is business, not vision: it changes with the market without touching the model. A variety may have its
own threshold. Between threshold and threshold - abstain the line does not know, and says so: the item takes the
`unsure` outlet.
"""

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, InputError
from models.fusion import FusionSpec, fuse

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z")]
Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a mistake costs, in the plant's currency per item. They set the threshold and the money KPIs."""

    escaped: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    """A defective item that was let through."""
    wasted: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    """A good item that was thrown away."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Classes -> grades -> outlets, with the thresholds between them."""

    schema_version: Literal[1] = 1
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=64)]
    """Names of the model's outputs, in their order."""
    good_class: Name
    fusion: FusionSpec = FusionSpec()
    threshold: Probability = 0.5
    """An item whose defect probability reaches this is bad."""
    abstain: Probability = 0.0
    """Width of the band below the threshold in which the line abstains."""
    variety_thresholds: dict[Name, Probability] = {}
    """Overrides of `threshold` per variety."""
    grades: dict[Name, Name] = {}
    """Class -> grade; a class that is not listed is its own grade."""
    outlets: dict[Name, Name] = {}
    """Grade -> outlet; a grade that is not listed takes `bad_outlet`, the good class's grade `good_outlet`."""
    good_outlet: Name = "pass"
    bad_outlet: Name = "reject"
    unsure_outlet: Name = "pass"
    late_outlet: Name = "pass"
    """Where an item goes whose verdict came too late: the outlet that needs no action."""
    costs: Costs = Costs()

    def check(self) -> None:
        """Refuses a recipe that contradicts itself.

        Raises:
            BundleError: `recipe.inconsistent`.
        """
        if len(set(self.classes)) != len(self.classes):
            raise _inconsistent("class names are unique", self.classes)
        if self.good_class not in self.classes:
            raise _inconsistent(f"good_class is one of {list(self.classes)}", self.good_class)
        unknown = sorted(set(self.grades) - set(self.classes))
        if unknown:
            raise _inconsistent(f"grades are given for classes among {list(self.classes)}", unknown)

    @property
    def good(self) -> int:
        """Column of the good class."""
        return self.classes.index(self.good_class)

    def decide(self, view_probabilities: NDArray[np.floating], variety: str = "") -> "Verdict":
        """Judges one item from the probabilities of its views.

        Args:
            view_probabilities: (V, C), V >= 1.
            variety: Of the present lot; chooses the threshold.

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
        defect = 1.0 - float(fused[self.good])
        threshold = self.variety_thresholds.get(variety, self.threshold)
        bad = fused.copy()
        bad[self.good] = -1.0
        name = self.classes[int(bad.argmax())] if defect >= threshold else self.good_class
        unsure = threshold - self.abstain <= defect < threshold
        grade = "unsure" if unsure else self.grades.get(name, name)
        return Verdict(
            klass=name,
            grade=grade,
            outlet=self.unsure_outlet if unsure else self._outlet(name, grade),
            defect=defect,
            probabilities=tuple(float(p) for p in fused),
            views=len(view_probabilities),
        )

    def _outlet(self, klass: str, grade: str) -> str:
        default = self.good_outlet if klass == self.good_class else self.bad_outlet
        return self.outlets.get(grade, default)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one item after its last view."""

    klass: str
    grade: str
    outlet: str
    defect: float
    """Calibrated probability that the item is not of the good class."""
    probabilities: tuple[float, ...]
    """Per class, in the recipe's order."""
    views: int


def parse_recipe(data: bytes) -> Recipe:
    """Reads `recipe.json`.

    Raises:
        BundleError: `recipe.malformed`, `recipe.inconsistent`.
    """
    try:
        recipe = msgspec.json.decode(data, type=Recipe)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(
            "recipe.malformed", "recipe.json is not a recipe.", expected="Recipe, schema_version 1", got=error
        ) from error
    recipe.check()
    return recipe


def _inconsistent(expected: str, got: object) -> BundleError:
    return BundleError("recipe.inconsistent", "The recipe contradicts itself.", expected=expected, got=got)
