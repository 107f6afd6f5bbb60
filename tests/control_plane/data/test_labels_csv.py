"""labels.csv as people write it: normalised, closed vocabularies, one file once, contradictions refused."""

import os
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from control_plane.data.cells import clean, fold, parse_doubt, parse_split
from control_plane.data.photo_folder import load_dataset
from models.errors import InputError
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import photo

SPEC = PreprocessSpec()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sound and two defective items of two views each."""
    rng = np.random.default_rng(0)
    (tmp_path / "img").mkdir()
    for item in range(4):
        for view in range(2):
            cv2.imwrite(str(tmp_path / f"img/{item}-{view}.png"), photo(rng, bad=item % 2 == 1))
    return write(tmp_path, rows())


def rows() -> list[dict[str, str]]:
    return [
        {"path": f"img/{item}-{view}.png", "label": ("sound", "defect")[item % 2], "item": f"apple-{item}"}
        for item in range(4)
        for view in range(2)
    ]


def write(root: Path, table: list[dict[str, str]]) -> Path:
    columns = list(dict.fromkeys(name for row in table for name in row))
    lines = [",".join(columns), *(",".join(row.get(name, "") for name in columns) for row in table)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def refused(root: Path, table: list[dict[str, str]], code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_dataset(write(root, table), SPEC)
    assert caught.value.code == code
    return caught.value


def changed(number: int, **cells: str) -> list[dict[str, str]]:
    table = rows()
    table[number] |= cells
    return table


@pytest.mark.parametrize(
    "item", ["apple-0 ", " apple-0", "apple-0\u00a0", "apple\u200b-0", "\ufeffapple-0", "apple-0\t", "apple\u00ad-0"]
)
def test_blanks_and_invisible_characters_make_no_second_item(root: Path, item: str) -> None:
    found = load_dataset(write(root, changed(1, item=item)), SPEC)
    assert found.report.items == 4
    assert set(found.items) == {f"apple-{k}" for k in range(4)}


@pytest.mark.parametrize("cells", [{"label": "Sound"}, {"label": "SOUND "}, {"item": "Apple-0"}, {"item": "apple -0"}])
def test_names_that_differ_only_by_case_or_blanks_are_refused(root: Path, cells: dict[str, str]) -> None:
    refused(root, changed(1, **cells), "dataset.ambiguous_names")


def test_composed_and_decomposed_letters_are_one_name(root: Path) -> None:
    names = [unicodedata.normalize(form, "Äpfel-ß") for form in ("NFC", "NFD")]
    table = rows()
    for row, name in zip(table[:2], names, strict=True):
        row["item"] = name
    assert load_dataset(write(root, table), SPEC).report.items == 4
    assert clean(names[1]) == names[0]
    assert fold("\uff21B c") == fold("ab  C") == "abc"


@pytest.mark.parametrize("word", ["test", "Test", " TEST ", "testing", "holdout", "test-set"])
def test_every_usual_word_for_test_holds_out(root: Path, word: str) -> None:
    table = [row | {"split": word if row["item"] in {"apple-0", "apple-1"} else "train"} for row in rows()]
    found = load_dataset(write(root, table), SPEC)
    assert found.report.splits == {"test": 4, "train": 4}
    assert {p.item for p in found.photos if p.split == "test"} == {"apple-0", "apple-1"}


@pytest.mark.parametrize(
    ("cells", "got"),
    [({"split": "tset"}, "tset"), ({"split": "1"}, "1"), ({"doubt": "maybe"}, "maybe"), ({"doubt": "2"}, "2")],
)
def test_words_outside_the_vocabulary_are_refused_with_their_row(root: Path, cells: dict[str, str], got: str) -> None:
    error = refused(root, changed(2, **cells), "dataset.unknown_word")
    assert "row 4" in str(error)
    assert error.got == got


@pytest.mark.parametrize(("word", "doubt"), [("1", True), ("Yes", True), ("TRUE", True), ("no", False), ("", False)])
def test_doubt_is_read_in_its_usual_spellings(word: str, doubt: bool) -> None:
    assert parse_doubt(word, where="row 1") is doubt
    assert parse_split("", where="row 1") == ""


def test_validation_is_learnt_from_beside_a_test_split_and_held_out_without_one(root: Path) -> None:
    parts = {"apple-0": "val", "apple-1": "val"}
    table = [row | {"split": parts.get(row["item"], "train")} for row in rows()]
    found = load_dataset(write(root, table), SPEC)
    assert found.report.splits == {"test": 4, "train": 4}
    assert any("held out, because there is no test split" in w for w in found.report.warnings)
    parts |= {"apple-2": "test", "apple-3": "test"}
    table = [row | {"split": parts[row["item"]]} for row in rows()]
    assert load_dataset(write(root, table), SPEC).report.splits == {"test": 4, "train": 4}


def test_rows_that_repeat_a_file_count_once(root: Path) -> None:
    table = rows() + rows()
    table += [row | {"path": f"./{row['path']}"} for row in rows()]
    table += [row | {"path": row["path"].replace("/", "\\")} for row in rows()]
    table += [row | {"path": f"img/../{row['path']}"} for row in rows()]
    found = load_dataset(write(root, table), SPEC)
    assert found.report.views == 8
    assert found.report.left_out["listed before"] == 32
    assert found.digest == load_dataset(write(root, rows()), SPEC).digest


@pytest.mark.parametrize("spelling", ["./img/0-0.png", "img//0-0.png", "img\\0-0.png", "img/x/../0-0.png", "link.png"])
def test_one_file_with_two_labels_is_refused_whatever_its_spelling(root: Path, spelling: str) -> None:
    (root / "img/x").mkdir()
    os.link(root / "img/0-0.png", root / "link.png")
    refused(root, [*rows(), {"path": spelling, "label": "defect", "item": "apple-1"}], "dataset.conflicting_labels")


def test_one_file_under_two_items_is_refused(root: Path) -> None:
    refused(root, [*rows(), rows()[0] | {"item": "apple-2"}], "dataset.conflicting_rows")


def test_equal_bytes_with_two_labels_or_on_both_sides_are_refused_and_else_count_once(root: Path) -> None:
    (root / "copy.png").write_bytes((root / "img/0-0.png").read_bytes())
    refused(root, [*rows(), {"path": "copy.png", "label": "defect", "item": "apple-9"}], "dataset.conflicting_labels")
    found = load_dataset(write(root, [*rows(), {"path": "copy.png", "label": "sound", "item": "apple-9"}]), SPEC)
    assert found.report.views == 8
    assert found.report.left_out["copy of another photograph"] == 1
    assert any("byte-equal copies under other items" in warning for warning in found.report.warnings)
    table = [row | {"split": "train"} for row in rows()]
    table.append({"path": "copy.png", "label": "sound", "item": "apple-9", "split": "test"})
    refused(root, table, "dataset.split_leaks")


def test_measured_columns_become_scalars_and_gaps_stay_gaps(root: Path) -> None:
    table = [row | {"weight_g": str(150 + k), "sugar_brix": "11.5"} for k, row in enumerate(rows())]
    table[3]["weight_g"] = "n/a"
    found = load_dataset(write(root, table), SPEC)
    assert found.scalar_names == ("weight_g",)
    assert found.report.scalars == {"weight_g": 0.875}
    assert found.scalars[0, 0] == 150
    assert np.isnan(found.scalars[3, 0])
    both = load_dataset(root, SPEC, scalars=("sugar_brix", "weight_g"))
    assert both.scalar_names == ("sugar_brix", "weight_g")
    assert both.digest != found.digest
    assert load_dataset(root, SPEC, scalars=()).scalars.shape == (8, 0)
    with pytest.raises(InputError, match="no column girth_mm"):
        load_dataset(root, SPEC, scalars=("girth_mm",))


@pytest.mark.parametrize("cell", ["heavy", "1;5", "inf", "-3", "0", "150 g"])
def test_cells_that_are_no_measured_value_are_refused_with_their_row(root: Path, cell: str) -> None:
    assert "row 4" in str(refused(root, changed(2, weight_g=cell), "dataset.bad_number"))


def test_headers_are_normalised_and_near_misses_are_named(root: Path) -> None:
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("path,label,item", "\ufeff Path ,LABEL,Item"), encoding="utf-8")
    assert load_dataset(root, SPEC).report.items == 4
    table = [row | {"splitt": "test", "remark": "-"} for row in rows()]
    warnings = load_dataset(write(root, table), SPEC).report.warnings
    assert [w for w in warnings if "is not read" in w] == ["Column splitt is not read; is it split?"]


@pytest.mark.parametrize("text", ["path,label,label\na.png,x,y\n", "path,label\nimg/0,0.png,sound\n"])
def test_tables_with_ambiguous_cells_are_refused(root: Path, text: str) -> None:
    (root / "labels.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        load_dataset(root, SPEC)
    assert caught.value.code == "dataset.malformed_csv"


def test_rows_without_label_and_hidden_files_are_counted(root: Path) -> None:
    (root / "img/._0-0.png").write_bytes(b"\x00\x05\x16\x07")
    extra = [{"path": "img/._0-0.png", "label": "sound", "item": "apple-0"}, {"path": "img/0-1.png", "label": " "}]
    found = load_dataset(write(root, rows() + extra), SPEC)
    assert found.report.views == 8
    assert found.report.summary()["left_out_examples"]["hidden or system file"] == ["img/._0-0.png"]
    assert found.report.summary()["left_out"] == {"hidden or system file": 1, "row without path or label": 1}


def test_a_class_name_that_no_recipe_can_have_is_refused_before_anything_is_read(root: Path) -> None:
    table = [row | {"label": "soft rot"} if row["label"] == "defect" else row for row in rows()]
    refused(root, table, "dataset.bad_class_name")
