"""Does an imported model contradict the folder it came with? Measures, and tries the usual reasons.

Refused are answers that never change and answers that are worse than chance. The reason is looked for by trying it: the
classes in another order, pixels in another range, channels in another order, a softmax that the graph has already.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from control_plane.evaluation.metrics import auc
from models.errors import InputError

CONSTANT: Final = 1e-4
"""Answers that vary less than this over all views of a folder are constant."""
_BETTER: Final = 0.2
"""A tried reason must raise the AUC, or the share of correct views, by this to be named."""
_IMAGENET: Final = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_NEAR: Final = 0.05
"""Reasons within this of the best AUC are distinguished by their log loss."""
_GUESSED: Final = float(np.log(2.0))
"""Log loss of good against the rest of a constant answer of one half."""
_MUCH_LESS: Final = 0.5
"""A tried scaling must have less than this share of the log loss to be named."""
Probabilities = NDArray[np.float64]
Measured = dict[str, Any]


class Preparation(msgspec.Struct, frozen=True, kw_only=True):
    """One way from pixels (0-255) to the input: times scale, minus mean, divided by std, in an order of channels."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str

    def __str__(self) -> str:
        """Returns the options of the command line that state it."""
        mean, std = (",".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"--scale {self.scale:.6g} --mean {mean} --std {std}, channels {self.channels}"


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A reason that was tried, and how well the model then agrees with the folder."""

    reason: str
    auc: float
    log_loss: float
    """Mean over the views of good against the rest: it also depends on the range of the pixels, as an AUC may not."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the search for a reason needs.

    Attributes:
        answers: Prepares the views in another way and returns (n, C) probabilities.
        stated: The preparation that was stated.
        labels: (n,) classes of those views, as columns of the model; -1 = not a class of the model.
        good: Column of the good class.
        classes: Names of the classes.
    """

    answers: Callable[[Preparation], Probabilities]
    stated: Preparation
    labels: NDArray[np.intp]
    good: int
    classes: tuple[str, ...]

    def tried(self, reason: str, probabilities: Probabilities, good: int) -> Tried:
        """Measures answers whose column `good` is that of the good class; an AUC that does not exist is one half."""
        bad = self.labels != self.good
        area = auc(bad, 1.0 - probabilities[:, good])
        right = np.where(bad, 1.0 - probabilities[:, good], probabilities[:, good])
        loss = float(-np.log(np.clip(right, 1e-9, 1.0)).mean())
        return Tried(reason=reason, auc=round(area, 4) if np.isfinite(area) else 0.5, log_loss=round(loss, 4))


def check_double_softmax(raw: Probabilities, *, logits: bool) -> None:
    """Refuses outputs that are probabilities already although logits are stated, and the reverse.

    Args:
        raw: (n, C) outputs of the graph as it is.
        logits: What was stated.

    Raises:
        InputError: `import.double_softmax`, `import.wrong_signature`.
    """
    if not np.isfinite(raw).all():
        raise InputError(
            "import.wrong_signature", "The model answers NaN or infinity.", expected="finite outputs", got="nan or inf"
        )
    already = bool(np.allclose(raw.sum(axis=1), 1.0, atol=2e-3) and raw.min() >= -1e-6 and raw.max() <= 1.0 + 1e-3)
    if already and logits:
        raise InputError(
            "import.double_softmax",
            "The outputs are probabilities already; a second softmax would flatten them.",
            expected="--no-logits",
            got="outputs between 0 and 1 whose rows sum to 1, and --logits",
        )
    if not already and not logits:
        raise InputError(
            "import.wrong_signature",
            "The outputs are no probabilities; are they logits?",
            expected="rows that sum to 1, or --logits",
            got=f"outputs from {raw.min():.3g} to {raw.max():.3g}",
        )


def check_names(names: tuple[str, ...], stated: list[str]) -> str:
    """Refuses class names in another order than the model's own; returns a warning where the names differ otherwise.

    Raises:
        InputError: `import.class_order`.
    """
    if not names or list(names) == stated:
        return ""
    if sorted(names) == sorted(stated):
        raise InputError(
            "import.class_order",
            "The model names its classes in another order.",
            expected=",".join(names),
            got=",".join(stated),
        )
    return f"The model names its classes {', '.join(names)}; stated are {', '.join(stated)}."


def check_answers(trial: Trial, probabilities: Probabilities, figure: Measured) -> tuple[list[Tried], list[str]]:
    """Refuses answers that contradict the folder, and names the likely reason.

    Args:
        trial: The views and how to answer for them otherwise.
        probabilities: (n, C) answers under the stated settings.
        figure: `{value, low, high}` of the view AUC over the whole folder.

    Returns:
        The reasons that were tried, and warnings.

    Raises:
        InputError: `import.constant_answers`, `import.below_chance`.
    """
    spread = float(np.ptp(probabilities, axis=0).max())
    value = figure["value"]
    both = value is not None
    below = both and value < 0.5 and (figure["high"] is None or figure["high"] < 0.5)
    weak = both and (value < 0.6 or (figure["low"] is not None and figure["low"] <= 0.5))
    if spread >= CONSTANT and not below and not weak:
        return [], _order_warning(trial, probabilities) + _scaling_warning(trial, probabilities)
    tried = _by_likelihood(list(_reasons(trial, probabilities)))
    now = value if both and spread >= CONSTANT else 0.5  # constant answers have an AUC by rounding alone
    likely = tried[0].reason if tried and tried[0].auc > now + _BETTER else "none that was tried explains it"
    if spread < CONSTANT:
        raise InputError(
            "import.constant_answers",
            f"The model gives every view the same answer. Likely reason: {likely}.",
            expected="answers that depend on the picture",
            got=f"answers that vary by {spread:.2g}",
        )
    if below:
        raise InputError(
            "import.below_chance",
            f"On its own folder the model is worse than chance. Likely reason: {likely}.",
            expected="AUC above 0.5",
            got=f"AUC {value:.3f}, with the likely reason removed {tried[0].auc:.3f}",
        )
    return tried, [f"AUC {value:.3f} is hardly better than chance. Likely reason: {likely}."]


def _reasons(trial: Trial, probabilities: Probabilities) -> Iterator[Tried]:
    order = _best_order(trial, probabilities)
    names = ",".join(trial.classes[k] for k in order)
    if list(order) != list(range(len(order))):
        column = int(np.flatnonzero(order == trial.good)[0])
        yield trial.tried(f"the order of the classes (--classes {names})", probabilities, column)
    for preparation in _preparations(trial.stated):
        yield trial.tried(f"the scaling ({preparation})", trial.answers(preparation), trial.good)


def _by_likelihood(tried: list[Tried]) -> list[Tried]:
    """Returns those near the best AUC first, by their log loss, then the others by their AUC."""
    best = max((t.auc for t in tried), default=0.0)
    return sorted(tried, key=lambda t: (t.auc < best - _NEAR, t.log_loss if t.auc >= best - _NEAR else -t.auc))


def _best_order(trial: Trial, probabilities: Probabilities) -> NDArray[np.intp]:
    """Returns, per output, the class that it answers for if the order of the classes agrees best with the labels."""
    count = len(trial.classes)
    agreement = np.zeros((count, count))
    for label in range(count):
        own = trial.labels == label
        if own.any():
            agreement[:, label] = probabilities[own].mean(axis=0)
    return np.asarray(linear_sum_assignment(agreement, maximize=True)[1], np.intp)


def _order_warning(trial: Trial, probabilities: Probabilities) -> list[str]:
    """Warns where another order of three or more classes agrees much better with the labels."""
    order = _best_order(trial, probabilities)
    known = trial.labels >= 0
    called, labels = probabilities[known].argmax(axis=1), trial.labels[known]
    now, then = float((called == labels).mean()), float((order[called] == labels).mean())
    if then <= now + _BETTER:
        return []
    names = ",".join(trial.classes[k] for k in order)
    return [f"{now:.0%} of the views get their class; with --classes {names} it would be {then:.0%}."]


def _scaling_warning(trial: Trial, probabilities: Probabilities) -> list[str]:
    """Warns of answers in a good order whose probabilities are worse than a guess where another scaling mends them.

    A linear model orders the views of a folder almost alike under any scale of the pixels; its probabilities, which
    decide about money, are then all zero or one.
    """
    now = trial.tried("", probabilities, trial.good)
    if now.log_loss <= _GUESSED:
        return []
    tried = (trial.tried(f"the scaling ({p})", trial.answers(p), trial.good) for p in _preparations(trial.stated))
    best = min(tried, key=lambda found: (found.auc < now.auc, found.log_loss))
    if best.auc < now.auc or best.log_loss > _MUCH_LESS * now.log_loss:
        return []
    text = (
        f"The probabilities are worse than a guess: log loss {now.log_loss:.2f}, a guess has {_GUESSED:.2f}. Likely "
        f"reason: {best.reason}; with it log loss {best.log_loss:.2f}, AUC {best.auc:.3f} instead of {now.auc:.3f}."
    )
    return [text]


def _preparations(stated: Preparation) -> Iterator[Preparation]:
    """Yields the usual preparations that were not stated."""
    zero, one = (0.0,) * 3, (1.0,) * 3
    ranges = [
        (1.0 / 255.0, zero, one),
        (1.0, zero, one),
        (1.0 / 255.0, (0.5,) * 3, (0.5,) * 3),
        (1.0 / 255.0, tuple(_IMAGENET[0]), tuple(_IMAGENET[1])),
        (stated.scale, stated.mean, stated.std),
    ]
    for scale, mean, std in ranges:
        for channels in ("rgb", "bgr"):
            found = Preparation(scale=scale, mean=mean, std=std, channels=channels)
            if found != stated:
                yield found
