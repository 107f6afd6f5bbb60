"""Shortcuts: classes that differ in their backdrop or their files are named, honest ones are not."""

import csv
from pathlib import Path

import cv2
import numpy as np

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.shortcuts import shortcuts
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import photo


def folder(root: Path, *, backdrop: bool = False, quality: bool = False, items: int = 24) -> Dataset:
    """Sound and defective discs; the defective ones perhaps on grey, or stored with more bytes."""
    rng = np.random.default_rng(3)
    (root / "views").mkdir(parents=True)
    rows = []
    for item in range(items):
        bad = item % 2 == 1
        for view in range(3):
            image = photo(rng, bad=bad)
            if backdrop and bad:
                image[image.min(axis=2) >= 250] = 180
            path = f"views/{item}-{view}.jpg"
            cv2.imwrite(str(root / path), image, [cv2.IMWRITE_JPEG_QUALITY, 98 if quality and bad else 90])
            rows.append((path, "defect" if bad else "sound", f"item-{item}"))
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label", "item"), *rows])
    return load_dataset(root, PreprocessSpec())


def test_classes_on_different_backdrops_are_a_shortcut(tmp_path: Path) -> None:
    found = shortcuts(folder(tmp_path / "a", backdrop=True), 1.0)
    assert found["ring"]["value"] > 0.95
    assert found["ring"]["near"]
    assert any("outer ring" in warning and "SHORTCUT" in warning for warning in found["warnings"])


def test_classes_stored_at_different_qualities_are_a_shortcut(tmp_path: Path) -> None:
    found = shortcuts(folder(tmp_path / "a", quality=True), 0.99)
    assert found["file"]["near"]
    assert any("files" in warning for warning in found["warnings"])


def test_classes_that_differ_in_the_item_alone_are_no_shortcut(tmp_path: Path) -> None:
    found = shortcuts(folder(tmp_path / "a"), 1.0)
    assert not found["ring"]["near"]
    assert found["ring"]["value"] < 0.7


def test_a_model_much_better_than_the_shortcut_is_not_suspected(tmp_path: Path) -> None:
    dataset = folder(tmp_path / "a", backdrop=True)
    assert not shortcuts(dataset, None)["warnings"]
    found = shortcuts(dataset, 1.5)
    assert not found["ring"]["near"]
