"""Files through time, from the state directory: the versions of one, and what differs between two points; in rows.

Threads: none.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cdpserver import names
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import NotFoundError
from cdpserver.files.browser import Browser
from cdpserver.files.differences import differences
from cdpserver.files.rows import difference_row, version_row
from cdpserver.files.versions import versions
from cdpserver.files.watched import Watched, is_unbroken
from cdpserver.held import HeldPoint, hold, open_history
from cdpserver.names import Ago, At, Seq, parse_when
from cdpserver.points import Timeline as Points
from cdpserver.state import StateDir
from cdpserver.view.delta import Ranges, changed
from cdpserver.view.view import View

Beat = Callable[[], None]


def quiet() -> None:
    """Nobody wants to know that the work goes on."""


def history(
    state: StateDir,
    disk: str,
    path: bytes,
    *,
    volume: str | None,
    since: str | None,
    until: str | None,
    remark: Callable[[str], None],
    beat: Beat = quiet,
) -> Iterator[dict[str, Any]]:
    """The versions of a file over the points in [since, until], oldest first. What is to be known of a point is said once."""
    told: set[str] = set()

    def tell(seq: int, said: str) -> None:
        if said not in told:
            told.add(said)
            remark(f"{disk}@{names.format_when(Seq(seq))}: {said}")

    now_ns = Clock.for_reading(state.clock).now_ns()
    with Catalog.open(state, writable=False) as catalog:
        line = open_history(catalog, state.path, disk)
    with contextlib.closing(line):

        @contextlib.contextmanager
        def viewed(seq: int) -> Iterator[Watched]:
            _, lease = hold(line, Seq(seq), now_ns)
            with contextlib.closing(lease), contextlib.closing(View(line, seq)) as view:
                yield Watched(view, beat)

        points = Points(line)
        since_ns = 0 if since is None else _time_ns(points, since, now_ns)
        until_ns = None if until is None else _time_ns(points, until, now_ns)
        listed = points.points(now_ns=now_ns, since_ns=since_ns, until_ns=until_ns)
        found = {point.seq: point for point in listed}
        instants = [found[seq] for seq in sorted(found)]
        if not instants:
            raise NotFoundError(f"{disk} has no points in this time", hint=f"cdp point list {disk}")
        for version in versions(line, instants, viewed, volume, path, tell):
            yield version_row(disk, version)


def _time_ns(points: Points, text: str, now_ns: int) -> int:
    match parse_when(text):
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case when:
            return points.resolve(when, now_ns=now_ns).time_ns


# --- differences


@dataclass
class Opened:
    """One of the two points."""

    browser: Browser
    disk: Watched
    volume: str
    path: bytes
    held: HeldPoint


def diff(
    state: StateDir,
    point: str,
    other: str,
    path: bytes,
    *,
    remark: Callable[[str], None],
    beat: Beat = quiet,
) -> Iterator[dict[str, Any]]:
    """What differs below a path between two points, each perhaps with its volume."""
    with _opened(state, point, path, remark, beat) as old, _opened(state, other, path, remark, beat) as new:
        yield from map(difference_row, differences(old, new, _changed(old, new)))


@contextlib.contextmanager
def _opened(
    state: StateDir, point: str, path: bytes, remark: Callable[[str], None], beat: Beat
) -> Iterator[Opened]:
    text, volume = names.split_volume(point)
    with contextlib.closing(HeldPoint(state, *names.parse_point(text))) as held:
        disk = Watched(held.view, beat)
        with Browser(disk) as browser:
            chosen = browser.choose(volume)
            for said in browser.open(chosen):
                remark(f"{point}: {said}")
            yield Opened(browser, disk, chosen, path, held)


def _changed(old: Opened, new: Opened) -> Ranges | None:
    """What the journal says of two instants of one disk, whichever is the older."""
    if old.volume != new.volume:
        return None
    first, last = sorted((old.held.view, new.held.view), key=lambda view: view.seq)
    if first.history.timeline.id != last.history.timeline.id:
        return None
    return changed(last, first) if is_unbroken(last.history, first.seq, last.seq) else None
