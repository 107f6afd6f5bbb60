"""Renders templates under the strict policy every page has."""

from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

from control_plane.services import services_of

environment: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=select_autoescape()
)
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def page(request: Request, template: str, name: str, http_status: int = 200, /, **facts: Any) -> HTMLResponse:
    """A page.

    Args:
        request: Asks for it.
        template: File name.
        name: Which entry of the navigation is the current one.
        http_status: Of the answer.
        facts: For the template.
    """
    text = environment.get_template(template).render(
        page=name,
        root=request.scope.get("root_path", ""),
        broker_connected=services_of(request).fleet.connected,
        trust=services_of(request).fleet.assignments.kind,
        **facts,
    )
    headers = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
    return HTMLResponse(text, status_code=http_status, headers=headers)


def unavailable_page(request: Request) -> HTMLResponse | None:
    """For a browser that asked for a page while the database is away; None for everybody else."""
    wants_page = "text/html" in request.headers.get("accept", "")
    if request.url.path.startswith("/api/") or request.method != "GET" or not wants_page:
        return None
    return page(request, "unavailable.html", "", 503)
