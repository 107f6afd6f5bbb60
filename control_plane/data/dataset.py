"""Labelled photographs, what was left out of them, and the arrays that training and evaluation use."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_EXAMPLES: Final = 4
"""Names that a report keeps of each reason."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One labelled photograph that is not read yet."""

    path: Path
    relative: str
    label: str
    item: str
    lot: str = ""
    split: str = ""
    """`train`, `validation`, `test`, or empty where the data set has no splits."""
    doubt: bool = False
    kind: str = ""
    variety: str = ""
    order: tuple[int, int, str] = (0, 0, "")
    scalars: tuple[float, ...] = ()
    """Measured values in the order of the data set's `scalar_names`, NaN where unknown."""


@dataclass(slots=True)
class DatasetReport:
    """What was found, what was left out, and what a person should know before the figures are believed."""

    views: int = 0
    items: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    items_per_class: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    """Views per split, where the folder has splits."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Share of views, 0..1, on which each scalar is known."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of files and rows that are not used, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first names of each reason in `left_out`."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Unreadable files with the code of the reason; `left_out` counts them too."""
    warnings: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, *names: str) -> None:
        """Counts files or rows that are not used, and keeps the first few names."""
        if names:
            self.left_out[reason] += len(names)
            examples = self.examples.setdefault(reason, [])
            examples.extend(names[: MAX_EXAMPLES - len(examples)])

    def summary(self) -> dict[str, Any]:
        """Returns plain values for terminal, page and API; keys without content are left out."""
        optional = {
            "splits": self.splits,
            "scalars": self.scalars,
            "left_out": dict(sorted(self.left_out.items())),
            "left_out_examples": dict(sorted(self.examples.items())),
        }
        return {
            "views": self.views,
            "items": self.items,
            "classes": self.classes,
            "items_per_class": self.items_per_class,
            "skipped": len(self.skipped),
            "warnings": self.warnings,
            **{key: value for key, value in optional.items() if value},
        }


@dataclass(frozen=True, slots=True)
class Dataset:
    """Views and what is known of them.

    Attributes:
        views: uint8 (N, S, S, 3) BGR.
        labels: int64 (N,), index into `classes`.
        classes: The good class first, the rest by name.
        items: (N,) name of the physical item.
        doubt: bool (N,).
        photos: The N photographs.
        digest: Changes when a path, a label, a scalar or a byte changes: the version of the data set.
        report: For people.
        scalar_names: Names of the K scalars, such as `weight_g`.
        scalars: float32 (N, K), NaN where unknown.
        surroundings: float32 (N, R): measurements of the outer ring of each photograph (`surroundings`).
        file_facts: float32 (N, 3): logarithms of file size, width and height.
    """

    views: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    items: NDArray[np.str_]
    doubt: NDArray[np.bool_]
    photos: tuple[Photo, ...]
    digest: str
    report: DatasetReport
    scalar_names: tuple[str, ...]
    scalars: NDArray[np.float32]
    surroundings: NDArray[np.float32]
    file_facts: NDArray[np.float32]

    def scalars_in(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Returns float32 (N, K'): the scalars of these names, NaN where the data set does not have them."""
        found = np.full((len(self.labels), len(names)), np.nan, np.float32)
        for column, name in enumerate(names):
            if name in self.scalar_names:
                found[:, column] = self.scalars[:, self.scalar_names.index(name)]
        return found
