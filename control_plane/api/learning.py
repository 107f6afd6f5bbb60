"""Routes of data sets, training runs, models and jobs."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from sqlmodel import col, desc, select

from control_plane.api.schemas import Act, NewDataset, NewImport, NewStage, NewTrainingRun
from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.datasets import Dataset, DatasetVersion
from control_plane.database.tables.jobs import Job, JobKind
from control_plane.database.tables.registry import Model, ModelVersion, Stage
from control_plane.jobs.queue import cancel, get_job, submit
from control_plane.registry.versions import find_version, register, set_stage
from control_plane.services import Services, services_of
from models.bundle import CARD, MAX_BUNDLE_BYTES, pack, unpack
from models.errors import ConflictError, InputError

router = APIRouter(prefix="/api/v1")
Given = Annotated[Services, Depends(services_of)]


@router.post("/datasets", status_code=201, tags=["datasets"])
def create_dataset(body: NewDataset, services: Given) -> dict[str, Any]:
    """Registers a folder. It is read when a training run asks for it; a version is noted each time it changed."""
    root = Path(body.root).resolve()
    if not root.is_dir():
        raise InputError("dataset.missing", "The server finds no such folder.", expected="a folder", got=body.root)
    now = utc_now()
    with writing(services.engine) as session:
        found = session.exec(select(Dataset).where(Dataset.name == body.name)).first()
        if found is not None and found.root != str(root):
            raise ConflictError("dataset.exists", "This name is taken.", expected=found.root, got=str(root))
        dataset = found or Dataset(name=body.name, root=str(root), created_at=now)
        if found is None:
            session.add(dataset)
            session.flush()
            audit(session, body.actor, "dataset.create", body.name, {"root": str(root)}, now)
        session.commit()
        return dataset.model_dump(mode="json")


@router.get("/datasets", tags=["datasets"])
def list_datasets(services: Given) -> list[dict[str, Any]]:
    """All data sets with their versions."""
    with reading(services.engine) as session:
        versions = session.exec(select(DatasetVersion).order_by(col(DatasetVersion.number))).all()
        return [
            dataset.model_dump(mode="json")
            | {"versions": [v.model_dump(mode="json") for v in versions if v.dataset_id == dataset.id]}
            for dataset in session.exec(select(Dataset).order_by(col(Dataset.name)))
        ]


@router.post("/training-runs", status_code=202, tags=["training"])
def create_training_run(body: NewTrainingRun, services: Given) -> dict[str, Any]:
    """Queues a training run; a worker process takes it. Follow it at `/training-runs/{id}`."""
    with writing(services.engine) as session:
        dataset = session.exec(select(Dataset).where(Dataset.name == body.dataset)).first()
        if dataset is None:
            raise InputError("dataset.unknown", "There is no such data set.", expected="a name", got=body.dataset)
        params = body.model_dump() | {"root": dataset.root, "dataset_id": dataset.id}
        job = submit(session, JobKind.TRAIN, params, actor=body.actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json")


@router.get("/training-runs", tags=["training"])
def list_training_runs(services: Given, limit: int = 50) -> list[dict[str, Any]]:
    """Newest first, without their logs."""
    with reading(services.engine) as session:
        jobs = session.exec(
            select(Job).where(Job.kind == JobKind.TRAIN).order_by(desc(Job.id)).limit(min(limit, 500))
        ).all()
        return [job.model_dump(mode="json", exclude={"log"}) for job in jobs]


@router.get("/training-runs/{job_id}", tags=["training"])
def show_training_run(job_id: int, services: Given) -> dict[str, Any]:
    """One run with its log."""
    return get_job(services.engine, job_id).model_dump(mode="json")


@router.get("/jobs/{job_id}", tags=["jobs"])
def show_job(job_id: int, services: Given) -> dict[str, Any]:
    """One job with its log."""
    return get_job(services.engine, job_id).model_dump(mode="json")


@router.post("/jobs/{job_id}/cancel", tags=["jobs"])
def cancel_job(job_id: int, body: Act, services: Given) -> dict[str, Any]:
    """Asks a job to end; it does within seconds."""
    with writing(services.engine) as session:
        job = cancel(session, job_id, actor=body.actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json", exclude={"log"})


@router.post("/imports", status_code=202, tags=["models"])
def import_model(body: NewImport, services: Given) -> dict[str, Any]:
    """Queues the import of an ONNX model that lies on the server's machine."""
    params = body.model_dump() | {"name": body.settings.get("name", "")}
    with writing(services.engine) as session:
        job = submit(session, JobKind.IMPORT_ONNX, params, actor=body.actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json")


@router.get("/models", tags=["models"])
def list_models(services: Given) -> list[dict[str, Any]]:
    """All models with their versions, newest first."""
    with reading(services.engine) as session:
        versions = session.exec(select(ModelVersion).order_by(desc(ModelVersion.number))).all()
        return [
            model.model_dump(mode="json")
            | {"versions": [v.model_dump(mode="json", exclude={"lineage"}) for v in versions if v.model_id == model.id]}
            for model in session.exec(select(Model).order_by(col(Model.name)))
        ]


@router.get("/versions/{reference}", tags=["models"])
def show_version(reference: str, services: Given) -> dict[str, Any]:
    """One version (`NAME`, `NAME:NUMBER` or a bundle digest) with lineage and card."""
    with reading(services.engine) as session:
        model, version = find_version(session, reference)
        card = services.store.part(version.bundle, CARD).decode(errors="replace")
        return version.model_dump(mode="json") | {"model": model.name, "card": card}


@router.post("/versions/{reference}/stage", tags=["models"])
def stage_version(reference: str, body: NewStage, services: Given) -> dict[str, Any]:
    """Moves a version to a stage, with a reason for the audit trail."""
    with writing(services.engine) as session:
        version = set_stage(session, reference, Stage(body.stage), actor=body.actor, reason=body.reason, now=utc_now())
        session.commit()
        return version.model_dump(mode="json", exclude={"lineage"})


@router.get("/versions/{reference}/bundle", tags=["models"], response_class=Response)
def download_bundle(reference: str, services: Given) -> Response:
    """The bundle as a tar."""
    with reading(services.engine) as session:
        model, version = find_version(session, reference)
    with tempfile.TemporaryDirectory(dir=services.config.root) as scratch:
        data = pack(services.store.write_directory(version.bundle, Path(scratch) / "bundle"))
    name = f"{model.name}-{version.number}.tar"
    headers = {"content-disposition": f'attachment; filename="{name}"', "x-sortline-digest": version.bundle}
    return Response(data, media_type="application/x-tar", headers=headers)


@router.post("/versions", status_code=201, tags=["models"])
async def upload_bundle(request: Request, services: Given, actor: str = "api") -> dict[str, Any]:
    """Takes a bundle (the body is its tar) into the registry, after verifying all of it."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BUNDLE_BYTES + 1024 * 1024:
            raise InputError("bundle.oversize", "The archive is too large.", expected=MAX_BUNDLE_BYTES, got="more")
    with tempfile.TemporaryDirectory(dir=services.config.root) as scratch:
        unpack(bytes(data), Path(scratch) / "bundle")
        with writing(services.engine) as session:
            version = register(session, services.store, Path(scratch) / "bundle", actor=actor[:64], now=utc_now())
            session.commit()
            return version.model_dump(mode="json", exclude={"lineage"})
