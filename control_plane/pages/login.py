"""The login page: a browser gives a token once and may read from then on.

The token travels in the body of one POST, never in a URL. The cookie it is exchanged for is derived from the token, is
kept from scripts, and allows reading alone: a page that changes something asks for the token itself.
"""

from typing import Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from control_plane.guard import COOKIE
from control_plane.pages.rendering import page
from control_plane.services import services_of

router = APIRouter(include_in_schema=False)
_LIFE_S: Final = 30 * 86_400
"""A screen on the wall of a packing house shall not ask for the token every morning."""


def login_page(request: Request, problem: str = "") -> HTMLResponse:
    """Returns the page that asks for a token, as the answer to a request that may not be read yet."""
    prefix = request.scope.get("root_path", "")
    path = str(request.scope["path"]).removeprefix(prefix) or "/"
    target = "/" if path == "/login" else path
    return page(request, "login.html", "", 401, target=target, problem=problem)


@router.get("/login", response_class=HTMLResponse)
def show_login(request: Request) -> HTMLResponse:
    """The page itself."""
    answer = login_page(request)
    answer.status_code = 200
    return answer


@router.post("/login", response_class=HTMLResponse)
async def log_in(request: Request) -> Response:
    """Exchanges a token for the cookie."""
    services = services_of(request)
    form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=8)
    token, target = form.get("token", [""])[0], form.get("target", ["/"])[0]
    if not services.tokens.may_read(token.strip()):
        return login_page(request, "This token is not known here.")
    prefix = request.scope.get("root_path", "")
    inside = target.startswith("/") and not target.startswith(("//", "/\\"))
    answer = RedirectResponse(prefix + (target if inside else "/"), status_code=303)
    secure = services.config.server.public_url.startswith("https:") or request.url.scheme == "https"
    answer.set_cookie(
        COOKIE,
        services.tokens.cookie,
        max_age=_LIFE_S,
        path=prefix or "/",
        httponly=True,
        samesite="lax",
        secure=secure,
    )
    return answer
