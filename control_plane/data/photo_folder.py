"""Labelled photographs as arrays: `labels.csv`, or a tree with one folder per class.

`labels.csv` needs `path,label`; it may have `item`, `lot`, `split` (train or test), `doubt` (1 = another grader might
disagree), `kind`, `variety`, `axis`, `frame` (order of an item's views). A tree is `class/view.jpg` (every view its
own item: a warning says so) or `class/item/view.jpg`. What cannot be learnt from is refused with what was expected and
what came.
"""

import csv
import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from control_plane.data.class_order import good_class_among, in_class_order
from models.errors import InputError
from models.preprocess import decode_photo, make_view, segment_photo
from models.view_spec import PreprocessSpec

SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
MAX_CSV_BYTES: Final = 256 * 1024 * 1024
UNREADABLE_SHARE: Final = 0.05
"""More unreadable images than this share refuse the data set; fewer are skipped and counted."""
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Photo:
    """One labelled photograph, not read yet."""

    path: Path
    relative: str
    label: str
    item: str
    lot: str = ""
    split: str = ""
    doubt: bool = False
    kind: str = ""
    variety: str = ""
    order: tuple[int, int, str] = (0, 0, "")


@dataclass(slots=True)
class DatasetReport:
    """What was found, and what a person should know."""

    views: int = 0
    items: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    items_per_class: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


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
        digest: Changes when a path, a label or a byte changes: the version of the data set.
        report: For people.
    """

    views: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    items: NDArray[np.str_]
    doubt: NDArray[np.bool_]
    photos: tuple[Photo, ...]
    digest: str
    report: DatasetReport


def load_dataset(
    root: Path,
    spec: PreprocessSpec,
    *,
    good_class: str = "",
    progress: Progress = lambda _share: None,
    require_items: int = 2,
) -> Dataset:
    """Reads a labelled folder.

    Args:
        root: The folder.
        spec: How pixels become views.
        good_class: Name of the good class; empty = `sound`, `good` or `ok`.
        progress: Called with 0..1.
        require_items: Items each class must have at least; 0 when nothing is learnt (evaluation).

    Raises:
        InputError: `dataset.missing`, `dataset.empty`, `dataset.one_class`, `dataset.too_few_items`,
            `dataset.missing_files`, `dataset.unsafe_path`, `dataset.malformed_csv`, `dataset.missing_columns`,
            `dataset.conflicting_labels`, `dataset.split_leaks`, `dataset.too_many_unreadable`,
            `dataset.no_good_class`.
    """
    if not root.is_dir():
        raise InputError("dataset.missing", f"There is no folder {root}.", expected="a folder", got=root)
    report = DatasetReport()
    photos = list(_from_csv(root, report) if (root / "labels.csv").is_file() else _from_tree(root, report))
    _check_photos(root, photos, require_items)
    classes = _classes(photos, good_class, needs_two=require_items > 0)
    views, kept, hashes = _read(photos, spec, report, progress)
    _warn_about_duplicates(kept, hashes, report)
    labels = np.array([classes.index(photo.label) for photo in kept], np.int64)
    report.views, report.items = len(kept), len({photo.item for photo in kept})
    report.classes = dict(Counter(photo.label for photo in kept))
    pairs = {(photo.label, photo.item) for photo in kept}
    report.items_per_class = dict(Counter(label for label, _ in pairs))
    lines = sorted(f"{p.relative}\t{p.label}\t{p.item}\t{h}" for p, h in zip(kept, hashes, strict=True))
    return Dataset(
        views=views,
        labels=labels,
        classes=classes,
        items=np.array([photo.item for photo in kept]),
        doubt=np.array([photo.doubt for photo in kept], bool),
        photos=tuple(kept),
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        report=report,
    )


def _from_csv(root: Path, report: DatasetReport) -> Iterator[Photo]:
    rows = _rows(root / "labels.csv")
    labelled: set[Path] = set()
    for number, row in enumerate(rows):
        relative, label = row["path"].strip(), row["label"].strip()
        if not relative or not label:
            report.skipped[relative or f"row {number + 2}"] = "no path or no label"
            continue
        path = _inside(root, relative)
        labelled.add(path)
        yield Photo(
            path=path,
            relative=relative,
            label=label,
            item=row.get("item") or relative,
            lot=row.get("lot") or "",
            split=row.get("split") or "",
            doubt=(row.get("doubt") or "0").strip() == "1",
            kind=row.get("kind") or "",
            variety=row.get("variety") or "",
            order=(_number(row.get("axis")), _number(row.get("frame") or row.get("view")), relative),
        )
    if rows and "item" not in rows[0]:
        report.warnings.append("labels.csv has no column item: every view is its own item, near-duplicates may leak.")
    stray = sum(1 for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.resolve() not in labelled)
    if stray:
        report.warnings.append(f"{stray} image files have no label; they are not used.")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            rows = [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            "dataset.malformed_csv", f"{path} cannot be read.", expected="CSV, UTF-8, with a header", got=error
        ) from error
    for needed in ("path", "label"):
        if needed not in columns:
            near = difflib.get_close_matches(needed, columns, n=1, cutoff=0.5)
            hint = f"; is it {near[0]}?" if near else "."
            raise InputError(
                "dataset.missing_columns",
                f"{path} has no column {needed}{hint}",
                expected="path,label[,item,lot,split,doubt]",
                got=columns,
            )
    return rows


def _inside(root: Path, relative: str) -> Path:
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(
            "dataset.unsafe_path", "A label names a file outside the data set.", expected=f"inside {root}", got=relative
        )
    return path


def _number(text: str | None) -> int:
    return int(text) if text and text.strip().lstrip("-").isdigit() else 0


def _from_tree(root: Path, report: DatasetReport) -> Iterator[Photo]:
    """`class/view` or `class/item/view`."""
    alone = 0
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            relative = path.relative_to(root).as_posix()
            parts = path.relative_to(folder).parts
            alone += len(parts) == 1
            item = f"{folder.name}/{parts[0]}" if len(parts) > 1 else relative
            yield Photo(
                path=_inside(root, relative), relative=relative, label=folder.name, item=item, order=(0, 0, relative)
            )
    if alone:
        report.warnings.append(
            f"{alone} images lie directly in a class folder: each counts as an item of its own. If neighbours show the "
            "same object, put them into class/item/ folders, or figures will be too good."
        )


def _check_photos(root: Path, photos: list[Photo], require_items: int) -> None:
    if not photos:
        raise InputError(
            "dataset.empty",
            f"{root} holds no labelled image.",
            expected="labels.csv with path,label or one folder per class",
            got="nothing",
        )
    missing = [p.relative for p in photos if not p.path.is_file()]
    if missing:
        raise InputError(
            "dataset.missing_files",
            f"{len(missing)} labelled files are not there, such as {missing[0]}.",
            expected="every labelled file",
            got=f"{len(missing)} missing",
        )
    by_path: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    items: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        by_path[photo.relative].add(photo.label)
        splits[photo.item].add(photo.split)
        items[photo.label].add(photo.item)
    for name, labels in by_path.items():
        if len(labels) > 1:
            raise InputError(
                "dataset.conflicting_labels", f"{name} has two labels.", expected="one label", got=sorted(labels)
            )
    for item, sides in splits.items():
        if len(sides) > 1:
            raise InputError(
                "dataset.split_leaks", f"Item {item} is on both sides of the split.", expected="one side", got=sides
            )
    for label, found in items.items():
        if len(found) < require_items:
            raise InputError(
                "dataset.too_few_items",
                f"Class {label} has too few items: nothing could be held out.",
                expected=f">= {require_items} items",
                got=len(found),
            )


def _classes(photos: list[Photo], good_class: str, *, needs_two: bool) -> tuple[str, ...]:
    names = sorted({photo.label for photo in photos})
    if needs_two and len(names) < 2:
        raise InputError("dataset.one_class", "There is only one class to tell.", expected=">= 2 classes", got=names)
    good = good_class or good_class_among(names)
    if good not in names and (needs_two or not good):
        raise InputError(
            "dataset.no_good_class",
            "Which class is good? Name it (--good-class).",
            expected=f"one of {names}",
            got=good or "nothing",
        )
    return tuple(in_class_order({*names, good}, good))


def _read(
    photos: list[Photo], spec: PreprocessSpec, report: DatasetReport, progress: Progress
) -> tuple[NDArray[np.uint8], list[Photo], list[str]]:
    def one(photo: Photo) -> tuple[NDArray[np.uint8] | None, str, str]:
        try:
            data = photo.path.read_bytes()
            image, alpha = decode_photo(data, name=photo.relative)
            mask = segment_photo(image, spec.backdrop_delta) if alpha is None else alpha
            return make_view(image, mask, spec), hashlib.sha256(data).hexdigest(), ""
        except InputError as error:
            return None, "", error.code
        except OSError as error:
            return None, "", str(error.strerror)

    views, kept, hashes = [], [], []
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as pool:
        for number, (photo, (view, digest, problem)) in enumerate(zip(photos, pool.map(one, photos), strict=True)):
            if view is None:
                report.skipped[photo.relative] = problem
            else:
                views.append(view)
                kept.append(photo)
                hashes.append(digest)
            if number % 50 == 0:
                progress(number / len(photos))
    if not views or len(photos) - len(views) > UNREADABLE_SHARE * len(photos):
        raise InputError(
            "dataset.too_many_unreadable",
            f"{len(photos) - len(views)} of {len(photos)} images cannot be read, such as {next(iter(report.skipped))}.",
            expected=f"<= {UNREADABLE_SHARE:.0%}",
            got=f"{1 - len(views) / len(photos):.0%}",
        )
    return np.stack(views), kept, hashes


def _warn_about_duplicates(photos: list[Photo], hashes: list[str], report: DatasetReport) -> None:
    items: dict[str, set[str]] = defaultdict(set)
    for photo, digest in zip(photos, hashes, strict=True):
        items[digest].add(photo.item)
    shared = sum(len(found) > 1 for found in items.values())
    if shared:
        report.warnings.append(f"{shared} images appear under several items: figures may be too good.")
