"""Keeps samples of items about which champion and challenger disagree, in a folder."""

import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.files import write_atomically
from models.recipe import Verdict

log = logging.getLogger("sortline.shadow")


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One item that champion and challenger judge differently."""

    item_id: int
    views: NDArray[np.uint8]
    """uint8 (V, S, S, 3) BGR."""
    champion: Verdict
    challenger: Verdict


def _packed(found: Disagreement) -> bytes:
    import io  # noqa: PLC0415  only when the two disagree

    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        views=found.views,
        champion=np.array(found.champion.probabilities, np.float32),
        challenger=np.array(found.challenger.probabilities, np.float32),
    )
    return stream.getvalue()


class SampleFolder:
    """Keeps the newest disagreements as `.npz` files: views and both probabilities.

    Args:
        folder: Folder of the samples, made with the first one.
        limit: Largest number of files; the oldest is removed first.
    """

    def __init__(self, folder: Path, *, limit: int = 200) -> None:
        self._folder, self._limit = folder, limit
        self._names: deque[Path] = deque(sorted(folder.glob("*.npz")) if folder.is_dir() else [])
        self._number = int(self._names[-1].stem) + 1 if self._names and self._names[-1].stem.isdigit() else 0
        self.failed = 0

    def __call__(self, found: Disagreement) -> None:
        """Keeps one disagreement; a disk error is counted, not raised."""
        path = self._folder / f"{self._number:09d}.npz"
        self._number += 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _packed(found))
            self._names.append(path)
            while len(self._names) > self._limit:
                self._names.popleft().unlink(missing_ok=True)
        except OSError as error:
            self.failed += 1
            log.warning("sample not kept: %s", error)
