"""Renders templates under the strict policy every page has."""

import gzip
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, select_autoescape

from control_plane.monitoring.status import State
from control_plane.pages.charts import meter, mix
from control_plane.services import services_of

WORDS: Final = {
    State.GOOD: "Good",
    State.MAINTENANCE: "Maintenance",
    State.OUT_OF_SPEC: "Out of spec",
    State.CHECK: "Check",
    State.FAILURE: "Failure",
    State.OFFLINE: "Offline",
}
environment: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=select_autoescape()
)
_WORTH_BYTES: Final = 16 * 1024
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def counts(table: dict[str, object]) -> str:
    """Returns a table in one line: `sound 428, rot 66`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in table.items())


def age(seconds: float) -> str:
    """Returns `40 s`, `12 min`, `3 h`, `2 d`: as the scripts of the pages write it."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(seconds // 86_400)} d"


environment.globals.update(age=age, meter=meter, mix=mix, words=WORDS, counts=counts)


def compressed(request: Request, answer: HTMLResponse) -> HTMLResponse:
    """Returns a large page compressed where the browser takes that."""
    if len(answer.body) < _WORTH_BYTES or "gzip" not in request.headers.get("accept-encoding", ""):
        return answer
    headers = {k: v for k, v in answer.headers.items() if k not in {"content-length", "content-type"}}
    headers |= {"content-encoding": "gzip", "vary": "accept-encoding"}
    return HTMLResponse(gzip.compress(bytes(answer.body), 1), answer.status_code, headers)


def page(request: Request, template: str, name: str, http_status: int = 200, /, **facts: Any) -> HTMLResponse:
    """Returns a page.

    Args:
        request: What is answered.
        template: File name.
        name: Which entry of the navigation is the current one.
        http_status: Status of the answer.
        facts: Variables of the template.
    """
    text = environment.get_template(template).render(
        page=name,
        root=request.scope.get("root_path", ""),
        broker_connected=services_of(request).connection.connected,
        trust=services_of(request).signer.kind,
        **facts,
    )
    headers = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
    return HTMLResponse(text, status_code=http_status, headers=headers)


def unavailable_page(request: Request) -> HTMLResponse | None:
    """Returns a page for a browser that asked for one while the database is away; None for other clients."""
    wants_page = "text/html" in request.headers.get("accept", "")
    if request.url.path.startswith("/api/") or request.method != "GET" or not wants_page:
        return None
    return page(request, "unavailable.html", "", 503)
