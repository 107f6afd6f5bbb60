"""Folders by class as tools and systems leave them: splits, hidden companions, thumbnails, odd depths and endings."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from control_plane.data.photo_folder import load_dataset
from models.errors import InputError
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import photo

SPEC = PreprocessSpec()


def tree(root: Path, *folders: str, views: int = 2, ending: str = ".png") -> Path:
    """Photographs below each folder; those whose path names a defect show one."""
    for folder in folders:
        rng = np.random.default_rng(list(folder.encode()))
        (root / folder).mkdir(parents=True, exist_ok=True)
        for view in range(views):
            path = root / folder / f"{folder.replace('/', '-')}-{view}{ending}"
            cv2.imwrite(str(path), photo(rng, bad="defect" in folder))
    return root


def refused(root: Path, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_dataset(root, SPEC)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize(
    "place",
    [
        "sound/.ipynb_checkpoints",
        "sound/@eaDir",
        "sound/a/@eaDir/x.jpg",
        ".Trash-1000/files",
        "__MACOSX/sound",
        "sound/.thumbnails",
        "defect/thumbs",
        "#recycle",
        "defect/a/.git/objects",
        "$RECYCLE.BIN",
    ],
)
def test_hidden_and_system_folders_are_left_out_at_every_level(tmp_path: Path, place: str) -> None:
    tree(tmp_path, "sound/a", "sound/b", "defect/a", "defect/b")
    tree(tmp_path, place)
    found = load_dataset(tmp_path, SPEC)
    assert found.report.views == 8
    assert found.classes == ("sound", "defect")
    assert found.report.left_out == {"hidden or system file": 2}


def test_companions_of_a_mac_and_thumbnail_files_are_left_out(tmp_path: Path) -> None:
    tree(tmp_path, "sound/a", "sound/b", "defect/a", "defect/b")
    for path in list(tmp_path.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (tmp_path / "sound" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "sound" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    found = load_dataset(tmp_path, SPEC)
    assert found.report.views == 8
    assert found.report.left_out == {"hidden or system file": 10}
    assert not found.report.skipped


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("train", "val", "test"),
        ("Train", "Validation", "Test"),
        ("training_set", "dev", "test_set"),
    ],
)
def test_splits_above_classes_are_splits_and_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for split in names:
        tree(tmp_path, *(f"{split}/{label}/{split}-{k}" for label in ("sound", "defect") for k in range(2)))
    found = load_dataset(tmp_path, SPEC)
    assert found.classes == ("sound", "defect")
    assert found.report.splits == {"train": 16, "test": 8}
    assert found.report.items == 12


def test_train_and_validation_alone_hold_the_validation_out(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tree(tmp_path, *(f"{split}/{label}/{split}{k}" for label in ("good", "bad") for k in range(2)))
    found = load_dataset(tmp_path, SPEC)
    assert found.report.splits == {"train": 8, "test": 8}


def test_an_item_that_is_in_two_splits_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/sound/apple-1", "train/defect/apple-2", "test/sound/apple-1", "test/defect/apple-3")
    refused(tmp_path, "dataset.split_leaks")


def test_copies_that_roboflow_made_of_a_photograph_are_one_item(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for split, apples in (("train", (0, 1, 2)), ("test", (3, 4))):
        for label in ("sound", "defect"):
            (tmp_path / split / label).mkdir(parents=True)
            for apple in apples:
                for copy in ("0a1b2c3d", "ffee0011"):
                    path = tmp_path / split / label / f"apple-{apple}_jpg.rf.{copy}.jpg"
                    cv2.imwrite(str(path), photo(rng, bad=label == "defect"))
    found = load_dataset(tmp_path, SPEC)
    assert found.report.views == 20
    assert found.report.items == 10
    assert not any("item of its own" in warning for warning in found.report.warnings)


def test_folders_named_like_splits_beside_classes_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/sound/a", "sound/b", "defect/c")
    assert "sound" in str(refused(tmp_path, "dataset.mixed_layout").got)


def test_a_folder_of_boxes_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "images/train", "images/val")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    refused(tmp_path, "dataset.detection_layout")


def test_a_folder_around_the_folder_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "apples/sound", "apples/defect")
    error = refused(tmp_path, "dataset.one_class")
    assert str(tmp_path / "apples") in str(error)


def test_endings_that_are_not_read_are_counted_and_photographs_among_them_warned_of(tmp_path: Path) -> None:
    tree(tmp_path, "sound/a", "sound/b", "defect/a", "defect/b")
    for name in ("x.heic", "y.HEIC", "z.gif", "notes.txt", "noending"):
        (tmp_path / "sound" / "a" / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("about")
    cv2.imwrite(str(tmp_path / "stray.png"), photo(np.random.default_rng(5), bad=False))
    found = load_dataset(tmp_path, SPEC)
    assert found.report.left_out == {
        "ending .heic is not read": 2,
        "ending .gif is not read": 1,
        "ending .txt is not read": 1,
        "no ending": 1,
        "outside every class folder": 1,
    }
    assert any("3 photographs have an ending" in warning for warning in found.report.warnings)


def test_upper_case_and_rare_endings_of_jpeg_are_read(tmp_path: Path) -> None:
    tree(tmp_path, "sound/a", "defect/a", ending=".JPG")
    tree(tmp_path, "sound/b", "defect/b")
    for path in list((tmp_path / "sound/b").iterdir()):
        path.rename(path.with_suffix(".jfif"))
    assert load_dataset(tmp_path, SPEC).report.views == 8
