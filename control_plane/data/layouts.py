"""Folders without labels.csv: which files are photographs, and what the folders above them mean.

Known layouts, by the first folder that holds photographs:

* `class/view.jpg`: every view is an item of its own.
* `class/item/view.jpg`: the views of a folder are one item.
* `split/class/...`: the same below train, validation and test (Keras, Ultralytics, Roboflow). Copies that Roboflow
  made of one photograph (`NAME_jpg.rf.HASH.jpg`) are one item.

Hidden and system folders and the thumbnails in them are never photographs, at any depth.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from control_plane.data.cells import SPLITS, clean
from control_plane.data.dataset import DatasetReport, Photo
from models.errors import InputError

SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"))
_SYSTEM_NAMES: Final = frozenset(
    (
        "@eadir",
        "#recycle",
        "@recycle",
        "@tmp",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbnails",
        "thumbs",
        "thumbs.db",
    )
)
"""Folders and files of Synology, QNAP, Windows, macOS and Linux that hold copies or nothing, in lower case."""
_NOTES: Final = frozenset(("labels.csv", "readme", "license", "data.yaml", "classes.txt", "_annotations.csv"))
_PHOTO_SUFFIXES: Final = frozenset(
    (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".tga", ".pgm")
)
"""Endings of photographs that are not read: a person expects them to count."""
_ROBOFLOW: Final = re.compile(r"[._](?:jpe?g|png|bmp|webp)\.rf\.[0-9A-Za-z]+$")


def is_left_out(relative: PurePosixPath) -> bool:
    """Returns whether a file is hidden, belongs to a system, or lies in such a folder, at any depth."""
    return any(part.startswith((".", "~$")) or part.casefold() in _SYSTEM_NAMES for part in relative.parts)


def photographs(root: Path, report: DatasetReport) -> list[PurePosixPath]:
    """Returns the photographs below a folder, relative to it and sorted; everything else is counted in the report.

    Args:
        root: The folder.
        report: Receives the counts and, where photographs have an ending that is not read, a warning.
    """
    found: list[PurePosixPath] = []
    unread = 0
    for folder, inner, names in os.walk(root):
        inner.sort()
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in sorted(names):
            relative = here / name
            suffix = relative.suffix.lower()
            if is_left_out(relative):
                report.leave_out("hidden or system file", relative.as_posix())
            elif suffix in SUFFIXES:
                found.append(relative)
            elif relative.stem.casefold() not in _NOTES and name.casefold() not in _NOTES:
                report.leave_out(f"ending {suffix} is not read" if suffix else "no ending", relative.as_posix())
                unread += suffix in _PHOTO_SUFFIXES
    if unread:
        report.warnings.append(f"{unread} photographs have an ending that is not read; convert them to PNG or JPEG.")
    return found


def from_tree(root: Path, report: DatasetReport) -> Iterator[Photo]:
    """Yields the photographs of a tree with one folder per class, with or without splits above.

    Raises:
        InputError: `dataset.mixed_layout`, `dataset.detection_layout`.
    """
    files = photographs(root, report)
    inside = [file for file in files if len(file.parts) > 1]
    report.leave_out("outside every class folder", *(f.as_posix() for f in files if len(f.parts) == 1))
    top = sorted({file.parts[0] for file in inside})
    _refuse_detection(root, top)
    splits = {name: SPLITS.get(clean(name).casefold().replace("-", "_")) for name in top}
    named = [name for name in top if splits[name]]
    if named and len(named) < len(top):
        raise InputError(
            "dataset.mixed_layout",
            "Some folders are named like splits and some are not.",
            expected="class folders only, or train, validation and test with class folders in each",
            got=top,
        )
    if named:
        flat = [file for file in inside if len(file.parts) < 3]
        report.leave_out("outside every class folder", *(file.as_posix() for file in flat))
        inside = [file for file in inside if len(file.parts) >= 3]
    alone = 0
    for file in inside:
        split = splits[file.parts[0]] or ""
        below = PurePosixPath(*file.parts[1:]) if split else file
        label = clean(below.parts[0])
        item, single = _item_of(below, label, file)
        alone += single
        yield Photo(
            path=root / file,
            relative=file.as_posix(),
            label=label,
            item=item,
            split=split,
            order=(0, 0, file.as_posix()),
        )
    if alone:
        report.warnings.append(
            f"{alone} images lie directly in a class folder: each counts as an item of its own. If neighbours show the "
            "same object, put them into class/item/ folders, or figures will be too good."
        )


def _item_of(below: PurePosixPath, label: str, file: PurePosixPath) -> tuple[str, bool]:
    """Returns the item of a file, and whether the file is an item of its own."""
    if len(below.parts) > 2:
        return f"{label}/{clean(below.parts[1])}", False
    source = _ROBOFLOW.sub("", below.stem)
    if source != below.stem:
        return f"{label}/{clean(source)}", False
    return clean(file.as_posix()), True


def _refuse_detection(root: Path, top: list[str]) -> None:
    """Refuses a data set of boxes (images/ beside labels/), whose folders are no classes."""
    lower = {name.casefold() for name in top}
    if "images" in lower and any(p.is_dir() and p.name.casefold() in {"labels", "annotations"} for p in root.iterdir()):
        raise InputError(
            "dataset.detection_layout",
            "The folder holds boxes (images beside labels), not photographs by class.",
            expected="labels.csv, or one folder per class; cut the items out first",
            got=top,
        )
