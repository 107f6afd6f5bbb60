"""Models and their versions: bundles under a name and a number, with a stage a person sets."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, func
from sqlmodel import Session, col, desc, select

from control_plane.database.audit import audit
from control_plane.database.tables.registry import Model, ModelVersion, Stage
from control_plane.registry.store import Store
from models.errors import InputError

_LARGE = "held_out"


def register(
    session: Session,
    store: Store,
    directory: Path,
    *,
    actor: str,
    now: datetime,
    job_id: int | None = None,
    origin: dict[str, Any] | None = None,
) -> ModelVersion:
    """Keeps a bundle and gives it the next number under its name; the same bundle again is the same version.

    A name that differs from a known one by upper and lower case alone is that model's name.

    `origin` adds to the origin in the bundle itself, and is kept in the version's lineage. The
    held-out items stay in the bundle: a list of versions must not carry thousands of probabilities.

    Raises:
        BundleError: The bundle is not whole.
    """
    bundle = store.put_bundle(directory)
    model = session.exec(select(Model).where(_named(bundle.manifest.name))).first()
    if model is None:
        model = Model(name=bundle.manifest.name, created_at=now)
        session.add(model)
        session.flush()
    versions = session.exec(select(ModelVersion).where(ModelVersion.model_id == model.id)).all()
    for version in versions:
        if version.bundle == bundle.digest:
            return version
    metrics: Any = bundle.lineage.get("metrics", {})
    version = ModelVersion(
        model_id=model.id or 0,
        number=max((v.number for v in versions), default=0) + 1,
        bundle=bundle.digest,
        size_bytes=bundle.manifest.size_bytes,
        metrics=metrics,
        lineage={key: value for key, value in bundle.lineage.items() if key != _LARGE} | (origin or {}),
        job_id=job_id,
        created_by=actor,
        created_at=now,
    )
    session.add(version)
    session.flush()
    audit(session, actor, "version.register", f"{model.name}:{version.number}", {"bundle": bundle.digest}, now)
    return version


def _named(name: str) -> ColumnElement[bool]:
    """Returns whether a model has this name; upper and lower case make no two models."""
    return func.lower(col(Model.name)) == name.lower()


def find_version(session: Session, reference: str) -> tuple[Model, ModelVersion]:
    """Returns the version that `NAME`, `NAME:NUMBER` or a bundle digest names; a bare name means the newest.

    Raises:
        InputError: `registry.unknown_version`.
    """
    name, _, number = reference.partition(":")
    query = select(Model, ModelVersion).where(col(Model.id) == col(ModelVersion.model_id))
    if len(reference) == 64 and not number:
        query = query.where(ModelVersion.bundle == reference)
    else:
        query = query.where(_named(name))
        if number:
            if not number.isdigit():
                raise _unknown(reference)
            query = query.where(ModelVersion.number == int(number))
    found = session.exec(query.order_by(desc(ModelVersion.number))).first()
    if found is None:
        raise _unknown(reference)
    return found[0], found[1]


def _unknown(reference: str) -> InputError:
    return InputError(
        "registry.unknown_version",
        "There is no such model version.",
        expected="NAME, NAME:NUMBER or a bundle digest",
        got=reference,
    )


def models_with_versions(session: Session) -> list[tuple[Model, list[ModelVersion]]]:
    """Returns all models by name, each with its versions, newest first."""
    versions = session.exec(select(ModelVersion).order_by(desc(ModelVersion.number))).all()
    return [
        (model, [version for version in versions if version.model_id == model.id])
        for model in session.exec(select(Model).order_by(col(Model.name)))
    ]


def newest_versions(session: Session, limit: int) -> tuple[Sequence[ModelVersion], dict[int | None, str]]:
    """Returns the newest versions of all models, newest first, and the name of each model by its id."""
    versions = session.exec(select(ModelVersion).order_by(desc(ModelVersion.id)).limit(limit)).all()
    return versions, {model.id: model.name for model in session.exec(select(Model))}


def set_stage(
    session: Session, reference: str, stage: Stage, *, actor: str, reason: str, now: datetime
) -> ModelVersion:
    """Moves a version to a stage; the audit trail keeps who and why. One version per model is in production."""
    model, version = find_version(session, reference)
    if stage is Stage.PRODUCTION:
        for other in session.exec(select(ModelVersion).where(ModelVersion.model_id == model.id)):
            if other.stage == Stage.PRODUCTION and other.id != version.id:
                other.stage = Stage.ARCHIVED
                session.add(other)
    details = {"from": str(version.stage), "to": str(stage), "reason": reason}
    version.stage = stage
    session.add(version)
    audit(session, actor, "version.stage", f"{model.name}:{version.number}", details, now)
    return version
