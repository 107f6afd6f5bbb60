"""Stands before every route: what is let in, how much of it, under which address, and how a request ends.

Works on the bare ASGI messages, so that a limit counts bytes as they arrive and an open stream can be ended. It knows
no route and no table. Rules, in this order:

1. A reverse proxy may strip the prefix of `server.public_url` or leave it: both reach the same route.
2. A change comes from this origin: the host it was called by, or `server.public_url`.
3. Where there is a token, a change needs it, and reading needs it, the read token, or the cookie of the login page;
   probes, static files and the login page need none.
4. A body is at most as large as its route takes, whether its length was announced or not.
5. HEAD is GET without a body; a caller that goes away in the middle is one line in the log; a server that stops ends
   its open streams.
"""

import hmac
import json
import logging
import re
from collections.abc import Callable
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from threading import Event
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.config import ServerConfig
from models.errors import ConflictError, InputError, SortlineError

COOKIE: Final = "sortline-read"
MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""Largest body of a route that takes a JSON document or signed metadata; a rollout to 5,000 named agents has 0.4 MB."""
_UPLOADS: Final = re.compile(r"^/api/v1/versions$")
_OPEN: Final = re.compile(r"^/(healthz|readyz|login|static/.*)$")
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
log = logging.getLogger("sortline.api")
LoginPage = Callable[[Request], Response]


class TooLarge(HTTPException):
    """A body grew beyond what its route takes."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, "The request is too large.")
        self.limit = limit

    def error(self) -> InputError:
        """Returns the refusal as the API words it."""
        return InputError("api.oversize", "The request is too large.", expected=f"<= {self.limit} bytes", got="more")


class Tokens:
    """The secrets of a server, and what each of them allows.

    Args:
        write: Allows everything; empty = nothing is asked for.
        read: Allows reading; empty = there is none beside `write`.
    """

    def __init__(self, write: str = "", read: str = "") -> None:
        self._write, self._read = write, read

    @property
    def needed(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._write)

    @property
    def cookie(self) -> str:
        """Value of the cookie that lets a browser read; it ends when the token is replaced, and does not reveal it."""
        return hmac.new(self._write.encode(), b"sortline read cookie 1", sha256).hexdigest()

    def may_change(self, given: str) -> bool:
        """Returns whether this token allows changes."""
        return not self.needed or hmac.compare_digest(given.encode(), self._write.encode())

    def may_read(self, given: str, cookie: str = "") -> bool:
        """Returns whether this token, or this cookie, allows reading."""
        if self.may_change(given):
            return True
        by_token = bool(self._read) and hmac.compare_digest(given.encode(), self._read.encode())
        return by_token or hmac.compare_digest(cookie.encode(), self.cookie.encode())


class Guard:
    """ASGI middleware with the rules above.

    Args:
        app: Gets what is let in.
        config: Addresses and limits.
        tokens: Who may read and change.
        stopping: Set when the server stops.
        login_page: Answers a browser that may not read yet.
    """

    def __init__(
        self, app: ASGIApp, config: ServerConfig, tokens: Tokens, stopping: Event, login_page: LoginPage
    ) -> None:
        self._app, self._config, self._tokens = app, config, tokens
        self._stopping, self._login_page = stopping, login_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = self._place(scope)
        limit = self._config.max_body_bytes if _UPLOADS.match(path) else MAX_DOCUMENT_BYTES
        answer = _Answer(send, silent=scope["method"] == "HEAD")
        body = _Body(receive, limit, self._stopping)
        refused = self._refusal(scope, path, limit)
        if refused is not None:
            await refused(scope, receive, answer)
            return
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
            body.ended = True
        try:
            await self._app(scope, body, answer)
        except ClientDisconnect:
            log.info("%s %s: the caller went away before its request was complete", scope["method"], path)
        except TooLarge as error:
            if answer.started:
                raise
            await refusal(413, error.error())(scope, receive, answer)

    def _place(self, scope: Scope) -> str:
        """Puts the prefix into the path where a proxy took it out; returns the path without it."""
        prefix, path = self._config.prefix, str(scope["path"])
        scope["root_path"] = prefix
        if not prefix:
            return path
        if path == prefix or path.startswith(f"{prefix}/"):
            return path[len(prefix) :] or "/"
        scope["path"] = prefix + path
        scope["raw_path"] = prefix.encode() + scope.get("raw_path", path.encode())
        return path

    def _refusal(self, scope: Scope, path: str, limit: int) -> Response | None:
        headers = Headers(scope=scope)
        if "\x00" in path:
            return refusal(404, InputError("api.unknown_path", "There is nothing here.", got=ascii(path)[:200]))
        if b"\x00" in unquote_to_bytes(scope.get("query_string", b"")):
            return refusal(422, InputError("api.malformed", "The query holds a NUL character.", got="%00"))
        changes = scope["method"] not in _READS
        if changes and not self._same_origin(headers):
            expected, got = headers.get("host", ""), headers["origin"]
            error = ConflictError("api.foreign_origin", "Another site must not act here.", expected=expected, got=got)
            return refusal(403, error)
        size = headers.get("content-length", "0")
        if not size.isdecimal() or len(size) > len(str(limit)) or int(size) > limit:
            return refusal(413, TooLarge(limit).error())
        return self._unknown_caller(scope, headers, path, changes=changes)

    def _unknown_caller(self, scope: Scope, headers: Headers, path: str, *, changes: bool) -> Response | None:
        if not self._tokens.needed or _OPEN.match(path):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._tokens.may_change(given) if changes else self._tokens.may_read(given, _cookie(headers)):
            return None
        if not changes and not path.startswith("/api/") and "text/html" in headers.get("accept", ""):
            return self._login_page(Request(scope))
        what = "Changes need the token." if changes else "Reading needs the token, or the read token."
        return refusal(
            401,
            ConflictError(
                "api.no_token", what, expected="Authorization: Bearer ..., from SORTLINE_TOKEN in the command line"
            ),
        )

    def _same_origin(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or (self._config.public_origin and origin == self._config.public_origin):
            return True
        return origin.partition("://")[2] == headers.get("host", "")


def refusal(status: int, error: SortlineError) -> JSONResponse:
    """Returns an error as every listener of ours words it."""
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(json.loads(json.dumps(error.as_dict())), status_code=status, headers=headers)


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


class _Body:
    """Hands on what arrives while it stays within the limit; says that the caller is gone when the server stops."""

    def __init__(self, receive: Receive, limit: int, stopping: Event) -> None:
        self._receive, self._limit, self._stopping = receive, limit, stopping
        self._size = 0
        self.ended = False
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete and (self.ended or self._stopping.is_set()):
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._limit:
                raise TooLarge(self._limit)
        return message


class _Answer:
    """Hands on the answer, without its body where the method is HEAD."""

    def __init__(self, send: Send, *, silent: bool) -> None:
        self._send, self._silent = send, silent
        self.started = False
        self._done = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message = self._with_headers(message)
            await self._send(message)
            if self._silent:
                self._done = True
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if not self._done:
            await self._send(message)

    def _with_headers(self, message: Message) -> Message:
        found: dict[str, Any] = dict(message)
        headers = MutableHeaders(raw=list(message.get("headers", [])))
        headers.setdefault("x-content-type-options", "nosniff")
        return found | {"headers": headers.raw}
