"""Labelled folders: what is read, what is refused, and what a person is warned of."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from control_plane.data.photo_folder import load_dataset
from models.errors import InputError
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import folder, photo

SPEC = PreprocessSpec()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "photos", items=24)


def refused(code: str, root: Path, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load_dataset(root, SPEC, **options)
    assert caught.value.code == code
    return caught.value


def labels(root: Path, text: str) -> Path:
    (root / "labels.csv").write_text(text)
    return root


def test_a_good_folder_is_read_with_the_good_class_first(data: Path) -> None:
    found = load_dataset(data, SPEC)
    assert found.classes == ("sound", "defect")
    assert found.views.shape == (96, 64, 64, 3)
    assert found.report.items == 24
    assert found.doubt.sum() == 24
    assert found.digest == load_dataset(data, SPEC).digest


def test_the_digest_changes_with_a_label_or_a_byte(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=6)
    before = load_dataset(root, SPEC).digest
    text = (root / "labels.csv").read_text()
    labels(root, text.replace("item-0,0,1", "item-0,0,0").replace("views/0-0.png,sound", "views/0-0.png,defect"))
    assert load_dataset(root, SPEC).digest != before
    labels(root, text)
    cv2.imwrite(str(root / "views/0-0.png"), photo(np.random.default_rng(9), bad=False))
    assert load_dataset(root, SPEC).digest != before


def test_a_tree_with_one_folder_per_class_warns_when_items_are_unknown(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("good", "bad"):
        (tmp_path / name / "apple-1").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / name / "apple-1" / "a.png"), photo(rng, bad=name == "bad"))
        cv2.imwrite(str(tmp_path / name / "loose.png"), photo(rng, bad=name == "bad"))
    found = load_dataset(tmp_path, SPEC)
    assert found.classes == ("good", "bad")
    assert sorted(set(found.items)) == ["bad/apple-1", "bad/loose.png", "good/apple-1", "good/loose.png"]
    assert any("item of its own" in warning for warning in found.report.warnings)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    refused("dataset.missing", tmp_path / "none")
    refused("dataset.empty", tmp_path)


def test_one_class_and_a_class_with_one_item_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    rows = (root / "labels.csv").read_text().splitlines()
    labels(root, "\n".join([rows[0], *(r for r in rows[1:] if "sound" in r)]))
    refused("dataset.one_class", root)
    labels(root, "\n".join([rows[0], *(r for r in rows[1:] if "item-3" not in r)]))
    assert refused("dataset.too_few_items", root).got == 1


def test_a_label_without_file_is_refused_and_a_file_without_label_is_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    (root / "stray.jpg").write_bytes(b"x")
    assert any("no label" in warning for warning in load_dataset(root, SPEC).report.warnings)
    (root / "views/0-0.png").unlink()
    refused("dataset.missing_files", root)


def test_unreadable_images_are_skipped_while_few_and_refused_when_many(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=12)
    (root / "views/0-0.png").write_bytes(b"")
    found = load_dataset(root, SPEC)
    assert found.report.skipped == {"views/0-0.png": "photo.unreadable"}
    assert found.report.left_out["unreadable: photo.unreadable"] == 1
    for number in range(6):
        (root / f"views/{number}-1.png").write_bytes(b"\x89PNG rubbish")
    refused("dataset.too_many_unreadable", root)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd"])
def test_a_label_that_names_a_file_outside_is_refused(tmp_path: Path, path: str) -> None:
    refused("dataset.unsafe_path", labels(tmp_path, f"path,label\n{path},sound\n"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pth,label\na,b\n", "dataset.missing_columns"),
        ("", "dataset.missing_columns"),
        ("path,label\na.png,\n", "dataset.empty"),
        ('path,label\n"unclosed', "dataset.malformed_csv"),
    ],
)
def test_a_broken_label_file_is_refused(tmp_path: Path, text: str, code: str) -> None:
    refused(code, labels(tmp_path, text))


def test_label_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    refused("dataset.malformed_csv", tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", items=4)
    text = (root / "labels.csv").read_text()
    labels(root, text + "views/0-0.png,defect,item-0,0,0\n")
    refused("dataset.conflicting_labels", root)
    lines = text.splitlines()
    labels(root, "\n".join([lines[0] + ",split", lines[1] + ",test", *(line + ",train" for line in lines[2:])]))
    refused("dataset.split_leaks", root)
    labels(root, text.replace("sound", "fine"))
    refused("dataset.no_good_class", root)
    assert load_dataset(root, SPEC, good_class="fine").classes[0] == "fine"
