"""The one door for labelled photographs: command line, API and worker all read a folder through `load_dataset`.

A folder has a `labels.csv` (`labels_csv`) or one folder per class, perhaps below splits (`layouts`). Text is normalised
(`cells`), contradictions are refused (`checks`), and whatever is left out is counted by its reason in the report.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from control_plane.data import labels_csv
from control_plane.data.checks import check_class_names, check_photos, one_each, settled_splits, without_copies
from control_plane.data.class_order import good_class_among, in_class_order
from control_plane.data.dataset import Dataset, DatasetReport, Photo
from control_plane.data.layouts import from_tree
from control_plane.data.surroundings import file_features, ring_features
from models.errors import InputError
from models.preprocess import decode_photo, make_view, mask_of_photo, sample_bits
from models.view_spec import PreprocessSpec

UNREADABLE_SHARE: Final = 0.05
"""More unreadable images than this share refuse the data set; fewer are skipped and counted."""
Progress = Callable[[float], None]


def load_dataset(
    root: Path,
    spec: PreprocessSpec,
    *,
    good_class: str = "",
    progress: Progress = lambda _share: None,
    require_items: int = 2,
    scalars: Sequence[str] | None = None,
    measured: Sequence[str] = (),
) -> Dataset:
    """Reads a labelled folder.

    Args:
        root: The folder.
        spec: Parameters of the step from pixels to views.
        good_class: Name of the good class; empty = `sound`, `good` or `ok`.
        progress: Is called with 0..1.
        require_items: Items that each class must have at least; 0 when nothing is learnt (evaluation).
        scalars: Columns of labels.csv that are measured values; None = `weight_g` and `length_mm` where they exist.
        measured: More columns that are measured values where they exist, when `scalars` is None.

    Raises:
        InputError: `dataset.missing`, `dataset.empty`, `dataset.one_class`, `dataset.no_good_class`,
            `dataset.bad_class_name`, `dataset.too_many_unreadable`, and those of `labels_csv`, `layouts` and `checks`.
    """
    if not root.is_dir():
        raise InputError("dataset.missing", f"There is no folder {root}.", expected="a folder", got=root)
    report = DatasetReport()
    photos, names = _listed(root, scalars, measured, report)
    photos = one_each(photos, report)
    check_photos(root, photos, require_items)
    classes = _classes(root, photos, good_class, needs_two=require_items > 0)
    read = _read(photos, spec, report, progress)
    kept = without_copies([r.photo for r in read], [r.digest for r in read], report)
    read = [read[row] for row in kept]
    splits = settled_splits([r.photo for r in read], report)
    final = tuple(replace(r.photo, split=split) for r, split in zip(read, splits, strict=True))
    values = np.array([photo.scalars for photo in final], np.float32).reshape(len(final), len(names))
    _report_on(final, names, values, report)
    lines = sorted("\t".join(_facts(r.photo, r.digest)) for r in read)
    return Dataset(
        views=np.stack([r.view for r in read]),
        labels=np.array([classes.index(photo.label) for photo in final], np.int64),
        classes=classes,
        items=np.array([photo.item for photo in final]),
        doubt=np.array([photo.doubt for photo in final], bool),
        photos=final,
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        report=report,
        scalar_names=names,
        scalars=values,
        surroundings=np.stack([r.ring for r in read]),
        file_facts=np.stack([r.file for r in read]),
    )


def _listed(
    root: Path, scalars: Sequence[str] | None, measured: Sequence[str], report: DatasetReport
) -> tuple[list[Photo], tuple[str, ...]]:
    """Returns the photographs that the folder lists, and the names of its scalars."""
    if (root / labels_csv.NAME).is_file():
        names = labels_csv.scalar_columns(root, scalars, measured)
        return list(labels_csv.from_csv(root, names, report)), names
    if scalars:
        raise InputError(
            "dataset.missing_columns",
            f"{root} has no labels.csv, so that there are no measured values.",
            expected=f"labels.csv with {', '.join(scalars)}",
            got="one folder per class",
        )
    return list(from_tree(root, report)), ()


def _facts(photo: Photo, digest: str) -> list[str]:
    """Returns what makes a photograph part of this version of the data set, and not of another."""
    known = [repr(value) for value in photo.scalars]
    return [photo.relative, photo.label, photo.item, digest, *known]


def _report_on(
    photos: Sequence[Photo], names: Sequence[str], values: NDArray[np.float32], report: DatasetReport
) -> None:
    report.views, report.items = len(photos), len({photo.item for photo in photos})
    report.classes = dict(Counter(photo.label for photo in photos))
    pairs = {(photo.label, photo.item) for photo in photos}
    report.items_per_class = dict(Counter(label for label, _ in pairs))
    report.splits = dict(Counter(photo.split for photo in photos if photo.split))
    known = np.isfinite(values).mean(axis=0)
    report.scalars = {name: round(float(share), 4) for name, share in zip(names, known, strict=True)}


def _classes(root: Path, photos: Sequence[Photo], good_class: str, *, needs_two: bool) -> tuple[str, ...]:
    names = sorted({photo.label for photo in photos})
    if needs_two and len(names) < 2:
        within = sorted({photo.path.parent.name for photo in photos})
        hint = f" If {within} are the classes, name the folder {root / names[0]}." if len(within) > 1 else ""
        raise InputError("dataset.one_class", f"There is only one class.{hint}", expected=">= 2 classes", got=names)
    if needs_two:
        check_class_names(names)
    good = good_class or good_class_among(names)
    if good not in names and (needs_two or not good):
        raise InputError(
            "dataset.no_good_class",
            "Which class is good? Name it (--good-class).",
            expected=f"one of {names}",
            got=good or "nothing",
        )
    return tuple(in_class_order({*names, good}, good))


@dataclass(frozen=True, slots=True)
class _Read:
    """A photograph that was read."""

    photo: Photo
    view: NDArray[np.uint8]
    digest: str
    ring: NDArray[np.float32]
    file: NDArray[np.float32]


def _read(photos: Sequence[Photo], spec: PreprocessSpec, report: DatasetReport, progress: Progress) -> list[_Read]:
    """Decodes the photographs; those that cannot be read are counted by reason.

    Raises:
        InputError: `dataset.too_many_unreadable`.
    """
    depth_bits = _depth_bits(photos, report)

    def one(photo: Photo) -> _Read | str:
        try:
            data = photo.path.read_bytes()
            image, alpha = decode_photo(data, name=photo.relative, depth_bits=depth_bits)
            view = make_view(image, mask_of_photo(image, alpha, spec), spec)
        except InputError as error:
            return error.code
        except OSError as error:
            return str(error.strerror)
        digest = hashlib.sha256(data).hexdigest()
        return _Read(photo, view, digest, ring_features(image), file_features(image, len(data)))

    found: list[_Read] = []
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        for number, (photo, read) in enumerate(zip(photos, pool.map(one, photos), strict=True)):
            if isinstance(read, str):
                report.skipped[photo.relative] = read
                report.leave_out(f"unreadable: {read}", photo.relative)
            else:
                found.append(read)
            if number % 50 == 0:
                progress(number / len(photos))
    failed = len(photos) - len(found)
    if not found or failed > UNREADABLE_SHARE * len(photos):
        example, reason = next(iter(report.skipped.items()))
        raise InputError(
            "dataset.too_many_unreadable",
            f"{failed} of {len(photos)} images cannot be read, such as {example} ({reason}).",
            expected=f"<= {UNREADABLE_SHARE:.0%}",
            got=f"{failed / len(photos):.0%}: {dict(Counter(report.skipped.values()))}",
        )
    return found


def _depth_bits(photos: Sequence[Photo], report: DatasetReport) -> int | None:
    """Returns the bits per channel that the 16-bit photographs of a folder use together; None where there are none.

    One dark photograph does not show whether its camera gave 12 or 16 bits; the brightest of a folder does.
    """
    found = [bits for photo in photos if (bits := sample_bits(photo.path)) is not None]
    if not found:
        return None
    depth = max(found)
    report.warnings.append(
        f"{len(found)} photographs have 16 bits per channel, of which {depth} are used; they are scaled to 8 bits."
    )
    return depth
