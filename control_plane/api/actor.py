"""Who acts: the one place where a request's actor is decided.

Every route that changes something asks for `Acting`. The name comes from the header `X-Sortline-Actor` (which an
authenticating reverse proxy sets), else from the field `actor` of the body, else from the query. Accounts, when they
come, replace this one function; no route changes.
"""

from typing import Annotated, Final

from fastapi import Depends, Header, Query, Request

from control_plane.database.audit import actor_name
from models.errors import InputError

ANONYMOUS: Final = "api"
"""What the audit trail shows for a change whose caller gave no name."""


async def _given(
    request: Request,
    x_sortline_actor: Annotated[str, Header(description="Who acts; wins over the field `actor`.")] = "",
    actor: Annotated[str, Query(description="Who acts, for bodies that are not JSON; empty = `api`.")] = "",
) -> str:
    """Returns the actor's name as given, trimmed; empty when the caller gave none."""
    in_body = ""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        # The route's own body was parsed before this runs, so the document is read and valid.
        body = await request.json() if await request.body() else None
        field = body.get("actor") if isinstance(body, dict) else None
        in_body = field if isinstance(field, str) else ""
    for name in (x_sortline_actor, in_body, actor):
        if found := actor_name(name):
            return found
    return ""


async def acting(given: Annotated[str, Depends(_given)]) -> str:
    """Returns who acts; `api` where the caller gave no name."""
    return given or ANONYMOUS


def approving(actor: str) -> str:
    """Returns the actor of an approval, which must be a name that somebody gave.

    Raises:
        InputError: `api.no_actor` when the caller gave none.
    """
    if actor == ANONYMOUS:
        raise InputError("api.no_actor", "An approval needs the name of who approves.", expected="actor", got="nothing")
    return actor


Acting = Annotated[str, Depends(acting)]
