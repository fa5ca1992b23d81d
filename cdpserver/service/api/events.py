"""The routes of the event log: a list, and a stream of server-sent events that a client resumes where it was."""

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import trio
from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import Response, StreamingResponse

from cdpserver import names
from cdpserver.errors import RefusedError, UsageError
from cdpserver.names import At, format_time
from cdpserver.service.api import models, paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.core import Core
from cdpserver.service.feed import Batch, Feed, Filter, Place

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
        return Filter(level, event, disk, _time(since))

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
        response_class=StreamingResponse,
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
        return StreamingResponse(
            _stream(core, feed, wanted, begin, streams, stopping),
            headers={"Cache-Control": "no-store"},
            media_type="text/event-stream",
        )

    return routes


def _time(since: str | None) -> str:
    """WHEN as the events write it. They have the wall clock's time."""
    if since is None:
        return ""
    match names.parse_when(since):
        case At(time_ns):
            return format_time(time_ns)
        case names.Ago(delta_ns):
            return format_time(max(0, time.time_ns() - delta_ns))
        case _:
            raise UsageError(f"not a time: {names.show(since)}", hint="such as -1h or 2027-01-15T08:00Z")


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


async def _stream(
    core: Core, feed: Feed, wanted: Filter, batch: Batch, streams: set[object], stopping: trio.Event
) -> AsyncIterator[bytes]:
    """The text of a stream, from a first batch on."""
    streams.add(mine := object())
    try:
        yield b"retry: 1000\n\n" + _text(batch)
        heard = trio.current_time()
        while not stopping.is_set():
            batch = await core.thread(_next, feed, batch.place, wanted)
            if batch.events or batch.lost:
                yield _text(batch)
                heard = trio.current_time()
            elif trio.current_time() - heard > HEARTBEAT_S:
                yield b": \n" + _text(batch)
                heard = trio.current_time()
            if batch.at_end:
                with trio.move_on_after(LOOK_S):
                    await stopping.wait()
    finally:
        streams.discard(mine)


def _next(feed: Feed, place: Place | None, wanted: Filter) -> Batch:
    return feed.after(place, wanted, BATCH, settled=True)


def _text(batch: Batch) -> bytes:
    """Events as a stream has them; a last id without an event moves the place past what was not wanted."""
    parts = ["event: lost\ndata: {}\n\n"] if batch.lost else []
    parts += [f"id: {event['place']}\ndata: {json.dumps(event)}\n\n" for event in batch.events]
    if batch.place is not None:
        parts.append(f"id: {batch.place}\n\n")
    return "".join(parts).encode()
