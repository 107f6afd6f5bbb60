"""What agents call over HTTPS before (and when) they have a certificate: trust, enrolment, renewal. Nothing else.

Its own small application on its own listener: the pages and the API may stay on this machine while agents reach this
from the plant's network. Bodies are bounded before they are parsed; the connection authenticates no caller: the
token or the signature in the body decides.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from control_plane.api.errors import status_of
from control_plane.database.tables.columns import utc_now
from control_plane.identity.certificates import fingerprint
from control_plane.identity.enrolment import Enrolment
from models.errors import CapacityError, InputError, SortlineError
from models.identity import (
    ANCHORS_PATH,
    ENROLMENTS_PATH,
    MAX_REQUEST_BYTES,
    RENEWALS_PATH,
    Anchors,
    EnrolmentRequest,
    RenewalRequest,
)

log = logging.getLogger("sortline.identity")
T = TypeVar("T", bound=msgspec.Struct)
_AT_ONCE = 8
"""Requests that are worked on at a time; the rest wait."""


def create_device_app(enrolment: Enrolment, counters: Counter[str]) -> Starlette:
    """The application.

    Args:
        enrolment: Decides.
        counters: Gets what was answered and what was refused, by code.
    """
    limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def anchors(_request: Request) -> Response:
        authority = enrolment.authority
        return _json(200, Anchors(ca_pem=authority.anchors_pem.decode(), issuer=fingerprint(authority.issuing)))

    async def enrol(request: Request) -> Response:
        return await _guarded(
            request, EnrolmentRequest, lambda body: enrolment.enrol(body.token, body.csr_pem, now=utc_now())
        )

    async def renew(request: Request) -> Response:
        return await _guarded(request, RenewalRequest, lambda body: enrolment.renew(body, now=utc_now()))

    async def _guarded(request: Request, kind: type[T], work: Callable[[T], msgspec.Struct]) -> Response:
        try:
            body = _parse(await _bounded(request), kind)
            answer = await anyio.to_thread.run_sync(work, body, limiter=limiter)
        except SortlineError as error:
            counters[f"identity_refused_{error.code}"] += 1
            log.warning("%s refused: %s", request.url.path, error)
            return _json(status_of(error), error.as_dict())
        counters[f"identity_{request.url.path.rpartition('/')[2]}"] += 1
        return _json(200, answer)

    return Starlette(
        routes=[
            Route(ANCHORS_PATH, anchors, methods=["GET"]),
            Route(ENROLMENTS_PATH, enrol, methods=["POST"]),
            Route(RENEWALS_PATH, renew, methods=["POST"]),
        ]
    )


async def _bounded(request: Request) -> bytes:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_REQUEST_BYTES:
            raise CapacityError(
                "api.oversize", "The request is too large.", expected=f"<= {MAX_REQUEST_BYTES} bytes", got=len(data)
            )
    return data


def _parse(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError("api.malformed", "The request cannot be read.", got=str(error)[:200]) from error


def _json(status: int, body: Any) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
