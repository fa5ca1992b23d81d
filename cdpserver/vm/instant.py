"""One instant of several disks: `VM@WHEN` and `GROUP@WHEN`, resolved once for all of them. Needs files, and no service.

An instant of a VM or a group exists only where every one of its disks is good. A bookmark of theirs is one on each disk, all of
one instant: no disk has a record between the newest of the marked ones and it, so each shows its own at the time of the newest.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cdpserver import groups, names, timeline
from cdpserver.catalog import Catalog, Entry
from cdpserver.errors import CdpError, NotFoundError, RefusedError, RemovedError, UsageError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.names import Ago, At, Latest, Mark, When, format_time, format_when
from cdpserver.point import Point
from cdpserver.points import Timeline
from cdpserver.state import StateDir
from cdpserver.stretches import stretches
from cdpserver.timeline import PointBase
from cdpserver.view.history import History
from cdpserver.vm.together import around


@dataclass(frozen=True, slots=True)
class Placed:
    """What one disk shows at the instant: its record `seq`, of `time_ns`; it has `size` bytes there."""

    entry: Entry
    seq: int
    time_ns: int
    grade: Grade
    size: int
    interval: int
    evidence: dict[str, Any]

    @property
    def point(self) -> str:
        """The same as a point of the disk."""
        return f"{self.entry.name}@seq:{self.seq}"

    def as_dict(self) -> dict[str, Any]:
        """As the CLI and the API show it."""
        return {
            "disk": self.entry.name,
            "point": self.point,
            "timeline": self.entry.id,
            "seq": self.seq,
            "time_ns": self.time_ns,
            "grade": self.grade.label,
            "evidence": self.evidence,
        }


@dataclass(frozen=True, slots=True)
class Instant:
    """One instant of all disks of `name`."""

    name: str
    time_ns: int
    disks: tuple[Placed, ...]

    def as_dict(self) -> dict[str, Any]:
        """As the CLI and the API show it; the grade is that of the worst disk."""
        return {
            "name": self.name,
            "point": f"{self.name}@{format_time(self.time_ns)}",
            "time": format_time(self.time_ns),
            "time_ns": self.time_ns,
            "grade": min(disk.grade for disk in self.disks).label,
        }


def disks_of(state: StateDir, catalog: Catalog, name: str) -> list[Entry]:
    """The disks of a VM or of a group, by name. NotFoundError, RemovedError; RefusedError for a group that lacks a member."""
    names.check_name(name)
    group = groups.find(catalog, name)
    if group is None:
        return _of_vm(state, catalog, name)
    found: dict[str, Entry] = {}
    for member in group.members:
        try:
            one = catalog.get(member)
            held = [_live(one)] if one is not None else _of_vm(state, catalog, member)
        except NotFoundError:
            raise RefusedError(
                f"{member} of the group {name} is not there any more",
                hint=f"take it out: cdp group remove {name} {member}",
            ) from None
        found |= {entry.name: entry for entry in held}
    return [entry for _, entry in sorted(found.items())]


def _of_vm(state: StateDir, catalog: Catalog, vm: str) -> list[Entry]:
    """The disks named VM/DISK, but for forks of them, which are beside the VM."""
    held = {entry.id: entry for name, entry in catalog.names().items() if name.startswith(f"{vm}/")}
    found = []
    for entry in held.values():
        base = timeline.load(state.timeline(_live(entry).id)).base
        if not isinstance(base, PointBase) or base.timeline not in held:
            found.append(entry)
    if not found:
        raise NotFoundError(
            f"there is no VM, disk or group {vm}", hint="list them: cdp disk list, cdp group list"
        )
    return found


def _live(entry: Entry) -> Entry:
    if entry.state != "live":
        raise RemovedError(
            f"{entry.name} is being removed", hint=f"to end that: cdp disk remove {entry.name}"
        )
    return entry


def resolve(state: StateDir, catalog: Catalog, name: str, when: When, *, now_ns: int) -> Instant:
    """The instant that `name@when` is. UsageError or RefusedError with the nearest ones at which every disk is good."""
    with opened(state, catalog, name, now_ns=now_ns) as resolver:
        return resolver.resolve(when)


@contextlib.contextmanager
def opened(state: StateDir, catalog: Catalog, name: str, *, now_ns: int) -> Iterator["Resolver"]:
    """All disks of a VM or group, open for reading."""
    entries = disks_of(state, catalog, name)
    with contextlib.ExitStack() as stack:
        held: list[Timeline] = []
        for entry in entries:
            history = History(state.path, timeline.load(state.timeline(entry.id)))
            stack.callback(history.close)
            held.append(Timeline(history))
        yield Resolver(name, entries, held, now_ns)


class Resolver:
    """Finds instants of the disks `entries`, whose points are `held`."""

    def __init__(self, name: str, entries: Sequence[Entry], held: Sequence[Timeline], now_ns: int) -> None:
        self._name = name
        self._entries = entries
        self._held = held
        self._now_ns = now_ns

    def resolve(self, when: When) -> Instant:
        """See the function of this name."""
        match when:
            case Latest():
                return self._newest()
            case At(time_ns):
                return self._at(time_ns, when)
            case Ago(delta_ns):
                return self._at(max(0, self._now_ns - delta_ns), when)
            case Mark(mark):
                return self._marked(mark)
            case _ if len(self._held) == 1:
                return self._at(self._held[0].resolve(when, now_ns=self._now_ns).time_ns, when)
        raise UsageError(
            f"{self._name} has several disks, and {format_when(when)} is an instant of one",
            hint="name a time, -90s, latest or a bookmark of all of them",
        )

    def _newest(self) -> Instant:
        try:
            return self._place(self._now_ns)
        except CdpError:
            before, _ = self._around(self._now_ns)
            if before is None:
                raise
            return self._place(before)

    def _at(self, time_ns: int, when: When) -> Instant:
        try:
            return self._place(time_ns)
        except CdpError as error:
            raise self._nowhere(when, time_ns, error) from None

    def _place(self, time_ns: int) -> Instant:
        """What every disk shows then. RefusedError unless all are good."""
        placed = []
        for entry, points in zip(self._entries, self._held, strict=True):
            found = points.journal.settled(partial(self._placed, entry, points, time_ns))
            if found.grade == Grade.UNORDERED:
                raise RefusedError(
                    f"{entry.name} is unordered then: its mirror was not in sync",
                    hint=f"cdp point list {self._name} lists the instants at which all disks are good",
                )
            placed.append(found)
        return Instant(self._name, time_ns, tuple(placed))

    def _placed(self, entry: Entry, points: Timeline, time_ns: int) -> Placed:
        position = points.resolve(At(time_ns), now_ns=self._now_ns)
        state = points.journal.state_at(position.seq)
        return Placed(
            entry,
            position.seq,
            position.time_ns,
            state.grade,
            points.history.size_at(position.seq),
            position.interval,
            control.shown(state),
        )

    def _marked(self, mark: str) -> Instant:
        found = [self._bookmark(points, mark) for points in self._held]
        lacking = [e.name for e, point in zip(self._entries, found, strict=True) if point is None]
        if lacking:
            raise NotFoundError(
                f"{self._name} has no bookmark {mark!r} of all its disks: {', '.join(lacking)} lacks it",
                hint=f"list them: cdp point list {self._name} --kind bookmark",
            )
        marks = [point for point in found if point is not None]
        instant = self._at(max(point.time_ns for point in marks), Mark(mark))
        if [placed.seq for placed in instant.disks] != [point.seq for point in marks]:
            raise RefusedError(
                f"the bookmarks {mark} of the disks of {self._name} are of different instants",
                hint=f"name one disk: {self._entries[0].name}@{mark}",
            )
        graded = [
            replace(disk, grade=mark.grade, evidence=disk.evidence | {"frozen": mark.grade == Grade.APP})
            for disk, mark in zip(instant.disks, marks, strict=True)
        ]
        return replace(instant, disks=tuple(graded))

    def _bookmark(self, points: Timeline, mark: str) -> Point | None:
        place = None if points.journal.empty else points.bookmark(mark)
        if place is None:
            return None
        at = place.time_ns
        found = points.points(now_ns=self._now_ns, since_ns=at, until_ns=at, kind="bookmark")
        return next((point for point in found if (point.name, point.seq) == (mark, place.seq)), None)

    def _around(self, time_ns: int) -> tuple[int | None, int | None]:
        return around([stretches(points, now_ns=self._now_ns) for points in self._held], time_ns)

    def _nowhere(self, when: When, time_ns: int, error: CdpError) -> CdpError:
        before, after = self._around(time_ns)
        sides = [f"the nearest before is {format_time(before)}"] if before is not None else []
        if after is not None:
            sides.append(f"the nearest after is {format_time(after)}")
        return RefusedError(
            f"{self._name}@{format_when(when)} is no instant at which every disk is good: {error.message}",
            hint="; ".join(sides) or f"there is none yet: cdp point list {self._name}",
        )
