"""Contradictions in a list of labelled photographs, found before and after their bytes are read."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from control_plane.data.cells import TEST, TRAIN, VALIDATION, fold
from control_plane.data.dataset import DatasetReport, Photo
from models.errors import InputError
from models.recipe import Name

_SHOWN: Final = 6
"""Names in an error at most."""


def one_each(photos: Iterable[Photo], report: DatasetReport) -> list[Photo]:
    """Returns each file once, whatever its spellings; rows that repeat a file are counted in the report.

    Raises:
        InputError: `dataset.conflicting_labels`, `dataset.conflicting_rows`.
    """
    found: dict[tuple[int, int] | Path, Photo] = {}
    for photo in photos:
        first = found.setdefault(_identity(photo.path), photo)
        if first is photo:
            continue
        _same_label(first, photo, "is listed with two labels")
        if (first.item, first.split) != (photo.item, photo.split) and photo.item != photo.relative:
            raise InputError(
                "dataset.conflicting_rows",
                f"{photo.relative} is listed twice, with two items or splits.",
                expected=f"item {first.item}, split {first.split or 'none'}",
                got=f"item {photo.item}, split {photo.split or 'none'}",
            )
        report.leave_out("listed before", photo.relative)
    return list(found.values())


def _identity(path: Path) -> tuple[int, int] | Path:
    try:
        facts = path.stat()
    except OSError:
        return path
    return facts.st_dev, facts.st_ino


def check_photos(root: Path, photos: Sequence[Photo], require_items: int) -> None:
    """Refuses lists that cannot be learnt from.

    Args:
        root: Folder of the data set, for the messages.
        photos: The photographs, each once.
        require_items: Items that each class must have at least.

    Raises:
        InputError: `dataset.empty`, `dataset.missing_files`, `dataset.ambiguous_names`, `dataset.split_leaks`,
            `dataset.too_few_items`.
    """
    if not photos:
        raise InputError(
            "dataset.empty",
            f"{root} holds no labelled image.",
            expected="labels.csv with path,label or one folder per class",
            got="nothing",
        )
    missing = [photo.relative for photo in photos if not photo.path.is_file()]
    if missing:
        raise InputError(
            "dataset.missing_files",
            f"{len(missing)} labelled files are not there, such as {missing[0]}.",
            expected="every labelled file",
            got=f"{len(missing)} missing",
        )
    kinds: tuple[tuple[str, Callable[[Photo], str]], ...] = (
        ("classes", lambda photo: photo.label),
        ("items", lambda photo: photo.item),
        ("lots", lambda photo: photo.lot),
        ("varieties", lambda photo: photo.variety),
    )
    for kind, name_of in kinds:
        _refuse_look_alikes(kind, {name_of(photo) for photo in photos})
    items: dict[str, set[str]] = defaultdict(set)
    sides: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        sides[photo.item].add(photo.split)
        items[photo.label].add(photo.item)
    _refuse_leaks(sides)
    for label, found in items.items():
        if len(found) < require_items:
            raise InputError(
                "dataset.too_few_items",
                f"Class {label} has too few items: nothing could be held out.",
                expected=f">= {require_items} items",
                got=len(found),
            )


def check_class_names(names: Iterable[str]) -> None:
    """Refuses names of classes that a recipe cannot have, before anything is learnt.

    Raises:
        InputError: `dataset.bad_class_name`.
    """
    for name in names:
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError as error:
            raise InputError(
                "dataset.bad_class_name",
                f"A recipe cannot have a class named {name!r}.",
                expected="1 to 64 of A-Z a-z 0-9 _ . -, beginning with a letter or digit",
                got=name,
            ) from error


def _refuse_look_alikes(kind: str, names: set[str]) -> None:
    """Refuses names that differ only by case, width or blanks: a person took them for one."""
    alike: dict[str, set[str]] = defaultdict(set)
    for name in names:
        alike[fold(name)].add(name)
    doubles = sorted(sorted(found) for found in alike.values() if len(found) > 1)
    if doubles:
        raise InputError(
            "dataset.ambiguous_names",
            f"Names of {kind} differ only by case or blanks.",
            expected="one spelling of each name",
            got=doubles[:_SHOWN],
        )


def _refuse_leaks(sides: dict[str, set[str]]) -> None:
    leaking = sorted(item for item, found in sides.items() if len(found) > 1)
    if leaking:
        raise InputError(
            "dataset.split_leaks",
            f"Item {leaking[0]} is on both sides of the split, {len(leaking)} items in all.",
            expected="one side",
            got=sorted(sides[leaking[0]]),
        )


def without_copies(photos: Sequence[Photo], digests: Sequence[str], report: DatasetReport) -> list[int]:
    """Returns the rows to keep: of files with equal bytes the first one, unless they contradict each other.

    Args:
        photos: The N photographs that were read.
        digests: The sha256 of each.
        report: Receives the counts and a warning.

    Raises:
        InputError: `dataset.conflicting_labels`, `dataset.split_leaks`.
    """
    first: dict[str, int] = {}
    kept: list[int] = []
    between = 0
    for row, (photo, digest) in enumerate(zip(photos, digests, strict=True)):
        other = photos[first.setdefault(digest, row)]
        if other is photo:
            kept.append(row)
            continue
        _same_label(other, photo, f"has the bytes of {other.relative} and another label")
        _refuse_leaks({f"{other.relative}, whose bytes {photo.relative} has,": {other.split, photo.split}})
        between += other.item != photo.item
    copies = sorted(set(range(len(photos))) - set(kept))
    report.leave_out("copy of another photograph", *(photos[row].relative for row in copies))
    if between:
        report.warnings.append(f"{between} files are byte-equal copies under other items; each photograph counts once.")
    return kept


def _same_label(first: Photo, second: Photo, what: str) -> None:
    if first.label != second.label:
        raise InputError(
            "dataset.conflicting_labels",
            f"{second.relative} {what}.",
            expected="one label",
            got=sorted((first.label, second.label)),
        )


def settled_splits(photos: Sequence[Photo], report: DatasetReport) -> list[str]:
    """Returns the split of each photograph as training uses it: `test` is held out, the rest is learnt from.

    Views for validation are learnt from where there are views for testing, because training validates inside its own
    part; where there are none, they are held out.
    """
    present = {photo.split for photo in photos}
    if VALIDATION not in present:
        return [photo.split for photo in photos]
    count = sum(photo.split == VALIDATION for photo in photos)
    into = TRAIN if TEST in present else TEST
    use = "learnt from; only test is held out" if into == TRAIN else "held out, because there is no test split"
    report.warnings.append(f"{count} views of the validation split are {use}.")
    return [into if photo.split == VALIDATION else photo.split for photo in photos]
