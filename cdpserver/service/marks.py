"""Bookmarks of VMs and groups: of all their disks, at one instant.

    T := now ──► every writer is asked ──► what each disk shows at T is final ──► a mark on each, which names it

A writer answers under the lock under which it gives records their time, so after its answer none with a time up to T will come.
The marks follow later and name what was found, so that nobody has to stand still for them.
"""

from typing import Any

import trio

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.errors import CdpError, RefusedError, UnreachableError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.names import At
from cdpserver.service.core import Core
from cdpserver.service.instants import Instants
from cdpserver.service.vms import Vms
from cdpserver.vm.instant import Instant, Placed
from cdpserver.vm.together import CommonPoint

SETTLE_S = 3.0
"""How long the writers may take to answer; a guest may be frozen meanwhile."""


class Marks:
    """Sets the bookmarks of a state directory."""

    def __init__(self, core: Core, instants: Instants) -> None:
        self._core = core
        self._instants = instants
        self._vms = Vms(core)
        self._locks: dict[str, trio.Lock] = {}

    async def mark(self, name: str, bookmark: str) -> dict[str, Any]:
        """Set a bookmark, durable on return. RefusedError if a disk has one of this name, or is not good now."""
        names.check_bookmark(bookmark)
        if not await self._core.thread(self._vms.several, name):
            return await self._instants.mark(name, bookmark)
        async with self._locks.setdefault(name, trio.Lock()):
            entries = await self._core.thread(self._vms.disks, name)
            await self._core.thread(self._check_new, entries, bookmark)
            at = At(await self._settled(entries))
            found = await self._core.thread(self._vms.resolve, name, at)
            for disk in found.disks:
                await self._put(disk, bookmark)
        self._core.log.emit("point.marked", disk=name, bookmark=bookmark, time_ns=found.time_ns)
        return self._shown(found, bookmark)

    def _check_new(self, entries: list[Entry], bookmark: str) -> None:
        for entry in entries:
            with self._core.points(entry) as points:
                if not points.journal.empty and points.bookmark(bookmark) is not None:
                    raise RefusedError(
                        f"{entry.name} has a bookmark {bookmark} already",
                        hint="choose another name for this one",
                    )

    async def _settled(self, entries: list[Entry]) -> int:
        """A time up to which every record of the disks is in its journal. UnreachableError if a worker does not answer."""
        time_ns = self._core.clock.now_ns()
        failed: list[CdpError] = []

        async def ask(entry: Entry) -> None:
            try:
                await self._core.target_status(entry)
            except CdpError as error:
                failed.append(error)

        with trio.move_on_after(SETTLE_S) as scope:
            async with trio.open_nursery() as nursery:
                for entry in entries:
                    nursery.start_soon(ask, entry)
        if scope.cancelled_caught:
            failed.append(UnreachableError("a worker does not answer", hint="cdp status says which"))
        if failed:
            raise failed[0]
        return time_ns

    async def _put(self, disk: Placed, bookmark: str, grade: Grade | None = None) -> None:
        message = control.mark(bookmark, at=(disk.seq, disk.time_ns), grade=grade or disk.grade)
        await self._core.targets.call(
            disk.entry.id, "mark", disk=disk.entry.name, message=message, interval=disk.interval
        )

    def _shown(self, found: Instant, bookmark: str) -> dict[str, Any]:
        grades = {disk.entry.name: disk.grade for disk in found.disks}
        return CommonPoint(found.time_ns, 0, 0, grades, bookmark).as_dict() | {"of": found.name}
