"""Makes the application: routes, guards, and the one place where our errors become HTTP."""

import errno
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from control_plane.api import (
    agents,
    alarms,
    audit,
    datasets,
    identities,
    models,
    recipes,
    rollouts,
    statistics,
    training,
    trust,
    windows,
)
from control_plane.api.errors import status_of
from control_plane.api.schemas import ErrorBody
from control_plane.database.engine import check_alive, reading
from control_plane.database.leases import leases_ahead
from control_plane.database.migrate import migration_state
from control_plane.database.tables.columns import utc_now
from control_plane.guard import Guard, TooLarge
from control_plane.monitoring import prometheus as metrics_export
from control_plane.monitoring.upkeep import gauges_of
from control_plane.pages import mount_pages, unavailable_page
from control_plane.pages.login import login_page
from control_plane.services import Services, services_of
from models.errors import CapacityError, InputError, SortlineError, UnavailableError

log = logging.getLogger("sortline.api")
_MIN_FREE_BYTES = 200 * 1024 * 1024
Given = Annotated[Services, Depends(services_of)]


def create_app(services: Services) -> FastAPI:
    """Returns the application over these services; it starts and stops the fleet link and the rollouts with itself."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if services.config.broker.enabled:
            services.start_fleet()
            services.rollouts.start()
        services.alarms.start()
        services.renewal.start()
        services.upkeep.start()
        yield
        services.upkeep.stop()
        services.renewal.stop()
        services.alarms.stop()
        if services.config.broker.enabled:
            services.rollouts.stop()
            services.stop_fleet()
        services.engine.dispose()

    app = FastAPI(
        title="Sortline control plane",
        version=version("sortline"),
        summary="Data sets, training, models, rollouts and the fleet of visual sorting lines.",
        lifespan=lifespan,
        responses={422: {"model": ErrorBody}, 409: {"model": ErrorBody}},
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    _guard(app, services)
    _map_refusals(app)
    _map_failures(app)
    for subject in (
        datasets,
        training,
        models,
        recipes,
        agents,
        windows,
        statistics,
        alarms,
        audit,
        identities,
        rollouts,
        trust,
    ):
        app.include_router(subject.router)
    _add_probes(app)
    mount_pages(app)
    return app


def _guard(app: FastAPI, services: Services) -> None:
    config = services.config.server
    app.add_middleware(Guard, config=config, tokens=services.tokens, stopping=services.stopping, login_page=login_page)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*config.hosts])


_RETRY_S: Final = "5"
"""What a refused caller is asked to wait for, in seconds: the wait for a database lock, and a start of the broker."""


def _map_refusals(app: FastAPI) -> None:
    """Maps what the caller must mend."""

    @app.exception_handler(SortlineError)
    async def ours(request: Request, error: SortlineError) -> JSONResponse:
        status = status_of(error)
        if status == 404 and not request.path_params:
            status = 422  # an unknown name in a body is a mistake of the body: the route is there
        return _answer(status, error.as_dict())

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = ascii(first.get("input"))[:200]
        if first["loc"][0] == "path":
            return _answer(404, {"code": "api.unknown_path", "message": f"There is nothing here: {where}.", "got": got})
        return _answer(422, {"code": "api.malformed", "message": f"{where}: {first['msg']}", "got": got})

    @app.exception_handler(OverflowError)
    @app.exception_handler(DataError)
    async def too_large(_request: Request, error: Exception) -> JSONResponse:
        """A value that no column can hold came through a query."""
        return _answer(422, InputError("api.malformed", "A value is out of range.", got=str(error)[:200]).as_dict())

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, TooLarge):
            return _answer(413, error.error().as_dict())
        code, message = _HTTP.get(error.status_code, ("api.malformed", str(error.detail)))
        body = {"code": code, "message": message, "got": f"{request.method} {request.url.path}"[:200]}
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _map_failures(app: FastAPI) -> None:
    """Maps what the operator must mend: the database, the disk, the program."""

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    async def database_away(request: Request, error: SQLAlchemyError) -> Response:
        """Locked, slow, full or gone: the caller tries again, and nothing was done."""
        if "disk is full" in str(error) or "No space left" in str(error):
            return _full(request, error)
        log.warning("%s %s refused, the database is away: %s", request.method, request.url.path, error)
        problem = UnavailableError("database.unavailable", "The database does not answer; try again.")
        page = unavailable_page(request)
        if page is None:
            return _answer(503, problem.as_dict())
        page.headers["retry-after"] = _RETRY_S
        return page

    @app.exception_handler(OSError)
    async def system(request: Request, error: OSError) -> JSONResponse:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return _full(request, error)
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(500, UnavailableError("server.failed", "The server failed; its log says why.").as_dict())

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        """A defect of ours: the traceback stands in the log."""
        return _answer(500, UnavailableError("server.failed", "The server failed; its log says why.").as_dict())


_HTTP: Final = {
    404: ("api.unknown_path", "There is nothing here."),
    405: ("api.wrong_method", "This is not how this is done here; the header Allow names the methods."),
}


def _full(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s refused, the disk is full: %s", request.method, request.url.path, error)
    problem = CapacityError("disk.full", "The disk of the control plane is full; nothing was changed.")
    return _answer(507, problem.as_dict())


def _answer(status: int, body: dict[str, Any]) -> JSONResponse:
    headers = {"retry-after": _RETRY_S} if status == 503 else {}
    return JSONResponse(body, status_code=status, headers=headers)


def _add_probes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["system"])
    async def healthz(request: Request) -> dict[str, str]:
        """The process lives; and with what kind of keys it signs.

        Answers on the event loop: it must not wait for a thread while others wait for the database.
        """
        return {"status": "ok", "trust": services_of(request).signer.kind}

    @app.get("/readyz", tags=["system"])
    def readyz(services: Given, response: Response) -> dict[str, Any]:
        """Database, migrations, leases, broker and disk; 503 when one of them is not good."""
        checks = {
            "database": _check_database(services),
            "leases": _check_leases(services),
            "broker": "ok" if services.connection.connected or not services.config.broker.enabled else "not connected",
            "disk": "ok" if shutil.disk_usage(services.config.root).free > _MIN_FREE_BYTES else "nearly full",
        }
        ready = all(value == "ok" for value in checks.values())
        response.status_code = 200 if ready else 503
        return {"ready": ready, "checks": checks}

    @app.get("/metrics", tags=["system"], response_class=Response)
    def metrics(services: Given) -> Response:
        """Prometheus."""
        return Response(
            metrics_export.render(
                services.board, services.signer, services.counters, _gauges(services), services.alarms.counts()
            ),
            media_type="text/plain; version=0.0.4",
        )

    @app.get("/version", tags=["system"])
    def show_version() -> dict[str, str]:
        """Returns the version of this program."""
        return {"version": version("sortline")}


def _gauges(services: Services) -> dict[str, tuple[str, float]]:
    """Gauges of this process: name -> what it says, and its value."""
    backlog = services.intake.backlog()
    return {
        "sortline_broker_connected": ("Both connections to the broker stand", float(services.connection.connected)),
        "sortline_ingest_waiting_messages": ("Messages of agents that are not stored yet", float(backlog.waiting)),
        "sortline_ingest_delay_seconds": ("Age of the oldest message that is not stored yet", backlog.oldest_s),
        "sortline_ingest_shed_batches": (
            "Batches left to their agents for later, last minute",
            float(backlog.shed_lately),
        ),
        **gauges_of(services.upkeep),
        "sortline_uptime_seconds": ("Since this process started", time.monotonic() - services.started_s),
    }


def _check_database(services: Services) -> str:
    try:
        check_alive(services.engine)
        current, needed = migration_state(services.engine)
    except SortlineError as error:
        return str(error)
    return "ok" if current == needed else f"tables are at {current}, this program needs {needed}"


def _check_leases(services: Services) -> str:
    """Names the leases that no clock of today could have given: one was set back, or a replica's is ahead."""
    try:
        with reading(services.engine) as session:
            ahead = leases_ahead(session, utc_now())
    except (SQLAlchemyError, SortlineError):
        return "the database does not answer"
    return f"void, for they run too far ahead; look at the clocks: {', '.join(ahead)}" if ahead else "ok"
