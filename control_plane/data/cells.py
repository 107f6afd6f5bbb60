"""Text of people as values: cells of `labels.csv` and names of folders, normalised, with closed vocabularies.

Laws: `clean(clean(text)) == clean(text)`; two names that look alike to a person have the same `fold`.
"""

import math
import unicodedata
from typing import Final

from models.errors import InputError

TRAIN: Final = "train"
VALIDATION: Final = "validation"
TEST: Final = "test"
SPLITS: Final = {
    **dict.fromkeys(("train", "training", "train_set", "training_set"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "val_set", "valid_set", "validation_set", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "test_set", "testing_set", "holdout", "hold_out"), TEST),
}
"""Names of splits in the layouts of Keras, Roboflow and Ultralytics, and in tables of people."""
_YES: Final = frozenset(("1", "1.0", "yes", "y", "true", "t", "x"))
_NO: Final = frozenset(("", "0", "0.0", "no", "n", "false", "f"))
_UNKNOWN: Final = frozenset(("", "na", "n/a", "nan", "none", "null", "?", "-"))


def clean(text: str) -> str:
    """Returns the text in Unicode NFC, without invisible characters and without outer or repeated blanks."""
    visible = (
        c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) not in {"Cf", "Cc"} or c in "\t\n"
    )
    return " ".join("".join(visible).split())


def fold(text: str) -> str:
    """Returns what names that a person takes for the same have in common: without case, width and blanks."""
    return "".join(unicodedata.normalize("NFKC", clean(text)).casefold().split())


def parse_split(text: str, *, where: str) -> str:
    """Reads a cell of the column `split`: empty, or one of `SPLITS` in any case.

    Raises:
        InputError: `dataset.unknown_word`.
    """
    word = clean(text).casefold().replace("-", "_").replace(" ", "_")
    if not word:
        return ""
    if word not in SPLITS:
        raise _unknown_word("split", text, where, "train, validation or test, or an empty cell")
    return SPLITS[word]


def parse_doubt(text: str, *, where: str) -> bool:
    """Reads a cell of the column `doubt`: yes or no in its usual spellings; empty = no.

    Raises:
        InputError: `dataset.unknown_word`.
    """
    word = clean(text).casefold()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise _unknown_word("doubt", text, where, "1, yes or true; 0, no, false or an empty cell")


def parse_scalar(text: str, *, name: str, where: str) -> float:
    """Reads a measured value, which is positive; NaN where the cell is empty or a usual sign for "unknown".

    Raises:
        InputError: `dataset.bad_number`.
    """
    word = clean(text)
    if word.casefold() in _UNKNOWN:
        return math.nan
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0.0:
        raise InputError(
            "dataset.bad_number",
            f"{where}: {name} is not a measured value.",
            expected="a positive number with a decimal point, or an empty cell",
            got=text,
        )
    return value


def _unknown_word(column: str, text: str, where: str, expected: str) -> InputError:
    return InputError("dataset.unknown_word", f"{where}: {column} has an unknown word.", expected=expected, got=text)
