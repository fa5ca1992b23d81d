"""Points of VMs and groups: instants at which all their disks are good."""

import contextlib
from typing import Any

from cdpserver import groups, names
from cdpserver.catalog import Entry
from cdpserver.errors import CdpError, UsageError
from cdpserver.names import Ago, At, When
from cdpserver.point import Point
from cdpserver.points import Timeline as Points
from cdpserver.service.core import Core
from cdpserver.stretches import stretches
from cdpserver.vm import instant
from cdpserver.vm.instant import Instant
from cdpserver.vm.together import CommonPoint, Member, common_points
from cdpserver.vm.trial import record as trials
from cdpserver.vm.trial.record import Trial

SECOND_NS = 1_000_000_000


def _newest_drill(point: CommonPoint, drills: list[Trial], slot_ns: int) -> dict[str, Any] | None:
    """What came of the newest drill at a point: at just that instant, or in the slot that a recovery point ends."""
    start_ns = point.time_ns if point.name else point.time_ns - point.time_ns % slot_ns
    for one in reversed(drills):
        if start_ns <= one.time_ns <= point.time_ns:
            return one.brief()
    return None


class Vms:
    """The VMs and groups of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def several(self, name: str) -> bool:
        """Is it a VM or a group, and no disk? For threads."""
        return groups.is_several(self._core.catalog, name)

    def disks(self, name: str) -> list[Entry]:
        """The disks of a VM or group, by name. NotFoundError, RemovedError, RefusedError. For threads."""
        return instant.disks_of(self._core.state, self._core.catalog, name)

    def resolve(self, name: str, when: When) -> Instant:
        """The one instant of all disks that `name@when` is. For threads."""
        core = self._core
        return instant.resolve(core.state, core.catalog, name, when, now_ns=core.clock.now_ns())

    async def durable(self, found: Instant) -> None:
        """On return the instant survives a power loss, but for disks whose writer is broken, which is said."""
        for disk in found.disks:
            try:
                await self._core.make_durable(disk.entry, disk.seq)
            except CdpError as error:
                self._core.log.emit("point.not-durable", level="warning", point=disk.point, reason=str(error))

    async def uris(self, name: str, when: When, *, secret: bool) -> dict[str, Any]:
        """Where each disk is read at the instant; absolute URIs, with `secret` as they open over TCP."""
        core = self._core
        found = await core.thread(self.resolve, name, when)
        await self.durable(found)
        disks = []
        for disk in found.disks:
            told = await core.thread(core.secret, disk.entry) if secret else ""
            disks.append(disk.as_dict() | core.point_uris(disk.entry.name, disk.seq, secret=told))
        return found.as_dict() | {"disks": disks}

    async def show(self, name: str, when: When) -> dict[str, Any]:
        """The instant, and what each disk's grade rests on."""
        found = await self._core.thread(self.resolve, name, when)
        return found.as_dict() | {"disks": [disk.as_dict() for disk in found.disks]}

    async def points(
        self, name: str, *, since: str | None, until: str | None, kind: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        """Instants in [since, until] at which every disk of a VM or group is good, oldest first; with `limit` the
        newest of them.
        """
        if limit is not None and limit < 0:
            raise UsageError(f"not a number of points: {limit}", hint="ask for 1 or more")
        if kind not in (None, "rp", "bookmark"):
            raise UsageError(
                f"{name} has no {kind} of its own", hint="list those of its disks: cdp disk list"
            )
        found = await self._core.thread(self._points, name, since, until, kind)
        return found if limit is None else found[max(0, len(found) - limit) :]

    def _points(
        self, name: str, since: str | None, until: str | None, kind: str | None
    ) -> list[dict[str, Any]]:
        now_ns = self._core.clock.now_ns()
        since_ns = 0 if since is None else self._time(name, since, now_ns)
        until_ns = now_ns if until is None else self._time(name, until, now_ns)
        entries = self.disks(name)
        every_ns = max(self._core.rp_every_ns(entry) for entry in entries)
        slot_ns = -(-every_ns // SECOND_NS) * SECOND_NS
        # Slots are looked at whole, as those of a disk are.
        first_ns, end_ns = since_ns // slot_ns * slot_ns, (until_ns // slot_ns + 1) * slot_ns
        held = [self._held(entry, first_ns, end_ns, now_ns) for entry in entries]
        found: list[CommonPoint] = []
        if kind in (None, "rp"):
            found += common_points([member for member, _ in held], slot_ns=slot_ns, now_ns=now_ns)
        if kind in (None, "bookmark"):
            found += self._bookmarks(name, [marks for _, marks in held])
        found.sort(key=lambda point: (point.time_ns, point.name or ""))
        drills = [
            one
            for one in trials.all_of(self._core.catalog)
            if one.kind == "drill" and one.subject == name and first_ns <= one.time_ns < end_ns
        ]
        return [
            point.as_dict() | {"drill": _newest_drill(point, drills, slot_ns)}
            for point in found
            if since_ns <= point.time_ns <= until_ns
        ]

    def _held(
        self, entry: Entry, since_ns: int, until_ns: int, now_ns: int
    ) -> tuple[Member, dict[str, Point]]:
        """What one disk has in the range: recovery points, and bookmarks by name."""

        def look(points: Points) -> tuple[Member, dict[str, Point]]:
            found = points.points(now_ns=now_ns, since_ns=since_ns, until_ns=until_ns)
            member = Member(
                entry.name, [p for p in found if p.kind == "rp"], stretches(points, now_ns=now_ns)
            )
            return member, {str(p.name): p for p in found if p.kind == "bookmark"}

        return self._core.look(entry, look)

    def _bookmarks(self, name: str, held: list[dict[str, Point]]) -> list[CommonPoint]:
        """Bookmarks that all disks have, of one instant. Those that are of several are no points of the VM."""
        core, found = self._core, []
        common = sorted(set.intersection(*(set(marks) for marks in held)))
        if not common:
            return []
        with instant.opened(core.state, core.catalog, name, now_ns=core.clock.now_ns()) as resolver:
            for mark in common:
                with contextlib.suppress(CdpError):
                    at = resolver.resolve(names.Mark(mark))
                    grades = {disk.entry.name: disk.grade for disk in at.disks}
                    evidence = {disk.entry.name: disk.evidence for disk in at.disks}
                    found.append(CommonPoint(at.time_ns, 0, 0, grades, evidence, mark))
        return found

    def _time(self, name: str, text: str, now_ns: int) -> int:
        match names.parse_when(text):
            case At(time_ns):
                return time_ns
            case Ago(delta_ns):
                return max(0, now_ns - delta_ns)
            case names.Latest():
                return now_ns
            case when:
                return self.resolve(name, when).time_ns
