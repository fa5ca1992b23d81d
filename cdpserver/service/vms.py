"""Points of VMs. A VM is the disks named VM/DISK, but for forks of its own disks, which are beside it."""

from typing import Any

from cdpserver import names, timeline
from cdpserver.catalog import Entry
from cdpserver.errors import NotFoundError, UsageError
from cdpserver.names import Ago, At
from cdpserver.service.core import Core
from cdpserver.stretches import stretches
from cdpserver.timeline import PointBase
from cdpserver.vm.together import Member, common_points

SECOND_NS = 1_000_000_000


class Vms:
    """The VMs of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def points(
        self, vm: str, *, since: str | None, until: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        """Instants in [since, until] at which every disk of a VM is good, oldest first; with `limit` the newest of them."""
        if limit is not None and limit < 0:
            raise UsageError(f"not a number of points: {limit}", hint="ask for 1 or more")
        return await self._core.thread(self._points, vm, since, until, limit)

    def _points(
        self, vm: str, since: str | None, until: str | None, limit: int | None
    ) -> list[dict[str, Any]]:
        now_ns = self._core.clock.now_ns()
        since_ns = 0 if since is None else _time(since, now_ns)
        until_ns = now_ns if until is None else _time(until, now_ns)
        entries = self.disks(vm)
        every_ns = max(self._core.rp_every_ns(entry) for entry in entries)
        slot_ns = -(-every_ns // SECOND_NS) * SECOND_NS
        # Slots are looked at whole, as those of a disk are.
        first_ns, end_ns = since_ns // slot_ns * slot_ns, (until_ns // slot_ns + 1) * slot_ns
        members = [self._member(entry, first_ns, end_ns, now_ns) for entry in entries]
        found = common_points(members, slot_ns=slot_ns, now_ns=now_ns)
        shown = [point.as_dict() for point in found if since_ns <= point.time_ns <= until_ns]
        return shown if limit is None else shown[max(0, len(shown) - limit) :]

    def _member(self, entry: Entry, since_ns: int, until_ns: int, now_ns: int) -> Member:
        with self._core.points(entry) as points:
            held = points.points(now_ns=now_ns, since_ns=since_ns, until_ns=until_ns, kind="rp")
            return Member(entry.name, held, stretches(points, now_ns=now_ns))

    def disks(self, vm: str) -> list[Entry]:
        """The disks of a VM, by name. NotFoundError, RemovedError. For threads."""
        prefix = f"{names.check_name(vm)}/"
        entries = self._core.catalog.names()
        held = {entry.id: entry for name, entry in entries.items() if name.startswith(prefix)}
        found = []
        for entry in held.values():
            self._core.entry(entry.name)
            base = timeline.load(self._core.state.timeline(entry.id)).base
            if not isinstance(base, PointBase) or base.timeline not in held:
                found.append(entry)
        if not found:
            raise NotFoundError(f"there is no VM {vm}", hint="list the disks, VM/DISK: cdp disk list")
        return found


def _time(text: str, now_ns: int) -> int:
    match names.parse_when(text):
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case names.Latest():
            return now_ns
        case _:
            raise UsageError(
                f"{names.show(text)} is an instant of one disk",
                hint="for a VM write a time or how long ago: -10m",
            )
