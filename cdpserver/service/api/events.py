"""The routes of the event log: a list, and a stream of server-sent events that a client resumes where it was."""

import functools
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import trio
from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cdpserver.errors import RefusedError
from cdpserver.service.api import models, paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.core import Core
from cdpserver.service.feed import Batch, Feed, Filter, Place, since_text

LISTED = 1000
"""Events of a list that says no number."""

LOOK_S = 0.25
"""How often a stream looks for new events; a look at none costs two system calls a file."""

HEARTBEAT_S = 10.0
"""A client that hears nothing for longer may take the connection for dead."""

BATCH = 200
"""Events that are read before they are sent: a slow client costs no more memory."""

MAX_STREAMS = 32
"""Each looks at the file four times a second."""

MOST = 10_000


def routes(core: Core, answers: Answers, stopping: trio.Event) -> APIRouter:
    """Reading the event log."""
    routes = APIRouter(tags=["events"])
    feed = Feed(core.state.events)
    streams: set[object] = set()

    def wanted(
        level: Annotated[
            str | None, Query(description="The least level: debug, info, warning, error.")
        ] = None,
        event: Annotated[str | None, Query(description="disk.added, or disk for all that begin so.")] = None,
        disk: str | None = None,
        since: Annotated[
            str | None, Query(description="An instant such as -1h or 2027-01-15T08:00Z.")
        ] = None,
    ) -> Filter:
        return Filter(level, event, disk, since_text(since))

    Wanted = Annotated[Filter, Depends(wanted)]

    @routes.get("/v1/events", response_model=list[models.Event] | models.Page[models.Event])
    async def list_events(
        wanted: Wanted,
        limit: Annotated[int, Query(ge=0, le=MOST, description="The newest so many.")] = LISTED,
        after: Annotated[str | None, Query(description="Only what follows this place.")] = None,
        page_size: PageSize = None,
        page_token: PageToken = None,
    ) -> Response:
        """Events, oldest first: the newest of them, or all in pages."""
        start = Place.parse(after) if after is not None else None
        if not paging.is_paged(page_size, page_token):
            if start is not None:
                return await answers.many(await core.thread(_all_after, feed, start, wanted, limit))
            return await answers.many((await core.thread(feed.newest, wanted, limit)).events)
        size = page_size or paging.DEFAULT_PAGE
        if (key := paging.read_token("events", page_token, str)) is not None:
            start = Place.parse(str(key[0]))
        found = await core.thread(_all_after, feed, start, wanted, size + 1)
        return await paging.answer_page(answers, "events", found, lambda event: (event["place"],), size)

    @routes.get(
        "/v1/events:stream",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def stream_events(
        wanted: Wanted,
        after: Annotated[str | None, Query(description="What follows this place.")] = None,
        newest: Annotated[int, Query(ge=0, le=MOST, description="Begin with the newest so many.")] = 0,
        last_event_id: Annotated[str | None, Header(description="As `after`; goes before it.")] = None,
    ) -> Response:
        """Events as they come (server-sent events): id is the place, data the event.

        An event of type `lost` says that what followed the place is gone. The stream ends when the service stops.
        """
        text = last_event_id or after
        place = Place.parse(text) if text else None
        if len(streams) >= MAX_STREAMS:
            raise RefusedError(f"{MAX_STREAMS} streams are open", hint="close one of them")
        begin = Batch(place=place) if place else await core.thread(feed.newest, wanted, newest)
        read = functools.partial(feed.after, wanted=wanted, count=BATCH, settled=True)
        return _Stream(begin, functools.partial(core.thread, read), streams, stopping)

    return routes


def _all_after(feed: Feed, place: Place | None, wanted: Filter, count: int) -> list[dict[str, Any]]:
    """Exactly `count` events behind a place, if there are so many."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        batch = feed.after(place, wanted, count - len(found))
        found += batch.events
        place = batch.place
        if batch.at_end:
            break
    return found


class _Stream(Response):
    """Events from a first batch on, until the client is gone or the service stops.

    Not Starlette's StreamingResponse: it cancels itself at the end, and with it what Hypercorn does about the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        begin: Batch,
        read: Callable[[Place | None], Awaitable[Batch]],
        streams: set[object],
        stopping: trio.Event,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._begin = begin
        self._read = read
        self._streams = streams
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = trio.Event()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._streams.add(self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_wait_for_stop, self._stopping, ended)
                nursery.start_soon(_wait_for_disconnect, receive, ended)
                await self._send_events(send, ended)
                nursery.cancel_scope.cancel()
        finally:
            self._streams.discard(self)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send, ended: trio.Event) -> None:
        batch, text = self._begin, b"retry: 1000\n\n" + _text(self._begin)
        heard = 0.0
        while True:
            if text:
                await send({"type": "http.response.body", "body": text, "more_body": True})
                heard = trio.current_time()
            last = ended.is_set()
            batch = await self._read(batch.place)
            quiet = not batch.events and not batch.lost
            text = b"" if quiet and trio.current_time() < heard + HEARTBEAT_S else _text(batch)
            if batch.at_end and not text:
                if last:
                    return
                with trio.move_on_after(LOOK_S):
                    await ended.wait()


async def _wait_for_stop(stopping: trio.Event, ended: trio.Event) -> None:
    await stopping.wait()
    ended.set()


async def _wait_for_disconnect(receive: Receive, ended: trio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    ended.set()


def _text(batch: Batch) -> bytes:
    """Events as a stream has them; a last id without an event moves the place past what was not wanted."""
    parts = ["event: lost\ndata: {}\n\n"] if batch.lost else []
    parts += [f"id: {event['place']}\ndata: {json.dumps(event)}\n\n" for event in batch.events]
    if batch.place is not None:
        parts.append(f"id: {batch.place}\n\n")
    return "".join(parts).encode()
