"""Routes of training runs, imports and other jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query

from control_plane.api.actor import Acting
from control_plane.api.schemas import Act, NewImport, NewTrainingRun
from control_plane.data.catalog import find_dataset
from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.jobs import JobKind
from control_plane.jobs.queue import cancel, get_job, list_jobs, submit
from control_plane.jobs.requests import check_import, check_training
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1")
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=500)]
JobId = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.post("/training-runs", status_code=202, tags=["training"])
def create_training_run(body: NewTrainingRun, services: Given, actor: Acting) -> dict[str, Any]:
    """Queues a training run; a worker process takes it. Follow it at `/training-runs/{id}`."""
    settings = check_training(body.model_dump(exclude={"dataset", "actor"}))
    with writing(services.engine) as session:
        dataset = find_dataset(session, body.dataset)
        origin = {"dataset": body.dataset, "root": dataset.root, "dataset_id": dataset.id, "actor": actor}
        params = settings | origin
        job = submit(session, JobKind.TRAIN, params, actor=actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json")


@router.get("/training-runs", tags=["training"])
def list_training_runs(services: Given, limit: Limit = 50) -> list[dict[str, Any]]:
    """Newest first, without their logs."""
    with reading(services.engine) as session:
        jobs = list_jobs(session, JobKind.TRAIN, limit)
        return [job.model_dump(mode="json", exclude={"log"}) for job in jobs]


@router.get("/training-runs/{job_id}", tags=["training"])
def show_training_run(job_id: JobId, services: Given) -> dict[str, Any]:
    """One run with its log."""
    return get_job(services.engine, job_id).model_dump(mode="json")


@router.get("/jobs/{job_id}", tags=["jobs"])
def show_job(job_id: JobId, services: Given) -> dict[str, Any]:
    """One job with its log."""
    return get_job(services.engine, job_id).model_dump(mode="json")


@router.post("/jobs/{job_id}/cancel", tags=["jobs"])
def cancel_job(job_id: JobId, _body: Act, services: Given, actor: Acting) -> dict[str, Any]:
    """Asks a job to end; it does within seconds."""
    with writing(services.engine) as session:
        job = cancel(session, job_id, actor=actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json", exclude={"log"})


@router.post("/imports", status_code=202, tags=["models"])
def import_model(body: NewImport, services: Given, actor: Acting) -> dict[str, Any]:
    """Queues the import of an ONNX model that lies on the server's machine."""
    settings = check_import(body.path, body.settings)
    params = {"path": body.path, "settings": settings, "name": settings["name"], "actor": actor}
    with writing(services.engine) as session:
        job = submit(session, JobKind.IMPORT_ONNX, params, actor=actor, now=utc_now())
        session.commit()
        return job.model_dump(mode="json")
