"""How late it is for a repository whose place has no clock of its own: time that was lived through, not what a clock says.

Within a boot it is counted by the kernel's monotonic clock. Between the visits of two boots, or of two machines, the wall
clock is believed, but for a week at most: a clock that is years ahead ends no immutable period, and one that was put back
makes nothing young again. A repository that nobody visits for longer than a week keeps what is immutable for longer than it
was told to, never for less.

`clock/now` holds the newest visit: JSON with the fields of Visit. Lost, the newest backup says how late it was at least.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from cdpserver.clock import boot_id
from cdpserver.repository.place import Place
from cdpserver.retention.slots import DAY_NS

NAME = "clock/now"

MOST_UNSEEN_NS = 7 * DAY_NS
"""A schedule visits each day. Nothing is immutable for so short that this would end it."""


@dataclass(frozen=True, slots=True)
class Visit:
    """`time_ns` is how late it was; the rest is what clocks said then."""

    time_ns: int
    wall_ns: int
    boot: str
    up_ns: int


def first(floor_ns: int, *, wall_ns: int, boot: str, up_ns: int) -> Visit:
    """A visit before which none is known; it was `floor_ns` already. Pure."""
    return Visit(floor_ns or wall_ns, wall_ns, boot, up_ns)


def after(last: Visit, *, wall_ns: int, boot: str, up_ns: int) -> Visit:
    """The next visit. Pure."""
    if last.boot == boot and up_ns >= last.up_ns:
        now_ns = last.time_ns + up_ns - last.up_ns
    else:
        now_ns = last.time_ns + min(max(wall_ns - last.wall_ns, 0), MOST_UNSEEN_NS)
    return Visit(now_ns, wall_ns, boot, up_ns)


def visit(place: Place, floor: Callable[[], int]) -> int:
    """How late it is; noted. `floor` says how late it was at least, or 0; it is asked where no visit is noted."""
    last = _last(place)
    wall_ns, boot, up_ns = time.time_ns(), boot_id(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if last is None:
        now = first(floor(), wall_ns=wall_ns, boot=boot, up_ns=up_ns)
    else:
        now = after(last, wall_ns=wall_ns, boot=boot, up_ns=up_ns)
    place.put(NAME, json.dumps(asdict(now)).encode() + b"\n")
    return now.time_ns


def _last(place: Place) -> Visit | None:
    try:
        value = json.loads(place.get(NAME))
        found = Visit(**value)
        whole = (found.time_ns, found.wall_ns, found.up_ns)
        return found if all(type(number) is int for number in whole) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
