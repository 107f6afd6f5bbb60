"""Labelled photographs and views of textured discs: sound ones, and ones with a dark blot."""

import csv
from pathlib import Path

import cv2
import numpy as np


def photo(rng: np.random.Generator, *, bad: bool) -> np.ndarray:
    """A textured disc on white; bad ones have a dark blot."""
    image = np.full((80, 80, 3), 250, np.uint8)
    disc = np.zeros((80, 80), np.uint8)
    cv2.circle(disc, (40, 40), 32, 1, -1)
    colour = rng.integers(90, 200, 3)
    texture = np.clip(colour + rng.normal(0, 8, (80, 80, 3)), 1, 235).astype(np.uint8)
    image[disc > 0] = texture[disc > 0]
    if bad:
        at = tuple(int(v) for v in rng.integers(28, 52, 2))
        cv2.circle(image, at, int(rng.integers(6, 11)), (15, 25, 40), -1)
    return image


def save(path: Path, image: np.ndarray) -> None:
    """Writes a photograph in the format that its ending names."""
    cv2.imwrite(str(path), image)


def folder(root: Path, *, items: int = 12, views: int = 4, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = []
    (root / "views").mkdir(parents=True)
    for item in range(items):
        for view in range(views):
            bad = item % 2 == 1
            path = f"views/{item}-{view}.png"
            cv2.imwrite(str(root / path), photo(rng, bad=bad))
            rows.append((path, "defect" if bad else "sound", f"item-{item}", view, int(view == 0)))
    with (root / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "label", "item", "frame", "doubt"))
        writer.writerows(rows)
    return root


def small_views(count: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    views = np.zeros((count, 64, 64, 3), np.uint8)
    for row in range(count):
        cv2.circle(disc := np.zeros((64, 64), np.uint8), (32, 32), 28, 1, -1)
        pixels = np.clip(rng.normal(130, 25, (64, 64, 3)), 1, 255).astype(np.uint8)
        if row % 2:
            cv2.circle(pixels, (30, 30), 9, (20, 30, 50), -1)
        views[row][disc > 0] = pixels[disc > 0]
    return views, np.arange(count) % 2, np.array([f"i{row // 2 * 2 + row % 2}" for row in range(count)])
