"""The command line's side of the REST API: one call per command, errors as ours."""

import os
import time
from collections.abc import Callable
from typing import Any

import httpx2

from models.errors import ConflictError, InputError, UnavailableError

_PORT_SETTING = "SORTLINE__SERVER__PORT"


def default_url() -> str:
    """Returns `SORTLINE_URL`, else this machine at the port that the environment configures, else at 8080."""
    port = os.environ.get(_PORT_SETTING, "")
    return os.environ.get("SORTLINE_URL") or f"http://127.0.0.1:{port if port.isdecimal() and port != '0' else 8080}"


_ATTEMPTS = 3
_PAUSE_S = 1.0
"""Before a request whose answer was lost is sent again."""


class Client:
    """Calls a control plane.

    Args:
        url: Address of the server; empty = `default_url()`.
        token: Token or read token; empty = `SORTLINE_TOKEN`.
    """

    def __init__(self, url: str = "", token: str = "") -> None:
        self.url = (url or default_url()).rstrip("/")
        token = token or os.environ.get("SORTLINE_TOKEN", "")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # A command calls once or twice and does not close the client, so no connection stays open behind an answer.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False, limits=limits)

    def get(self, path: str) -> Any:
        """Sends a GET request and returns the decoded answer."""
        return self._call("GET", path)

    def post(
        self, path: str, body: dict[str, Any] | None = None, content: bytes | None = None, *, key: str = ""
    ) -> Any:
        """Changes something.

        Args:
            path: Of the route.
            body: JSON document.
            content: Bytes instead of a document.
            key: Names this request (`Idempotency-Key`): the server carries out one key once, however often it comes.
        """
        headers = {"idempotency-key": key} if key else None
        return self._call("POST", path, json=body, content=content, headers=headers)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        response = self._send(method, path, {k: v for k, v in options.items() if v is not None})
        if response.is_success:
            return response.json() if "json" in response.headers.get("content-type", "") else response.content
        body = response.json() if "json" in response.headers.get("content-type", "") else {}
        family = {409: ConflictError, 503: UnavailableError}.get(response.status_code, InputError)
        raise family(
            body.get("code", f"http.{response.status_code}"),
            body.get("message", response.text[:300]),
            expected=body.get("expected"),
            got=body.get("got"),
        )

    def _send(self, method: str, path: str, options: dict[str, Any]) -> httpx2.Response:
        """Sends a request; one with a key again when its answer was lost, since it is carried out once."""
        attempts = _ATTEMPTS if options.get("headers") else 1
        for attempt in range(1, attempts + 1):
            try:
                return self._http.request(method, path, **options)
            except httpx2.ConnectError as error:
                if attempt == 1:
                    raise UnavailableError(
                        "server.unreachable",
                        f"No control plane answers at {self.url}; start one (`sortline serve`) or name it (--server).",
                        got=error,
                    ) from error
                lost: httpx2.HTTPError = error
            except httpx2.HTTPError as error:
                lost = error
            if attempt < attempts:
                time.sleep(_PAUSE_S)
        raise UnavailableError(
            "server.answer_lost",
            f"The answer of {self.url} was lost; the request may have been carried out. Look before you repeat it.",
            got=lost,
        ) from lost

    def follow_lot(self, agent_id: str, request_id: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
        """Waits for the answer to a command; returns what was asked last as it stands then."""
        until = time.monotonic() + timeout_s
        while True:
            asked: dict[str, Any] = self.get(f"/api/v1/agents/{agent_id}")["lot_asked"]
            if asked["request_id"] != request_id:
                raise ConflictError(
                    "command.overtaken", "Somebody named another lot meanwhile.", expected=request_id, got=asked["lot"]
                )
            if asked["state"] in {"accepted", "refused"} or time.monotonic() > until:
                return asked
            time.sleep(0.3)

    def follow_job(self, job_id: int, on_change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Waits for the end of a job; calls back whenever it moved."""
        last: tuple[Any, ...] = ()
        while True:
            job: dict[str, Any] = self.get(f"/api/v1/jobs/{job_id}")
            now = (job["state"], job["stage"], job["progress"])
            if now != last:
                on_change(job)
                last = now
            if job["state"] not in {"queued", "running"}:
                return job
            time.sleep(0.5)
