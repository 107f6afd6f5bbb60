"""The pages: Jinja2 on the server, one stream of changes, small modules of plain JavaScript, a strict CSP.

A page shows what the API shows and does nothing the API cannot. Charts are SVG drawn here. Nothing is loaded from
elsewhere. `fleet`, `agent`, `as_of`, `alarms`, `models`, `rollouts` and `training` are the pages; `login` lets a
browser read where there is a token; `live` streams changed rows to all who look; `rendering` fills templates; `charts`,
`cost_chart` and `evidence_charts` draw.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from control_plane.pages import agent, alarms, as_of, fleet, login, models, rollouts, training
from control_plane.pages.rendering import environment, unavailable_page

__all__ = ["mount_pages", "unavailable_page"]
_STATIC = Path(__file__).parent / "static"


def mount_pages(app: FastAPI) -> None:
    """Adds the pages and their static files."""
    app.state.feeds = {}
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    for part in (fleet, as_of, agent, alarms, models, rollouts, training, login):
        app.include_router(part.router)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_STATIC.iterdir()))).hexdigest()
    environment.globals["version"] = digest[:8]
