"""Reads off a recipe what figures need: which class is good, and which outlets let an item through.

Names are the customer's own: `sound` or `export quality`, `pass` or `belt 2`. Only the recipe of the bundle that judged
says what they mean; where it is not known, there is no figure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.data.class_order import in_class_order
from models.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Sorting:
    """The meaning of a recipe's names.

    Attributes:
        good_class: The class of good items.
        accepted: The outlet of the grade that holds the good class: what goes there was let through.
        classes: All classes, the good one first, the rest by name.
    """

    good_class: str
    accepted: frozenset[str]
    classes: tuple[str, ...]

    def rates(self, truth: Mapping[str, int]) -> tuple[float | None, float | None]:
        """Returns (escape rate, false-reject rate) from counts of `kind>outlet`; None where there is no such item.

        Escape rate: defective items that were let through / defective items. False-reject rate: good items that were
        not let through / good items.
        """
        bad = escaped = good = wasted = 0
        for pair, count in truth.items():
            kind, _, outlet = pair.partition(">")
            through = outlet in self.accepted
            if kind == self.good_class:
                good, wasted = good + count, wasted + (0 if through else count)
            else:
                bad, escaped = bad + count, escaped + (count if through else 0)
        return (escaped / bad if bad else None, wasted / good if good else None)

    def reject_share(self, outlets: Mapping[str, int]) -> float | None:
        """Returns the share of items that were not let through; None without items."""
        total = sum(outlets.values())
        rejected = sum(count for outlet, count in outlets.items() if outlet not in self.accepted)
        return rejected / total if total else None


def sorting_of(recipe: Recipe) -> Sorting:
    """Returns what the names of this recipe mean."""
    accepted = frozenset(g.outlet for g in recipe.graded.values() if recipe.good_class in g.classes)
    return Sorting(recipe.good_class, accepted, tuple(in_class_order(recipe.classes, recipe.good_class)))
