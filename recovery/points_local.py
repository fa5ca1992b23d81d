"""Points from the state directory itself, where no service answers: from a copy or read-only media, too."""

import contextlib
import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from cdpserver import names
from cdpserver.errors import CdpError, UnreachableError
from cdpserver.names import Ago, At
from cdpserver.state import StateDir, default_state_dir
from recovery.output import say

if TYPE_CHECKING:
    from cdpserver.view.history import History

SECOND_NS = 1_000_000_000


def _state(options: Namespace, error: UnreachableError) -> StateDir:
    """The state directory, if it may be read; else what the client said."""
    try:
        state = StateDir.open(default_state_dir(options.state_dir))
    except CdpError:
        raise error from None
    if not os.access(state.timelines, os.R_OK | os.X_OK):
        raise error
    say(f"{error.message}: reading {state.path} without it")
    return state


def listing(options: Namespace, error: UnreachableError, **span: Any) -> list[dict[str, Any]]:
    """The points of a disk, as the service lists them, but for drills."""
    from cdpserver.catalog import Catalog
    from cdpserver.config import Config
    from cdpserver.held import open_history
    from cdpserver.locks import locked_seqs
    from cdpserver.points import Timeline
    from cdpserver.retention import policies

    state = _state(options, error)
    with Catalog.open(state, writable=False) as catalog:
        history = open_history(catalog, state.path, options.disk)
        with contextlib.closing(history):
            now_ns = _now_ns(state, history)
            entry = catalog.by_id(history.timeline.id)
            assert entry is not None
            every_ns = policies.effective(catalog, Config(), entry).policy.rp_every_ns
            points = Timeline(history)
            found = points.points(
                now_ns=now_ns,
                since_ns=_time_ns(points, span["since"], now_ns) or 0,
                until_ns=_time_ns(points, span["until"], now_ns),
                kind=span["kind"],
                limit=span["limit"],
                every_ns=every_ns,
            )
            locked = locked_seqs(catalog, entry.id, now_ns=now_ns)
    return [point.as_dict() | {"locked": point.seq in locked, "drill": None} for point in found]


def show(options: Namespace, error: UnreachableError) -> dict[str, Any]:
    """One instant of a disk and its grade."""
    from cdpserver.catalog import Catalog
    from cdpserver.held import open_history
    from cdpserver.points import Timeline

    state = _state(options, error)
    disk, when = names.parse_point(options.point)
    with Catalog.open(state, writable=False) as catalog:
        history = open_history(catalog, state.path, disk)
    with contextlib.closing(history):
        points, now_ns = Timeline(history), _now_ns(state, history)
        place = points.resolve(when, now_ns=now_ns)
        listed = points.points(now_ns=now_ns, since_ns=place.time_ns, until_ns=place.time_ns)
        named = [point for point in listed if point.seq == place.seq and point.name is not None]
        grade = max([points.grade_at(place), *(point.grade for point in named)])
    return {
        "name": disk,
        "point": f"{disk}@seq:{place.seq}",
        "time": names.format_time(place.time_ns),
        "time_ns": place.time_ns,
        "seq": place.seq,
        "grade": grade.label,
    }


def uri(options: Namespace, error: UnreachableError) -> dict[str, Any]:
    """The URI of an export made for it, which ends with its last client."""
    from recovery.opened import PATIENCE_S, serve_once

    state = _state(options, error)
    whole, volume = names.split_volume(options.point)
    found = serve_once(state, whole, volume)
    say(f"it is served until its last client has gone, and for {PATIENCE_S} s before the first comes")
    return {"uri": found.uri, "timeline": found.timeline, "seq": found.seq, "time_ns": found.time_ns}


def _now_ns(state: StateDir, history: "History") -> int:
    """Now, and never before the newest record: its clock may have been ahead of this host's."""
    from cdpserver.clock import Clock

    newest_ns = 0 if history.journal.empty else history.journal.last().time_ns
    return max(Clock.for_reading(state.clock).now_ns(), newest_ns + SECOND_NS)


def _time_ns(points: Any, text: str | None, now_ns: int) -> int | None:
    match None if text is None else names.parse_when(text):
        case None:
            return None
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case when:
            return int(points.resolve(when, now_ns=now_ns).time_ns)
