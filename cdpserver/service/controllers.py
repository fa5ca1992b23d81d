"""Who looks after the protected VMs: a controller of the service for each, or an agent on another host; and when that changes.

A monitor serves one client: whoever looks after a VM lets go of it while something else is done there.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import trio

from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.children import Children
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.hung import Hung
from cdpserver.service.moves import Moves
from cdpserver.service.remote import Remote
from cdpserver.service.targets import OwnTarget
from cdpserver.vm import record
from cdpserver.vm.connect import connect
from cdpserver.vm.controller import Controller
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.record import ProtectedVm
from cdpserver.vm.recovery.record import overwritten
from cdpserver.vm.release import release

AGAIN_S = 5.0
"""Pause before a controller goes on that met what it does not know."""

LET_GO_S = 20.0
"""How long removing waits for QEMU to end its mirrors."""

LEFT_S = 5.0
LEFT_LOOK_S = 0.1
"""How long it may take to be seen that a VM has left a QEMU: controllers look twice a second, agents report every second."""


@dataclass
class Running:
    """A VM, and who looks after it."""

    controller: Controller | Remote
    scope: trio.CancelScope
    ended: trio.Event


class Controllers:
    """Those of all protected VMs."""

    def __init__(self, core: Core, children: Children, disks: Disks, base_points: BasePoints) -> None:
        self._core = core
        self._disks = disks
        self.base_points = base_points
        self._hung = Hung(core, children.targets)
        self._running: dict[str, Running] = {}
        self._held: dict[str, str] = {}
        """Why a VM is not mirrored for the time being."""
        self._locks: dict[str, trio.Lock] = {}
        self._nursery: trio.Nursery | None = None
        self._target: OwnTarget | None = None
        self._moves: Moves | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: every VM that is to be protected is."""
        core = self._core
        wanted = await core.thread(record.all_of, core.catalog)
        for name in await core.thread(overwritten, core.catalog):
            self._held[name] = "a recovery replaces its disks"
        async with trio.open_nursery() as self._nursery:
            self._target = OwnTarget(core, self._disks, self.base_points, self._hung, self._nursery)
            self._moves = Moves(core, self._nursery, self.arrived)
            for wrong in await core.thread(record.unreadable, core.catalog):
                core.log.emit("vm.unreadable", level="error", reason=str(wrong))
            for vm in wanted:
                self._start(vm)
                if vm.next is not None:
                    self._moves.begin(vm.next)
            task_status.started()
            # While no VM waits for a worker there is no reason to kill one.
            await self._hung.watch(lambda: bool(self._running))

    # -- controllers -----------------------------------------------------------------------------------------

    def _start(self, vm: ProtectedVm) -> None:
        assert self._nursery is not None
        assert self._target is not None
        controller = Remote(vm) if vm.by else Controller(vm, connect, self._target)
        running = Running(controller, trio.CancelScope(), trio.Event())
        self._running[vm.name] = running
        if why := self._held.get(vm.name):
            running.ended.set()
            for state in running.controller.states.values():
                state.reason = why
        else:
            self._nursery.start_soon(self._keep, running)

    async def _keep(self, running: Running) -> None:
        try:
            with running.scope:
                while True:
                    try:
                        await running.controller.run()
                    except Exception as error:  # noqa: BLE001 - one VM's rim: the others and the service go on
                        name = running.controller.vm.name
                        self._core.log.emit("vm.failed", level="error", vm=name, reason=repr(error)[:2000])
                    await trio.sleep(AGAIN_S)
        finally:
            running.ended.set()

    @contextlib.asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[ProtectedVm | None]:
        """The VM as it is desired, while nobody looks after it; afterwards somebody does as is desired then."""
        async with self._locked(name) as before, self._standing(name):
            yield before

    @contextlib.asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[ProtectedVm | None]:
        """The VM as it is desired, while nobody waits for it elsewhere; afterwards somebody does if that is desired then."""
        async with self._locks.setdefault(name, trio.Lock()):
            await self.moves.stop(name)
            try:
                yield await self._find(name)
            finally:
                with trio.CancelScope(shield=True):
                    wanted = await self._find(name)
                    if wanted is not None and wanted.next is not None:
                        self.moves.begin(wanted.next)

    @contextlib.asynccontextmanager
    async def _standing(self, name: str) -> AsyncIterator[None]:
        """Its controller stands meanwhile, and is shown as it stood; afterwards one runs for what is desired then."""
        running = self._running.get(name)
        if running is not None:
            running.scope.cancel()
            await running.ended.wait()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                wanted = await self._find(name)
                if wanted is not None:
                    self._start(wanted)
                else:
                    self._running.pop(name, None)

    async def _find(self, name: str) -> ProtectedVm | None:
        """What is to be protected; None also for a row that cannot be read, which the next one replaces."""
        try:
            return await self._core.thread(record.find, self._core.catalog, name)
        except CorruptError as error:
            self._core.log.emit("vm.unreadable", level="error", reason=str(error))
            return None

    async def _put(self, vm: ProtectedVm) -> None:
        await self._core.thread(self._core.catalog.put_row, "vms", record.row(vm))

    # -- for recoveries --------------------------------------------------------------------------------------

    async def hold(self, name: str, why: str) -> None:
        """Mirror a VM no more, until it is let go of: what runs at its monitor is not what its record speaks of."""
        async with self._changing(name):
            self._held[name] = why

    async def let_go(self, name: str) -> None:
        """The reverse."""
        async with self._changing(name):
            self._held.pop(name, None)

    async def adopt(self, vm: ProtectedVm) -> None:
        """Protect a VM from now on as `vm` says, with disks that are there; durable on return."""
        async with self._changing(vm.name):
            await self._put(vm)
            self._held.pop(vm.name, None)

    async def replace(self, name: str, vm: ProtectedVm | None, *, runs: bool) -> None:
        """End a VM's mirrors; from now on it is protected as `vm` says, or not. RefusedError if it `runs` and they do not end."""
        async with self._changing(name) as before:
            if before is not None:
                if (left := await self._let_go(before)) and runs and not before.by:
                    hint = "try again; if the VM does not run any more: cdp recover undo ID --discard"
                    raise RefusedError(f"the mirrors of {name} do not end: {left}", hint=hint)
                await self._core.thread(self._core.catalog.delete_row, "vms", record.row_id(name))
            if vm is not None:
                await self._put(vm)

    # -- who there is ------------------------------------------------------------------------------------------

    @property
    def target(self) -> OwnTarget:
        """Our side of every mirror."""
        assert self._target is not None
        return self._target

    @property
    def moves(self) -> Moves:
        """VMs that are to move to another QEMU."""
        assert self._moves is not None
        return self._moves

    def running(self) -> list[Running]:
        """Every protected VM."""
        return list(self._running.values())

    def is_held(self, name: str) -> bool:
        """Is it not to be mirrored for the time being?"""
        return name in self._held

    # -- moving ----------------------------------------------------------------------------------------------

    async def _move(self, before: ProtectedVm, vm: ProtectedVm, *, waits: bool) -> None:
        """A VM moves to where `vm` says, as soon as it runs there: it may already. RefusedError while it runs where it was."""
        if waits:
            await self._put(replace(before, next=vm))
            self._core.log.emit("vm.moves", vm=vm.name, to=str(vm.connection), agent=vm.by)
            return
        if (before.by or vm.by) and not await self._has_left(vm.name):
            raise RefusedError(
                f"{vm.name} is in sync where it is looked after by {before.by or 'this service'}",
                hint="to move it, say this when its new QEMU waits for it (-incoming), or when it has moved",
            )
        await self._hand_over(before, vm)

    async def _has_left(self, name: str) -> bool:
        """Is a VM not mirrored where it was any more?"""
        deadline = trio.current_time() + LEFT_S
        running = self._running.get(name)
        while running is not None and any(
            seen.state == "synced" for seen in running.controller.states.values()
        ):
            if trio.current_time() > deadline:
                return False
            await trio.sleep(LEFT_LOOK_S)
        return True

    async def arrived(self, vm: ProtectedVm) -> None:
        """The VM runs where `vm` says; durable on return, and nothing if said again. RefusedError if it is not expected there."""
        async with self._locks.setdefault(vm.name, trio.Lock()):
            before = await self._find(vm.name)
            if before == vm:
                return
            if before is None or before.next != vm:
                raise RefusedError(
                    f"{vm.name} is not expected at {vm.connection}",
                    hint=f"where it is: cdp protect {vm.name} --qmp PATH",
                )
            await self._hand_over(before, vm)
            self.moves.arrived(vm.name)

    async def arrived_there(self, name: str, agent: str) -> None:
        """The same, by the agent that waited for it."""
        before = await self._find(name)
        for vm in (None if before is None else before.next, before):
            if vm is not None and vm.by == agent:
                await self.arrived(vm)
                return
        raise RefusedError(
            f"{name} is not expected by the agent {agent}",
            hint=f"if it runs there: cdp protect {name} --qmp PATH --by {agent}",
        )

    async def _hand_over(self, before: ProtectedVm, vm: ProtectedVm) -> None:
        async with self._standing(vm.name):
            await self._put(vm)
        self._core.log.emit("vm.moved", vm=vm.name, to=str(vm.connection), agent=vm.by, from_agent=before.by)

    # -- the end of mirrors ---------------------------------------------------------------------------------

    async def _let_go(self, vm: ProtectedVm) -> str:
        """End the mirrors in QEMU; why that was not possible, or nothing. A QEMU that is gone has none."""
        if vm.by:
            return f"the agent {vm.by} ends them, if it runs"
        with trio.move_on_after(LET_GO_S):
            try:
                async with connect(vm.connection) as monitor:
                    await self._end_mirrors(monitor, [disk.name for disk in vm.disks])
                return ""
            except CdpError as error:
                return error.message
        return "QEMU takes too long to end its mirrors"

    async def _end_mirrors(self, monitor: Monitor, disks: list[str]) -> None:
        assert self._target is not None
        for disk in disks:
            with contextlib.suppress(NotFoundError):  # removed meanwhile, and its mirror ended for that
                uuid, _ = await self._target.identity(disk)
                await release(monitor, [uuid])
