"""Bookmarks of VMs and groups: of all their disks, at one instant; with their guests frozen if that is asked.

    guests frozen ──► T := now ──► every writer is asked ──► thawed ──► each mirror is seen whole after T ──► a mark on each disk

A writer answers under the lock under which it gives records their time, so after its answer none with a time up to T will come.
The marks follow later and name what was found, so that no guest has to stand still for them.
"""

from dataclasses import dataclass, field
from typing import Any

import trio

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.errors import CdpError, RefusedError, UnreachableError, UsageError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.names import At
from cdpserver.service import hooks
from cdpserver.service.core import Core
from cdpserver.service.freezer import Freezer
from cdpserver.service.instants import Instants
from cdpserver.service.protection import Protection
from cdpserver.service.vms import Vms
from cdpserver.vm import record
from cdpserver.vm.frozen import Frozen
from cdpserver.vm.instant import Instant, Placed
from cdpserver.vm.record import ProtectedVm
from cdpserver.vm.together import CommonPoint

SETTLE_S = 3.0
"""How long the writers may take to answer; guests may be frozen meanwhile."""

WHOLE_S = 5.0
"""How long a mark waits for the mirrors to be seen in sync after its instant: they are looked at twice a second."""

LOOK_S = 0.05

TOGETHER_S = 3.0
"""How long a guest that is frozen stands still for others of its group; the instant must be taken before HOLD_S is over."""


@dataclass
class _Taken:
    """An instant; why the guests of some VMs were not frozen then, by name."""

    time_ns: int = 0
    at: float = 0.0
    """The same by Trio's clock."""
    reasons: dict[str, str] = field(default_factory=dict)


class Marks:
    """Sets the bookmarks of a state directory."""

    def __init__(self, core: Core, protection: Protection, freezer: Freezer) -> None:
        self._core = core
        self._protection = protection
        self._freezer = freezer
        self._instants = Instants(core)
        self._vms = Vms(core)
        self._locks: dict[str, trio.Lock] = {}

    async def mark(
        self, name: str, bookmark: str, *, freeze: bool = False, or_crash: bool = False
    ) -> dict[str, Any]:
        """Set a bookmark, durable on return. RefusedError if a disk has one of this name, or is not good now, or if a guest
        cannot be frozen; with `or_crash` that only makes the grade less.
        """
        names.check_bookmark(bookmark)
        if not await self._core.thread(self._vms.several, name):
            if freeze:
                raise UsageError(
                    f"{name} is a disk, and guests are frozen whole",
                    hint="cdp point mark VM --name N --freeze",
                )
            return await self._instants.mark(name, bookmark)
        async with self._locks.setdefault(name, trio.Lock()):
            entries = await self._core.thread(self._vms.disks, name)
            await self._core.thread(self._check_new, entries, bookmark)
            if freeze:
                taken = await self._frozen_instant(entries, bookmark, or_crash=or_crash)
            else:
                taken = await self._instant(entries)
            for entry in entries:
                await self._seen_whole(entry, taken)
            found = await self._core.thread(self._vms.resolve, name, At(taken.time_ns))
            grades = {d.entry.name: self._grade(d, taken, freeze=freeze) for d in found.disks}
            for disk in found.disks:
                await self._put(disk, bookmark, grades[disk.entry.name])
        self._core.log.emit(
            "point.marked", disk=name, bookmark=bookmark, time_ns=found.time_ns, not_frozen=taken.reasons
        )
        return _shown(found, bookmark, grades, taken)

    def _check_new(self, entries: list[Entry], bookmark: str) -> None:
        for entry in entries:
            if self._core.has_bookmark(entry, bookmark):
                raise RefusedError(
                    f"{entry.name} has a bookmark {bookmark} already",
                    hint="choose another name for this one",
                )

    def _grade(self, disk: Placed, taken: _Taken, *, freeze: bool) -> Grade:
        vm = names.split_name(disk.entry.name)[1]
        return Grade.APP if freeze and vm is not None and vm not in taken.reasons else disk.grade

    # -- the instant -----------------------------------------------------------------------------------------

    async def _instant(self, entries: list[Entry]) -> _Taken:
        """A time up to which every record of the disks is in its journal. UnreachableError if a worker does not answer."""
        taken = _Taken(self._core.clock.now_ns(), trio.current_time())
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
        return taken

    async def _frozen_instant(self, entries: list[Entry], bookmark: str, *, or_crash: bool) -> _Taken:
        """The same, while the guests are frozen. RefusedError if one was not, unless that is as well."""
        held: list[Frozen] = []
        reasons: dict[str, str] = {}
        vms = await self._core.thread(self._protected, entries, reasons)
        begun: list[str] = []

        async def prepare(vm: ProtectedVm) -> None:
            try:
                begun.append(vm.name)
                await hooks.run(self._core.config.freeze_before, vm.name, bookmark)
            except CdpError as error:
                reasons[vm.name] = str(error)

        try:
            async with trio.open_nursery() as nursery:
                for vm in vms:
                    nursery.start_soon(prepare, vm)
            await self._freeze_together([vm for vm in vms if vm.name not in reasons], held, reasons)
            if reasons and not or_crash:
                raise self._refused(reasons)
            taken = await self._instant(entries)
        finally:
            # Whatever happened, also a request that was given up: guests are thawed, and what was begun is ended.
            with trio.CancelScope(shield=True):
                await self._let_go(held, begun, bookmark, reasons)
        if reasons and not or_crash:
            raise self._refused(reasons)
        taken.reasons = reasons
        return taken

    async def _freeze_together(
        self, vms: list[ProtectedVm], held: list[Frozen], reasons: dict[str, str]
    ) -> None:
        """Freeze guests, each as far as that is possible before the first has stood still for TOGETHER_S."""
        first = trio.Event()

        async def freeze(vm: ProtectedVm) -> None:
            try:
                held.append(await self._freezer.freeze(vm))
                first.set()
            except CdpError as error:
                reasons[vm.name] = str(error)
            except trio.Cancelled:
                reasons[vm.name] = f"{vm.name} was not frozen within {TOGETHER_S:.0f} s after others"
                raise

        async def limit(scope: trio.CancelScope) -> None:
            await first.wait()
            scope.deadline = trio.current_time() + TOGETHER_S

        async with trio.open_nursery() as watch:
            async with trio.open_nursery() as nursery:
                watch.start_soon(limit, nursery.cancel_scope)
                for vm in vms:
                    nursery.start_soon(freeze, vm)
            watch.cancel_scope.cancel()

    def _protected(self, entries: list[Entry], reasons: dict[str, str]) -> list[ProtectedVm]:
        wanted = {names.split_name(entry.name)[1] for entry in entries}
        found = []
        for name in sorted(filter(None, wanted)):
            vm = record.find(self._core.catalog, name)
            if vm is None:
                reasons[name] = f"{name} is not protected (cdp protect {name} --qmp PATH --agent PATH)"
            else:
                found.append(vm)
        return found

    async def _let_go(
        self, held: list[Frozen], begun: list[str], bookmark: str, reasons: dict[str, str]
    ) -> None:
        async def thaw(one: Frozen) -> None:
            if reason := await one.release():
                reasons[one.vm] = reason

        async def after(vm: str) -> None:
            try:
                await hooks.run(self._core.config.freeze_after, vm, bookmark)
            except CdpError as error:
                self._core.log.emit("vm.after-freeze-failed", level="warning", vm=vm, reason=str(error))

        async with trio.open_nursery() as nursery:
            for one in held:
                nursery.start_soon(thaw, one)
        async with trio.open_nursery() as nursery:
            for vm in begun:
                nursery.start_soon(after, vm)

    def _refused(self, reasons: dict[str, str]) -> RefusedError:
        return RefusedError(
            f"no bookmark was set: {'; '.join(reasons.values())}",
            hint="with --or-crash it is set all the same, with the lesser grade",
        )

    async def _seen_whole(self, entry: Entry, taken: _Taken) -> None:
        """Its mirror, if we run it, was looked at after the instant, and nothing was missing. RefusedError."""
        with trio.move_on_after(WHOLE_S):
            while (mirror := self._protection.disk(entry.name)) is not None:
                if mirror.state != "synced":
                    break
                if mirror.whole_at is not None and mirror.whole_at > taken.at:
                    return
                await trio.sleep(LOOK_S)
        if mirror is not None:
            raise RefusedError(
                f"the mirror of {entry.name} is not in sync: {mirror.reason or mirror.state}",
                hint="cdp status shows when it is; then set the bookmark again",
            )

    async def _put(self, disk: Placed, bookmark: str, grade: Grade) -> None:
        message = control.mark(bookmark, at=(disk.seq, disk.time_ns), grade=grade)
        await self._core.targets.call(
            disk.entry.id, "mark", disk=disk.entry.name, message=message, interval=disk.interval
        )


def _shown(found: Instant, bookmark: str, grades: dict[str, Grade], taken: _Taken) -> dict[str, Any]:
    evidence = {
        disk.entry.name: disk.evidence | {"frozen": grades[disk.entry.name] == Grade.APP}
        for disk in found.disks
    }
    point = CommonPoint(found.time_ns, 0, 0, grades, evidence, bookmark).as_dict()
    return point | {"of": found.name, "reason": "; ".join(taken.reasons.values())}
