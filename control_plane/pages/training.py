"""Pages of training runs, and of the API."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from control_plane.database.engine import reading
from control_plane.jobs.queue import list_jobs
from control_plane.pages.rendering import page
from control_plane.services import services_of

router = APIRouter(include_in_schema=False)


@router.get("/training", response_class=HTMLResponse)
def training(request: Request) -> HTMLResponse:
    """Shows training runs, newest first."""
    with reading(services_of(request).engine) as session:
        jobs = list_jobs(session, None, 50)
    return page(request, "training.html", "Training", jobs=jobs)


@router.get("/docs", response_class=HTMLResponse)
def docs(request: Request) -> HTMLResponse:
    """Shows the API by tag, from its own OpenAPI document: no third-party viewer."""
    return page(request, "docs.html", "API", document=request.app.openapi())
