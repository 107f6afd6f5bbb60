"""Makes the application: routes, guards, and the one place where our errors become HTTP."""

import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hmac import compare_digest
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.middleware.trustedhost import TrustedHostMiddleware

from control_plane.api import (
    agents,
    audit,
    datasets,
    identities,
    models,
    recipes,
    rollouts,
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
from control_plane.monitoring import prometheus as metrics_export
from control_plane.pages import mount_pages, unavailable_page
from control_plane.services import Services, services_of
from models.errors import ConflictError, InputError, SortlineError, UnavailableError

_CHANGES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
log = logging.getLogger("sortline.api")
_MIN_FREE_BYTES = 200 * 1024 * 1024
Given = Annotated[Services, Depends(services_of)]


def create_app(services: Services) -> FastAPI:
    """The application over these services; it starts and stops the fleet link and the rollouts with itself."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if services.config.broker.enabled:
            services.start_fleet()
            services.rollouts.start()
        services.renewal.start()
        yield
        services.renewal.stop()
        if services.config.broker.enabled:
            services.rollouts.stop()
            services.stop_fleet()
        services.engine.dispose()

    app = FastAPI(
        title="Sortline control plane",
        version=version("sortline"),
        summary="Data sets, training, models, rollouts and the fleet of visual sorting lines.",
        lifespan=lifespan,
        root_path=services.config.server.root_path,
        responses={422: {"model": ErrorBody}, 409: {"model": ErrorBody}},
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    _guard(app, services)
    _map_errors(app)
    for subject in (datasets, training, models, recipes, agents, windows, audit, identities, rollouts, trust):
        app.include_router(subject.router)
    _add_probes(app)
    mount_pages(app)
    return app


def _guard(app: FastAPI, services: Services) -> None:
    """Who may change anything: the right host name, the same origin, the token where there is one."""

    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.method in _CHANGES:
            problem = _refusal(request, services)
            if problem is not None:
                return _answer(problem[0], problem[1].as_dict())
        response = await call_next(request)
        response.headers["x-content-type-options"] = "nosniff"
        return response

    app.middleware("http")(check)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*services.config.server.allowed_hosts])


def _refusal(request: Request, services: Services) -> tuple[int, SortlineError] | None:
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2] != host:
        return 403, ConflictError("api.foreign_origin", "Another site must not act here.", expected=host, got=origin)
    size = request.headers.get("content-length", "0")
    if not size.isdigit() or int(size) > services.config.server.max_body_bytes:
        return 413, InputError(
            "api.oversize", "The request is too large.", expected=services.config.server.max_body_bytes, got=size
        )
    if services.token:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not compare_digest(given.encode(), services.token.encode()):
            return 401, ConflictError("api.no_token", "Changes need the token.", expected="Authorization: Bearer ...")
    return None


def _map_errors(app: FastAPI) -> None:
    @app.exception_handler(SortlineError)
    async def ours(_request: Request, error: SortlineError) -> JSONResponse:
        return _answer(status_of(error), error.as_dict())

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    async def database_away(request: Request, error: SQLAlchemyError) -> Response:
        """Locked, slow or gone: the caller tries again, and nothing was done."""
        log.warning("%s %s refused, the database is away: %s", request.method, request.url.path, error)
        problem = UnavailableError("database.unavailable", "The database does not answer; try again.")
        answer = unavailable_page(request) or _answer(503, problem.as_dict())
        answer.headers["retry-after"] = "5"
        return answer

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _answer(
            422, {"code": "api.malformed", "message": f"{where}: {first['msg']}", "got": repr(first["input"])[:200]}
        )


def _answer(status: int, body: dict[str, Any]) -> JSONResponse:
    return JSONResponse(body, status_code=status)


def _add_probes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["system"])
    def healthz(services: Given) -> dict[str, str]:
        """The process lives; and with what kind of keys it signs."""
        return {"status": "ok", "trust": services.signer.kind}

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
            metrics_export.render(services.board, services.signer, services.counters, _gauges(services)),
            media_type="text/plain; version=0.0.4",
        )

    @app.get("/version", tags=["system"])
    def show_version() -> dict[str, str]:
        """Of this program."""
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
