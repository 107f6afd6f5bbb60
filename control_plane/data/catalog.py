"""The catalogue of data sets: folders under a name, and the versions that training has found in them."""

from datetime import datetime
from pathlib import Path
from typing import Any

from sqlmodel import Session, col, select

from control_plane.database.audit import audit
from control_plane.database.tables.datasets import Dataset, DatasetVersion
from models.errors import ConflictError, InputError


def add_dataset(session: Session, name: str, folder: str, *, actor: str, now: datetime) -> Dataset:
    """Registers a folder under a name, in the caller's transaction; the same pair again changes nothing.

    Raises:
        InputError: `dataset.missing` when there is no such folder.
        ConflictError: `dataset.exists` when the name stands for another folder.
    """
    try:
        root = Path(folder).resolve()
        there = root.is_dir()
    except (OSError, ValueError):  # a NUL, or a name longer than the file system takes
        there = False
    if not there:
        raise InputError("dataset.missing", "The server finds no such folder.", expected="a folder", got=folder[:200])
    found = session.exec(select(Dataset).where(Dataset.name == name)).first()
    if found is not None:
        if found.root != str(root):
            raise ConflictError("dataset.exists", "This name is taken.", expected=found.root, got=str(root))
        return found
    dataset = Dataset(name=name, root=str(root), created_at=now)
    session.add(dataset)
    session.flush()
    audit(session, actor, "dataset.create", name, {"root": str(root)}, now)
    return dataset


def find_dataset(session: Session, name: str) -> Dataset:
    """Returns the data set of this name.

    Raises:
        InputError: `dataset.unknown`.
    """
    dataset = session.exec(select(Dataset).where(Dataset.name == name)).first()
    if dataset is None:
        raise InputError("dataset.unknown", "There is no such data set.", expected="a name", got=name[:80])
    return dataset


def datasets_with_versions(session: Session) -> list[tuple[Dataset, list[DatasetVersion]]]:
    """Returns all data sets by name, each with its versions, oldest first."""
    versions = session.exec(select(DatasetVersion).order_by(col(DatasetVersion.number))).all()
    return [
        (dataset, [version for version in versions if version.dataset_id == dataset.id])
        for dataset in session.exec(select(Dataset).order_by(col(Dataset.name)))
    ]


def note_version(session: Session, dataset: Dataset, facts: dict[str, Any], now: datetime) -> None:
    """Notes what training has found in a folder as the next version, unless its digest is known already."""
    versions = session.exec(select(DatasetVersion).where(DatasetVersion.dataset_id == dataset.id)).all()
    if any(version.digest == facts["digest"] for version in versions):
        return
    number = max((version.number for version in versions), default=0) + 1
    session.add(
        DatasetVersion(dataset_id=dataset.id or 0, number=number, digest=facts["digest"], report=facts, created_at=now)
    )
