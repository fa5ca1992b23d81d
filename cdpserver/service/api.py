"""The control API: HTTP with JSON on `STATE_DIR/api.sock`, for our own user only. `cdp` is its client.

Errors are `{"error", "message", "hint", "exit_code"}`: the tree of `cdpserver.errors` over HTTP.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import trio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from hypercorn.config import Config as HypercornConfig
from hypercorn.config import Sockets
from hypercorn.trio import serve as hypercorn_serve
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

import cdpserver
from cdpserver import messages
from cdpserver.errors import CdpError, NoSpaceError, NotFoundError, RefusedError, UnreachableError, UsageError
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.children import Children
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.instants import Instants

STATUSES: tuple[tuple[type[CdpError], int], ...] = (
    (NotFoundError, 404),
    (UsageError, 400),
    (NoSpaceError, 507),
    (RefusedError, 409),
    (UnreachableError, 503),
)
"""HTTP's words for the errors, first match first; anything else is 500."""

GRACE_S = 5.0
"""How long requests under way may take to end when the service stops."""

MAX_HEAD = 64 << 10
"""A request line and its headers; a name or two."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AddDisk(_Body):
    """POST /v1/disks"""

    name: str
    size: str | int
    vm: str | None = None
    base: str | None = None


class Synced(_Body):
    """POST /v1/disks/NAME:synced"""

    session: int | None = None
    write_blocking: bool = False


class Mark(_Body):
    """POST /v1/disks/NAME:mark"""

    name: str


class AddFork(_Body):
    """POST /v1/forks"""

    point: str
    name: str


def build(
    core: Core, children: Children, disks: Disks, instants: Instants, base_points: BasePoints
) -> FastAPI:
    """The application. Routes with a verb come first: a name may hold a slash, so its pattern takes everything."""
    app = FastAPI(title="cdpserver", version=cdpserver.__version__, docs_url=None, redoc_url=None)
    _add_errors(app, core)
    _add_disk_verbs(app, disks, instants, base_points)
    _add_disks(app, disks)
    _add_forks(app, disks)

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        return {
            "version": cdpserver.__version__,
            "state_dir": str(core.state.path),
            "time_ns": core.clock.now_ns(),
            "children": children.status(),
            "disks": len(await core.thread(core.catalog.names)),
        }

    @app.get("/v1/uri")
    async def uri(point: str) -> dict[str, Any]:
        return await instants.uri(point)

    return app


def _add_disk_verbs(app: FastAPI, disks: Disks, instants: Instants, base_points: BasePoints) -> None:
    @app.post("/v1/disks/{name:path}:synced")
    async def synced(name: str, body: Synced | None = None) -> dict[str, Any]:
        said = body or Synced()
        await base_points.synced(name, said.session, write_blocking=said.write_blocking)
        return await disks.show(name)

    @app.get("/v1/disks/{name:path}:points")
    async def points(
        name: str,
        since: str | None = None,
        until: str | None = None,
        kind: str | None = None,
        limit: Annotated[int | None, Query()] = None,
    ) -> list[dict[str, Any]]:
        return await instants.points(name, since=since, until=until, kind=kind, limit=limit)

    @app.post("/v1/disks/{name:path}:mark")
    async def mark(name: str, body: Mark) -> dict[str, Any]:
        return await instants.mark(name, body.name)

    @app.post("/v1/disks/{name:path}:cut")
    async def cut(name: str) -> dict[str, Any]:
        return await base_points.cut(name)

    @app.get("/v1/disks/{name:path}:basepoints")
    async def list_base_points(name: str) -> list[dict[str, Any]]:
        return await base_points.list_published(name)


def _add_disks(app: FastAPI, disks: Disks) -> None:
    @app.post("/v1/disks")
    async def add(body: AddDisk) -> dict[str, Any]:
        return await disks.add(body.name, body.size, vm=body.vm, base=body.base)

    @app.get("/v1/disks")
    async def list_disks() -> list[dict[str, Any]]:
        return await disks.list_disks()

    @app.get("/v1/disks/{name:path}")
    async def show(name: str) -> dict[str, Any]:
        return await disks.show(name)

    @app.delete("/v1/disks/{name:path}")
    async def remove(name: str) -> dict[str, Any]:
        return await disks.remove(name)


def _add_forks(app: FastAPI, disks: Disks) -> None:
    @app.post("/v1/forks")
    async def add(body: AddFork) -> dict[str, Any]:
        return await disks.fork(body.point, body.name)

    @app.get("/v1/forks")
    async def list_forks() -> list[dict[str, Any]]:
        return await disks.forks()

    @app.get("/v1/forks/{name:path}")
    async def show(name: str) -> dict[str, Any]:
        return await disks.show_fork(name)

    @app.delete("/v1/forks/{name:path}")
    async def remove(name: str) -> dict[str, Any]:
        return await disks.remove(name, fork=True)


def _answer(error: CdpError) -> JSONResponse:
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    return JSONResponse({**messages.error_fields(error), "exit_code": error.exit_code}, status)


def _add_errors(app: FastAPI, core: Core) -> None:
    @app.exception_handler(CdpError)
    async def ours(_: Request, error: CdpError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return _answer(UsageError(f"bad request: {where}: {first['msg']}", hint="cdp --help"))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        answer = _answer(NotFoundError(f"no such request: {request.method} {request.url.path[:200]!r}"))
        answer.status_code = error.status_code
        return answer

    # The process's rim: whatever went wrong in one request, the service goes on.
    @app.middleware("http")
    async def failed(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        try:
            return await call_next(request)
        except Exception as error:  # noqa: BLE001
            core.log.emit(
                "service.request-failed",
                level="error",
                request=f"{request.method} {request.url.path}"[:300],
                reason=repr(error)[:2000],
            )
            return _answer(CdpError(f"the request failed: {error!r}"[:500], hint="the log says more"))


class _Hypercorn(HypercornConfig):
    """Hypercorn's settings, with a socket that is there already (it would make the fd inheritable)."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__()
        self._listener = listener
        self.errorlog = None
        self.graceful_timeout = GRACE_S
        self.h11_max_incomplete_size = MAX_HEAD

    def create_sockets(self) -> Sockets:
        return Sockets([], [self._listener], [])


async def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    until: trio.Event,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until the event; then no new ones are taken, and those under way have a few seconds."""
    listener.setblocking(False)
    await hypercorn_serve(
        app,  # type: ignore[arg-type]
        _Hypercorn(listener),
        shutdown_trigger=until.wait,
        task_status=task_status,
    )
