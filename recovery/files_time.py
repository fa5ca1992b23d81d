"""`cdp file history` and `cdp file diff`: files through time, read from the state directory."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cdpserver import names
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import NotFoundError
from cdpserver.files.browser import Browser
from cdpserver.files.differences import differences
from cdpserver.files.versions import Version, versions
from cdpserver.files.watched import Watched, is_unbroken
from cdpserver.held import HeldPoint, hold, open_history
from cdpserver.names import Ago, At, Seq, parse_when
from cdpserver.points import Timeline as Points
from cdpserver.state import StateDir, default_state_dir
from cdpserver.view.delta import Ranges, changed
from cdpserver.view.view import View
from recovery.files import row, shown_path
from recovery.output import Column, answer_json_items, answer_table, say

HISTORY_COLUMNS = (
    Column("time_ns", "from"),
    Column("point"),
    Column("changes_text", "what changed"),
    Column("size", right=True),
    Column("mtime_ns_text", "modified"),
    Column("digest_text", "digest"),
)
DIFF_COLUMNS = (Column("change"), Column("fields_text", "what"), Column("shown", "name"))


# --- history


def history(options: Namespace) -> None:
    """The versions of a file."""
    found = _versions(options)
    if options.json:
        answer_json_items(_version(options.disk, version) for version in found)
        return
    rows = [_version(options.disk, version) for version in found]
    for known in rows:
        known["changes_text"] = ", ".join(known["changes"]) + (f": {known['why']}" if known["why"] else "")
        known["mtime_ns_text"] = (
            "" if known["mtime_ns"] is None else names.format_time(max(known["mtime_ns"], 0))
        )
        known["digest_text"] = (known["digest"] or "")[:12]
    answer_table(HISTORY_COLUMNS, rows, nothing="the file is in none of these points")
    if rows:
        say("one of them: cdp file get POINT FILE --output DIR")


def _versions(options: Namespace) -> Iterator[Version]:
    state = StateDir.open(default_state_dir(options.state_dir))
    now_ns = Clock.load(state.clock).now_ns()
    with Catalog.open(state, writable=False) as catalog:
        line = open_history(catalog, state.path, options.disk)
    with contextlib.closing(line):

        @contextlib.contextmanager
        def viewed(seq: int) -> Iterator[View]:
            _, lease = hold(line, Seq(seq), now_ns)
            with contextlib.closing(lease), contextlib.closing(View(line, seq)) as view:
                yield view

        points = Points(line)
        since_ns = 0 if options.since is None else _time_ns(points, options.since, now_ns)
        until_ns = None if options.until is None else _time_ns(points, options.until, now_ns)
        found = {
            point.seq: point for point in points.points(now_ns=now_ns, since_ns=since_ns, until_ns=until_ns)
        }
        instants = [found[seq] for seq in sorted(found)]
        if not instants:
            raise NotFoundError(
                f"{options.disk} has no points in this time", hint=f"cdp point list {options.disk}"
            )
        yield from versions(line, instants, viewed, options.volume, os.fsencode(options.path))


def _time_ns(points: Points, text: str, now_ns: int) -> int:
    match parse_when(text):
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case when:
            return points.resolve(when, now_ns=now_ns).time_ns


def _version(disk: str, version: Version) -> dict[str, Any]:
    known: dict[str, Any] = dict.fromkeys(("type", "size", "mtime_ns", "mode", "uid", "gid", "target"))
    if version.file is not None:
        known |= {key: value for key, value in row(version.file).items() if key not in ("name", "name_hex")}
    return {
        "point": f"{disk}@seq:{version.first.seq}",
        "time_ns": version.first.time_ns,
        "last_point": f"{disk}@seq:{version.last.seq}",
        "last_time_ns": version.last.time_ns,
        "changes": list(version.changes),
        **known,
        "digest": version.digest,
        "why": version.why,
    }


# --- differences


@dataclass
class Opened:
    """One of the two points."""

    browser: Browser
    disk: Watched
    volume: str
    path: bytes
    held: HeldPoint


def diff(options: Namespace) -> None:
    """What differs between two points."""
    with _opened(options, options.point) as old, _opened(options, options.other) as new:
        found = (
            {
                "name": b"/".join(one.path).decode(errors="replace") or "/",
                "change": one.change,
                "fields": list(one.fields),
                "before": None if one.before is None else row(one.before),
                "after": None if one.after is None else row(one.after),
                "shown": shown_path(one.path),
                "fields_text": ", ".join(one.fields),
            }
            for one in differences(old, new, _changed(old, new))
        )
        if options.json:
            answer_json_items(
                {k: v for k, v in one.items() if k not in ("shown", "fields_text")} for one in found
            )
        else:
            answer_table(DIFF_COLUMNS, list(found), nothing="nothing differs")


@contextlib.contextmanager
def _opened(options: Namespace, point: str) -> Iterator[Opened]:
    text, volume = names.split_volume(point)
    held = HeldPoint(StateDir.open(default_state_dir(options.state_dir)), *names.parse_point(text))
    with contextlib.closing(held):
        disk = Watched(held.view)
        with Browser(disk) as browser:
            chosen = browser.choose(volume)
            for remark in browser.open(chosen):
                say(f"{point}: {remark}")
            yield Opened(browser, disk, chosen, os.fsencode(options.path), held)


def _changed(old: Opened, new: Opened) -> Ranges | None:
    """What the journal says of two instants of one disk, whichever is the older."""
    if old.volume != new.volume:
        return None
    first, last = sorted((old.held.view, new.held.view), key=lambda view: view.seq)
    if first.history.timeline.id != last.history.timeline.id:
        return None
    return changed(last, first) if is_unbroken(last.history, first.seq, last.seq) else None
