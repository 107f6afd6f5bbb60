"""`labels.csv`: one row per photograph, with `path`, `label` and optional columns.

Optional columns: `item`, `lot`, `split` (train, validation, test), `doubt` (1 = another grader might disagree), `kind`,
`variety`, `axis` and `frame` (order of the views of an item), and measured values, which are scalars of the model:
`weight_g`, `length_mm`, and others where they are declared. Names of columns and cells are normalised (`cells`).
"""

import csv
import difflib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from control_plane.data.cells import clean, parse_doubt, parse_scalar, parse_split
from control_plane.data.dataset import DatasetReport, Photo
from control_plane.data.layouts import is_left_out, photographs
from models.errors import InputError
from models.view_spec import LENGTH, WEIGHT

NAME: Final = "labels.csv"
MAX_CSV_BYTES: Final = 256 * 1024 * 1024
KNOWN_SCALARS: Final = (WEIGHT, LENGTH)
_LONGEST_NUMBER: Final = 20
_COLUMNS: Final = ("path", "label", "item", "lot", "split", "doubt", "kind", "variety", "axis", "frame", "view")


def scalar_columns(root: Path, wanted: Sequence[str] | None, measured: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the measured columns that are learnt from.

    Args:
        root: Folder with labels.csv.
        wanted: Declared columns, all of which must exist; None = those of `KNOWN_SCALARS` and `measured` that exist.
        measured: More names of columns that may exist.

    Raises:
        InputError: `dataset.missing_columns` and those of a malformed file.
    """
    columns = _header(root / NAME)
    if wanted is None:
        return tuple(name for name in dict.fromkeys((*KNOWN_SCALARS, *measured)) if name in columns)
    for name in wanted:
        if name not in columns:
            raise _missing_column(root / NAME, name, columns)
    return tuple(wanted)


def from_csv(root: Path, scalars: tuple[str, ...], report: DatasetReport) -> Iterator[Photo]:
    """Yields the photographs that labels.csv lists, in its order.

    Raises:
        InputError: `dataset.malformed_csv`, `dataset.missing_columns`, `dataset.unsafe_path`, `dataset.unknown_word`,
            `dataset.bad_number`.
    """
    columns, rows = _rows(root / NAME)
    _warn_of_columns(columns, scalars, report)
    labelled: set[Path] = set()
    for number, row in rows:
        where = f"{NAME}, row {number}"
        label = clean(row["label"])
        if not clean(row["path"]) or not label:
            report.leave_out("row without path or label", f"row {number}")
            continue
        path, relative = _locate(root, row["path"])
        labelled.add(path)
        if is_left_out(PurePosixPath(relative)):
            report.leave_out("hidden or system file", relative)
            continue
        yield Photo(
            path=path,
            relative=relative,
            label=label,
            item=clean(row.get("item", "")) or relative,
            lot=clean(row.get("lot", "")),
            split=parse_split(row.get("split", ""), where=where),
            doubt=parse_doubt(row.get("doubt", ""), where=where),
            kind=clean(row.get("kind", "")),
            variety=clean(row.get("variety", "")),
            order=(_number(row.get("axis")), _number(row.get("frame") or row.get("view")), relative),
            scalars=tuple(parse_scalar(row.get(name, ""), name=name, where=where) for name in scalars),
        )
    if "item" not in columns:
        report.warnings.append("labels.csv has no column item: every view is its own item, near-duplicates may leak.")
    unseen = DatasetReport()
    stray = [f.as_posix() for f in photographs(root, unseen) if (root / f).resolve() not in labelled]
    report.leave_out("photograph without a label", *stray)
    if stray:
        report.warnings.append(f"{len(stray)} image files have no label; they are not used.")


def _header(path: Path) -> list[str]:
    """Returns the normalised names of the columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            columns = [clean(name).casefold() for name in next(csv.reader(stream, strict=True), [])]
    except (OSError, ValueError, csv.Error) as error:
        raise _malformed(path, error) from error
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise _malformed(path, f"the columns {twice} occur twice")
    for needed in ("path", "label"):
        if needed not in columns:
            raise _missing_column(path, needed, columns)
    return columns


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Returns the columns, and each row with its line number; rows longer than the header are refused."""
    columns = _header(path)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise _malformed(path, f"{path.stat().st_size} bytes; at most {MAX_CSV_BYTES} are read")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            next(reader)
            for cells in reader:
                if len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
                    raise _malformed(path, f"row {reader.line_num} has {len(cells)} cells for {len(columns)} columns")
                if any(cell.strip() for cell in cells):
                    padded = [*cells, *[""] * (len(columns) - len(cells))]
                    rows.append((reader.line_num, dict(zip(columns, padded, strict=False))))
    except (OSError, ValueError, csv.Error) as error:
        raise _malformed(path, error) from error
    return columns, rows


def _malformed(path: Path, got: object) -> InputError:
    return InputError(
        "dataset.malformed_csv", f"{path} cannot be read.", expected="CSV, UTF-8, with a header", got=str(got)[:200]
    )


def _missing_column(path: Path, needed: str, columns: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(needed, columns, n=1, cutoff=0.5)
    hint = f"; is it {near[0]}?" if near else "."
    return InputError(
        "dataset.missing_columns",
        f"{path} has no column {needed}{hint}",
        expected="path,label[,item,lot,split,doubt,weight_g,length_mm]",
        got=list(columns),
    )


def _warn_of_columns(columns: Sequence[str], scalars: Sequence[str], report: DatasetReport) -> None:
    """Warns of columns that are not read although their names are close to one that is."""
    known = (*_COLUMNS, *KNOWN_SCALARS)
    for name in columns:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name not in known and name not in scalars and near:
            report.warnings.append(f"Column {name} is not read; is it {near[0]}?")


def _locate(root: Path, cell: str) -> tuple[Path, str]:
    """Returns the file that a cell names, and its one spelling relative to the folder.

    The cell is tried as it is, then in the other forms in which file systems spell the same name (Unicode NFC and NFD,
    backslashes of Windows); the first file that exists counts.

    Raises:
        InputError: `dataset.unsafe_path`.
    """
    plain = cell.strip()
    forms = [plain, clean(plain), unicodedata.normalize("NFD", clean(plain))]
    forms += [form.replace("\\", "/") for form in forms]
    inside = root.resolve()
    chosen = next((form for form in forms if "\0" not in form and (root / form).is_file()), clean(plain))
    path = (inside / chosen.replace("\0", "")).resolve()
    if not path.is_relative_to(inside):
        raise InputError(
            "dataset.unsafe_path", "A label names a file outside the data set.", expected=f"inside {root}", got=cell
        )
    return path, path.relative_to(inside).as_posix()


def _number(text: str | None) -> int:
    """Returns a place in an order; 0 where the cell is no number, so that the path decides."""
    try:
        return int(float(text)) if text and len(text) < _LONGEST_NUMBER else 0
    except (ValueError, OverflowError):
        return 0
