"""The routes that fetch: the content of a file, also in part (RFC 9110, ranges), and a tree as a tar stream.

A point never changes, so a strong ETag follows from its name alone. Who took what is an event, `file.taken`.
What is to be known of the file system, such as how old the view may be, is in headers, `Cdp-Remark`: percent-encoded, one each.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any
from urllib.parse import quote

import trio
from blake3 import blake3
from fastapi import APIRouter, Header, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cdpserver.catalog import Entry
from cdpserver.service.api.files import PathOf, PointText, absolute
from cdpserver.service.browsing import Browsing, Session
from cdpserver.service.core import Core

ZEROS = bytes(1 << 20)

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")

MAX_SIZE = 1 << 63

NO_PAGE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}
"""A guest's file is never a page of ours."""

REMARK = "Cdp-Remark"
MOST_REMARKS = 16
"""A head has room for so many lines; a file system has one or two."""

REMARKED = {
    "headers": {
        REMARK: {
            "description": "What is to be known of the file system, percent-encoded; it may come several times.",
            "schema": {"type": "string"},
        }
    }
}
BINARY = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    **REMARKED,
}


def routes(core: Core, browsing: Browsing) -> APIRouter:
    """Fetching."""
    made = APIRouter(tags=["files"])

    def record(request: Request, entry: Entry, point: str, path: bytes, **fields: Any) -> None:
        core.log.emit(
            "file.taken",
            user=request.scope["state"]["user"],
            disk=entry.name,
            point=point,
            path=path.decode(errors="backslashreplace"),
            **fields,
        )

    @made.get(
        "/v1/files:content",
        response_class=Response,
        responses={
            200: BINARY,
            206: BINARY | {"description": "The range that was asked for."},
            304: {"description": "What the client has is what there is."},
            416: {"description": "The file ends before the range."},
        },
    )
    async def download_file(
        request: Request,
        point: PointText,
        path: PathOf,
        range: Annotated[str | None, Header(description="bytes=0-99; one range.")] = None,
        if_range: Annotated[str | None, Header()] = None,
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """The content of a file, links followed."""
        entry, seq, volume = await browsing.place(point)
        name = absolute(entry, seq, volume)
        etag = f'"{blake3(repr((entry.id, seq, volume, path)).encode()).hexdigest(length=16)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private", **NO_PAGE}
        wanted = _range(range) if if_range in (None, etag) else None
        asked: dict[str, Any] = {"op": "content", "volume": volume, "path": path, "start": 0, "end": None}
        if wanted is not None:
            asked |= {"start": wanted[0], "end": wanted[1]}
        if if_none_match is not None and _matches(etag, if_none_match):
            found = await browsing.ask(entry, seq, asked | {"start": 0, "end": 0})
            return Response(status_code=304, headers=headers)
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(browsing.session(entry, seq))
            found = await session.exchange(asked)
            start, end, size = found["start"], found["end"], found["size"]
            if wanted is not None and start >= end:
                return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{size}"})
            headers |= {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(end - start),
                "Content-Disposition": _attachment(path.rstrip(b"/").rpartition(b"/")[2]),
            }
            if wanted is not None:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"

            def done(sent: int) -> None:
                record(request, entry, name, path, files=1, bytes=sent, failed=0)

            status = 206 if wanted is not None else 200
            fetched = _Fetched(status, headers, session, found["stream"], stack.pop_all(), done)
            return _remarked(fetched, found["remarks"])

    @made.get(
        "/v1/files:tar",
        response_class=Response,
        responses={
            200: {
                "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
                **REMARKED,
            }
        },
    )
    async def download_tree(request: Request, point: PointText, path: PathOf) -> Response:
        """A file, or a directory with all that is below, as a tar stream (pax, with holes and attributes).

        What could not be read is named in a last member, NAME.not-fetched.txt.
        """
        entry, seq, volume = await browsing.place(point)
        name = absolute(entry, seq, volume)
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(browsing.session(entry, seq))
            found = await session.exchange({"op": "tar", "volume": volume, "path": path})
            headers = {
                "Content-Type": "application/x-tar",
                "Content-Disposition": _attachment((found["name"] or b"root") + b".tar"),
                "Cache-Control": "no-store",
                **NO_PAGE,
            }
            taken: dict[str, int] = {}

            def done(sent: int) -> None:
                record(request, entry, name, path, **{"files": 0, "bytes": 0, "failed": 0} | taken)

            fetched = _Fetched(200, headers, session, found["stream"], stack.pop_all(), done, taken)
            return _remarked(fetched, found["remarks"])

    return made


class _Fetched(Response):
    """A stream of a session, until it ends, the client is gone, or the service stops.

    What goes wrong after the head is sent cuts the connection off: half a file must not look like a whole one.
    """

    def __init__(
        self,
        status: int,
        headers: dict[str, str],
        session: Session,
        stream: int,
        held: AsyncExitStack,
        done: Callable[[int], None],
        taken: dict[str, int] | None = None,
    ) -> None:
        super().__init__(status_code=status, headers=headers)
        if "Content-Length" not in headers:
            del self.headers["content-length"]
        self._session, self._stream, self._held = session, stream, held
        self._done, self._taken = done, {} if taken is None else taken
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = trio.Event()
        async with self._held:
            try:
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_wait_for_disconnect, receive, gone)
                    whole = await self._pass_on(send, gone)
                    nursery.cancel_scope.cancel()
                if whole:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                self._done(self._sent)

    async def _pass_on(self, send: Callable[[Any], Awaitable[None]], gone: trio.Event) -> bool:
        """Was all of it sent?"""
        while self._stream:
            if gone.is_set():
                with trio.move_on_after(1):
                    await self._session.exchange({"op": "end", "stream": self._stream})
                return False
            piece = await self._session.exchange({"op": "next", "stream": self._stream})
            if piece.get("end"):
                break
            self._taken |= piece.get("taken", {})
            if "data" in piece:
                await self._body(send, piece["data"])
            left = piece.get("hole", 0)
            while left and not gone.is_set():
                await self._body(send, ZEROS[: min(left, len(ZEROS))])
                left -= min(left, len(ZEROS))
        return True

    async def _body(self, send: Callable[[Any], Awaitable[None]], data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sent += len(data)


def _remarked(response: Response, remarks: list[str]) -> Response:
    for remark in remarks[:MOST_REMARKS]:
        response.headers.append(REMARK, quote(remark, safe=" "))
    return response


async def _wait_for_disconnect(receive: Receive, gone: trio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    gone.set()


def _range(text: str | None) -> tuple[int, int | None] | None:
    """(start, end) of one range; (-N, None) for the last N bytes. None for what is to be passed over (RFC 9110, 14.2)."""
    found = _RANGE.fullmatch(text or "")
    if found is None:
        return None
    first, last = found.groups()
    if not first:
        return (-min(int(last), MAX_SIZE), None) if last else None
    if not last:
        return int(first), None
    return (int(first), int(last) + 1) if int(last) >= int(first) else None


def _matches(etag: str, text: str) -> bool:
    """If-None-Match: a list of tags, weak or not, or a star."""
    tags = [tag.strip().removeprefix("W/") for tag in text.split(",")]
    return "*" in tags or etag in tags


def _attachment(name: bytes) -> str:
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}"
