"""What every route answers with: JSON made outside the event loop, and one error object.

Errors are `{"error", "message", "hint", "exit_code"}`: the tree of `cdpserver.errors` over HTTP.
"""

import json
from collections import deque
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cdpserver import messages
from cdpserver.errors import (
    CdpError,
    ForbiddenError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from cdpserver.events import EventLog
from cdpserver.service.api import models
from cdpserver.service.core import Core

STATUSES: tuple[tuple[type[CdpError], int], ...] = (
    (NotFoundError, 404),
    (UsageError, 400),
    (ForbiddenError, 403),
    (NoSpaceError, 507),
    (RefusedError, 409),
    (UnreachableError, 503),
)
"""HTTP's words for the errors, first match first; anything else is 500."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.Error, "description": "The request cannot be meant."},
    403: {"model": models.Error, "description": "Not for whom the asking process runs as."},
    404: {"model": models.Error, "description": "There is no such thing."},
    409: {"model": models.Error, "description": "Valid, but the state of things forbids it now."},
    500: {"model": models.Error, "description": "Damage, or an I/O operation failed."},
    503: {"model": models.Error, "description": "A process of the service does not answer."},
    507: {"model": models.Error, "description": "The store's file system is full."},
}


MAX_TAKEN_BYTES = 1 << 20
"""Of a request's body, before it is answered: more than any request here has."""


class Answers:
    """Makes answers. The description's models are not applied to them: the tests hold one against the other."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def one(self, value: dict[str, Any], status: int = 200, **headers: str) -> Response:
        """One thing."""
        return _json(value, status, {name.replace("_", "-"): text for name, text in headers.items()})

    async def many(self, items: list[dict[str, Any]]) -> Response:
        """A whole list, which may be long: its text is made in a thread."""
        return await self._core.thread(_json, items)

    async def page(self, items: list[dict[str, Any]], next_page_token: str | None) -> Response:
        """One page of a list; without a token it is the last."""
        value: dict[str, Any] = {"items": items, "next_page_token": next_page_token}
        return await self._core.thread(_json, value)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")


def error_answer(error: CdpError, status: int | None = None, headers: Any = None) -> Response:
    """The error as an answer; its status follows from what it is, unless one is given."""
    if status is None:
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    return _json({**messages.error_fields(error), "exit_code": error.exit_code}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Our errors, and what FastAPI says by itself, in the one form."""

    @app.exception_handler(CdpError)
    async def ours(_: Request, error: CdpError) -> Response:
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return error_answer(UsageError(f"bad request: {where}: {first['msg']}"[:500], hint="cdp --help"))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = NotFoundError(
            f"no such request: {request.method} {request.url.path[:200]!r}",
            hint="GET /v1/openapi.json lists what there is",
        )
        return error_answer(said, error.status_code, error.headers)


class WholeBody:
    """A request's body is taken before it is answered.

    Whoever is still sending it would find the connection closed, and no answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        taken: deque[Message] = deque()
        length, more = 0, True
        while more and length <= MAX_TAKEN_BYTES:
            taken.append(message := await receive())
            length += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)

        async def replayed() -> Message:
            return taken.popleft() if taken else await receive()

        await self._app(scope, replayed, send)


class Rim:
    """The process's rim: whatever went wrong in one request, the service goes on."""

    def __init__(self, app: ASGIApp, log: EventLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            self._log.emit(
                "service.request-failed",
                level="error",
                request=f"{scope['method']} {scope['path']}"[:300],
                reason=repr(error)[:2000],
            )
            if begun:
                raise  # the connection is cut off: half an answer must not look like a whole one
            failed = CdpError(f"the request failed: {error!r}"[:500], hint="the log says more")
            await error_answer(failed)(scope, receive, send)
