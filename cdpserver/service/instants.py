"""What an operator asks about instants: points, bookmarks, and where one is read."""

from typing import Any

import trio

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.errors import CdpError, RefusedError, UsageError
from cdpserver.journal import control
from cdpserver.journal.control import Grade, State
from cdpserver.journal.log import Position
from cdpserver.locks import locked_seqs
from cdpserver.names import At
from cdpserver.point import KINDS, Point
from cdpserver.points import Timeline as Points
from cdpserver.service.core import Core
from cdpserver.service.vms import Vms
from cdpserver.vm.trial import record as trials
from cdpserver.vm.trial.record import Trial, drilled

SECOND_NS = 1_000_000_000


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise UsageError(f"not a kind of point: {names.show(kind)}", hint=f"kinds are {', '.join(KINDS)}")


def _key(point: Point) -> tuple[int, int]:
    """What points are ordered by."""
    return point.seq, KINDS.index(point.kind)


def _newest_drill(point: Point, drills: list[tuple[int, Trial]], every_ns: int) -> dict[str, Any] | None:
    """What came of the newest drill of a point: of just that instant, or of one in the slot that a recovery point ends."""
    slot = (point.time_ns - point.time_ns % every_ns, point.time_ns)
    for seq, one in reversed(drills):
        if seq == point.seq or (
            point.kind == "rp" and seq <= point.seq and slot[0] <= one.time_ns <= slot[1]
        ):
            return one.brief()
    return None


class Instants:
    """Points of the disks and forks of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._vms = Vms(core)
        self._marking = trio.Lock()

    async def points(
        self, name: str, *, since: str | None, until: str | None, kind: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        """Points of a disk, VM or group in [since, until], oldest first; with `limit` the newest of them."""
        _check_kind(kind)
        if await self._core.thread(self._vms.several, name):
            return await self._vms.points(name, since=since, until=until, kind=kind, limit=limit)
        if limit is not None and limit < 0:
            raise UsageError(f"not a number of points: {limit}", hint="ask for 1 or more")
        entry = self._core.entry(name)
        return await self._core.thread(self._points, entry, since, until, kind, limit)

    async def points_after(
        self,
        name: str,
        after: tuple[int, int, int] | None,
        *,
        since: str | None,
        until: str | None,
        kind: str | None,
        count: int,
    ) -> list[dict[str, Any]]:
        """The first `count` points of a disk in [since, until] that follow (time_ns, seq, number of the kind)."""
        _check_kind(kind)
        return await self._core.thread(
            self._points_after, self._core.entry(name), after, since, until, kind, count
        )

    def _points_after(
        self,
        entry: Entry,
        after: tuple[int, int, int] | None,
        since: str | None,
        until: str | None,
        kind: str | None,
        count: int,
    ) -> list[dict[str, Any]]:
        now_ns = self._core.clock.now_ns()
        end_ns = self._time(entry, until, now_ns) if until is not None else now_ns
        start_ns = max(self._time(entry, since, now_ns) if since is not None else 0, after[0] if after else 0)
        every_ns = self._core.rp_every_ns(entry)

        def look(points: Points) -> list[Point]:
            found: list[Point] = []
            if points.journal.empty:
                return found
            # A second has one recovery point: a window of as many seconds as points are wanted is never far too large.
            at_ns, width_ns = max(start_ns, points.journal.first().time_ns), count * SECOND_NS
            while len(found) < count and at_ns <= end_ns:
                stop_ns = min(at_ns + width_ns, end_ns)
                window = points.points(
                    now_ns=now_ns, since_ns=at_ns, until_ns=stop_ns, kind=kind, every_ns=every_ns
                )
                found += [point for point in window if after is None or _key(point) > after[1:]]
                at_ns, width_ns = stop_ns + 1, 2 * width_ns
            return found[:count]

        return self._shown(entry, self._core.look(entry, look), now_ns)

    def _shown(self, entry: Entry, found: list[Point], now_ns: int) -> list[dict[str, Any]]:
        locked = locked_seqs(self._core.catalog, entry.id, now_ns=now_ns)
        drills = drilled(trials.all_of(self._core.catalog), entry.id)
        every_ns = self._core.rp_every_ns(entry)
        return [
            point.as_dict() | {"locked": point.seq in locked, "drill": _newest_drill(point, drills, every_ns)}
            for point in found
        ]

    def _points(
        self, entry: Entry, since: str | None, until: str | None, kind: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        now_ns = self._core.clock.now_ns()
        since_ns = self._time(entry, since, now_ns) if since is not None else 0
        until_ns = self._time(entry, until, now_ns) if until is not None else None
        every_ns = self._core.rp_every_ns(entry)

        def look(points: Points) -> list[Point]:
            return points.points(
                now_ns=now_ns, since_ns=since_ns, until_ns=until_ns, kind=kind, limit=limit, every_ns=every_ns
            )

        return self._shown(entry, self._core.look(entry, look), now_ns)

    def _time(self, entry: Entry, text: str, now_ns: int) -> int:
        """The time that WHEN means as the end of a range: an instant before the history is a good one."""
        match names.parse_when(text):
            case At(time_ns):
                return time_ns
            case names.Ago(delta_ns):
                return max(0, now_ns - delta_ns)
            case when:
                return self._core.resolve(entry, when)[0].time_ns

    async def mark(self, name: str, bookmark: str) -> dict[str, Any]:
        """Set a bookmark, durable on return. RefusedError if the disk has one of this name."""
        names.check_bookmark(bookmark)
        entry = self._core.entry(name)
        async with self._marking:
            if await self._core.thread(self._core.has_bookmark, entry, bookmark):
                raise RefusedError(
                    f"{name} has a bookmark {bookmark} already", hint="choose another name for this one"
                )
            message = control.mark(bookmark)
            seq, time_ns = await self._core.targets.call(entry.id, "mark", disk=name, message=message)
        self._core.log.emit("point.marked", disk=name, bookmark=bookmark, seq=seq)
        return await self._core.thread(self._bookmark, entry, bookmark, time_ns)

    def _bookmark(self, entry: Entry, bookmark: str, time_ns: int) -> dict[str, Any]:
        now_ns = max(self._core.clock.now_ns(), time_ns)

        def look(points: Points) -> list[Point]:
            return points.points(now_ns=now_ns, since_ns=time_ns, until_ns=time_ns, kind="bookmark")

        return next(point.as_dict() for point in self._core.look(entry, look) if point.name == bookmark)

    async def uri(self, point: str, *, secret: bool) -> dict[str, Any]:
        """Where `DISK@WHEN`, or a volume of it, is read: an absolute URI; of a VM or group that of each disk.

        `secret`: with what opens it over TCP. The instant is durable on return, unless a disk's writer is broken.
        """
        whole, volume = names.split_volume(point)
        disk, when = names.parse_point(whole)
        if volume is None and await self._core.thread(self._vms.several, disk):
            return await self._vms.uris(disk, when, secret=secret)
        entry = self._core.entry(disk)
        position, _ = await self._core.thread(self._core.resolve, entry, when)
        try:
            await self._core.make_durable(entry, position.seq)
        except CdpError as error:
            # Reading what is there must work above all when writing doesn't.
            self._core.log.emit("point.not-durable", level="warning", point=point, reason=str(error))
        told = await self._core.thread(self._core.secret, entry) if secret else ""
        uris = self._core.point_uris(disk, position.seq, volume, secret=told)
        return {**uris, "timeline": entry.id, "seq": position.seq, "time_ns": position.time_ns}

    async def show(self, point: str) -> dict[str, Any]:
        """One instant of a disk, VM or group: its grade, and what that rests on."""
        disk, when = names.parse_point(point)
        if await self._core.thread(self._vms.several, disk):
            return await self._vms.show(disk, when)
        return await self._core.thread(self._show, self._core.entry(disk), when)

    def _show(self, entry: Entry, when: names.When) -> dict[str, Any]:
        now_ns = self._core.clock.now_ns()

        def look(points: Points) -> tuple[Position, State, Grade, list[Point]]:
            place = points.resolve(when, now_ns=now_ns)
            state, held = points.journal.state_at(place.seq), points.grade_at(place)
            listed = points.points(now_ns=now_ns, since_ns=place.time_ns, until_ns=place.time_ns)
            named = [point for point in listed if point.seq == place.seq and point.name is not None]
            return place, state, max([held, *(point.grade for point in named)]), named

        place, state, grade, named = self._core.look(entry, look)
        return {
            "name": entry.name,
            "point": f"{entry.name}@seq:{place.seq}",
            "time": names.format_time(place.time_ns),
            "time_ns": place.time_ns,
            "seq": place.seq,
            "grade": grade.label,
            "evidence": control.shown(state, frozen=grade == Grade.APP),
            "names": [point.name for point in named],
            "locked": place.seq in locked_seqs(self._core.catalog, entry.id, now_ns=now_ns),
        }
