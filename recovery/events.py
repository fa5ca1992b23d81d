"""`cdp event`: what happened, from the event log; and what happens from now on."""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from cdpserver.errors import UnreachableError
from recovery.client import Client
from recovery.output import answer, answer_json, printable, say, show
from recovery.remote import client

HEAD = ("time", "level", "process", "event", "place")

RECONNECT_S = 0.5
PATIENCE_S = 60.0
"""A service that is restarted is back by then."""


def event_list(options: Namespace) -> None:
    """The newest events, oldest of them first; with --follow those that come, until it is interrupted."""
    query = {
        "level": options.level,
        "disk": options.disk,
        "event": options.event,
        "since": options.since,
    }
    service = client(options)
    if options.follow:
        for event in _follow(service, query | {"newest": options.limit}):
            print(json.dumps(event) if options.json else _line(event), flush=True)
        return
    events = service.events(query | {"limit": options.limit})
    if options.json:
        answer_json(events)
        return
    for event in events:
        answer(_line(event))
    if not events:
        say("no such events")


def _line(event: dict[str, Any]) -> str:
    more = (f"{key}={show(value)}" for key, value in event.items() if key not in HEAD)
    head = (event.get("time"), str(event.get("level", "")).ljust(7), event.get("event"))
    return printable(" ".join([*map(str, head), *more]))


def _follow(service: Client, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events for ever: a service that stops is waited for, and nothing that happens meanwhile is left out."""
    given_up = time.monotonic() + PATIENCE_S
    place = None
    while True:
        try:
            for event in service.follow(query | {"after": place}):
                place = event.get("place", place)
                given_up = time.monotonic() + PATIENCE_S
                yield event
            given_up = time.monotonic() + PATIENCE_S
        except UnreachableError:
            if place is None or time.monotonic() > given_up:
                raise
        time.sleep(RECONNECT_S)
