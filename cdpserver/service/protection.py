"""The protected VMs: a controller for each, and what an operator says of them.

What is desired is in the catalog before anything is done in QEMU, and stays until it is taken back, so that a restart of ours, of
QEMU or of the host ends in the same. A monitor serves one client: the controller lets go of it while an operator's command looks.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import trio

from cdpserver import names
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.children import Children
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.hung import Hung
from cdpserver.service.remote import Remote
from cdpserver.service.targets import OwnTarget
from cdpserver.vm import record
from cdpserver.vm.connect import check_connection, check_here, connect
from cdpserver.vm.controller import Controller, DiskState
from cdpserver.vm.disks import FoundDisk, check_size, choose
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.record import LibvirtDomain, ProtectedDisk, ProtectedVm, QmpSocket
from cdpserver.vm.recovery.record import overwritten
from cdpserver.vm.release import end_mirrors, release

AGAIN_S = 5.0
"""Pause before a controller goes on that met what it does not know."""

LET_GO_S = 10.0
"""How long removing waits for QEMU to end its mirrors."""


@dataclass
class Running:
    """A VM, and who looks after it."""

    controller: Controller | Remote
    scope: trio.CancelScope
    ended: trio.Event


class Protection:
    """All protected VMs of the service."""

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

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: every VM that is to be protected is."""
        core = self._core
        wanted = await core.thread(record.all_of, core.catalog)
        for name in await core.thread(overwritten, core.catalog):
            self._held[name] = "a recovery replaces its disks"
        async with trio.open_nursery() as self._nursery:
            self._target = OwnTarget(core, self._disks, self.base_points, self._hung, self._nursery)
            for wrong in await core.thread(record.unreadable, core.catalog):
                core.log.emit("vm.unreadable", level="error", reason=str(wrong))
            for vm in wanted:
                self._start(vm)
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

    async def _stop(self, name: str) -> None:
        """It is shown as it stood until another one runs: its mirrors go on in QEMU."""
        if running := self._running.get(name):
            running.scope.cancel()
            await running.ended.wait()

    @contextlib.asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[ProtectedVm | None]:
        """The VM as it is desired, while its controller stands; afterwards one runs for what is desired then."""
        async with self._locks.setdefault(name, trio.Lock()):
            await self._stop(name)
            try:
                yield await self._find(name)
            finally:
                with trio.CancelScope(shield=True):
                    wanted = await self._find(name)
                    self._running.pop(name, None)
                    if wanted is not None:
                        self._start(wanted)

    async def _find(self, name: str) -> ProtectedVm | None:
        """What is to be protected; None also for a row that cannot be read, which the next one replaces."""
        try:
            return await self._core.thread(record.find, self._core.catalog, name)
        except CorruptError as error:
            self._core.log.emit("vm.unreadable", level="error", reason=str(error))
            return None

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
            await self._core.thread(self._core.catalog.put_row, "vms", record.row(vm))
            self._held.pop(vm.name, None)

    async def replace(self, name: str, vm: ProtectedVm | None) -> None:
        """End a VM's mirrors; from now on it is protected as `vm` says, or not."""
        async with self._changing(name) as before:
            if before is not None:
                await self._let_go(before)
                await self._core.thread(self._core.catalog.delete_row, "vms", record.row_id(name))
            if vm is not None:
                await self._core.thread(self._core.catalog.put_row, "vms", record.row(vm))

    # -- what an operator says -------------------------------------------------------------------------------

    async def protect(
        self,
        name: str,
        connection: record.Connection,
        *,
        devices: list[str],
        wait: bool,
        drive_mirror: bool,
        agent: str | None = None,
    ) -> dict[str, Any]:
        """Protect a VM from now on, or as is said now. Its disks are registered, and its record durable, on return."""
        names.check_name(name)
        check_here(connection, name)
        if agent is not None and not agent.startswith("/"):
            raise UsageError(f"not an absolute path: {names.show(agent)}", hint="give the path from the root")
        async with self._changing(name) as before:
            if before is not None and before.by:
                raise RefusedError(
                    f"{name} is protected by the agent {before.by}",
                    hint=f"to end that: cdp protect {name} --remove",
                )
            self._check_free(name, connection)
            async with connect(connection) as monitor:
                found = choose(
                    await monitor.execute("query-block"),
                    await monitor.execute("query-named-block-nodes"),
                    devices,
                )
                vm = ProtectedVm(
                    name,
                    connection,
                    tuple(ProtectedDisk(names.full_name(disk.name, name), disk.device) for disk in found),
                    before.created_ns if before is not None else self._core.clock.now_ns(),
                    "drive-mirror" if drive_mirror else "blockdev-mirror",
                    wait,
                    before.guest_agent if agent is None and before is not None else agent,
                )
                for disk in found:
                    await self._register(name, disk)
                if before is None or not vm.mirrored_like(before):
                    # How long a write waits is fixed when QEMU opens the target: what runs would be taken over with that.
                    await end_mirrors(
                        monitor, [(await self.target.identity(disk.name))[0] for disk in vm.disks]
                    )
                await self._core.thread(self._core.catalog.put_row, "vms", record.row(vm))
                kept = {disk.name for disk in vm.disks}
                dropped = [disk.name for disk in before.disks if disk.name not in kept] if before else []
                if dropped:
                    await self._end_mirrors(monitor, dropped)
        self._core.log.emit("vm.protect", vm=name, disks=[disk.name for disk in vm.disks])
        return self.show(name)

    async def protect_there(
        self,
        name: str,
        agent: str,
        connection: record.Connection,
        found: list[FoundDisk],
        *,
        wait: bool,
        drive_mirror: bool,
    ) -> dict[str, Any]:
        """Let an agent protect a VM from now on; `found` are its disks, as they were found there. Durable on return."""
        names.check_name(name)
        check_connection(connection)
        if not found:
            raise UsageError("no disk is named", hint="protect it on its own host: cdp protect VM --by NAME")
        async with self._changing(name) as before:
            if before is not None and before.by != agent:
                raise RefusedError(
                    f"{name} is protected by {before.by or 'this service'}",
                    hint=f"to end that: cdp protect {name} --remove",
                )
            vm = ProtectedVm(
                name,
                connection,
                tuple(ProtectedDisk(names.full_name(disk.name, name), disk.device) for disk in found),
                before.created_ns if before is not None else self._core.clock.now_ns(),
                "drive-mirror" if drive_mirror else "blockdev-mirror",
                wait,
                by=agent,
            )
            if before is not None and not vm.mirrored_like(before):
                # Its mirrors may run while no agent does, and the next one would take them over as they are.
                raise RefusedError(
                    f"{name} is mirrored in another way by the agent {agent}",
                    hint=f"end that first, while the agent runs: cdp protect {name} --remove",
                )
            for disk in found:
                await self._register(name, disk)
            await self._core.thread(self._core.catalog.put_row, "vms", record.row(vm))
        self._core.log.emit("vm.protect", vm=name, disks=[disk.name for disk in vm.disks], agent=agent)
        return self.show(name)

    # -- for agents ------------------------------------------------------------------------------------------

    @property
    def target(self) -> OwnTarget:
        """Our side of every mirror."""
        assert self._target is not None
        return self._target

    def running(self) -> list[Running]:
        """Every protected VM."""
        return list(self._running.values())

    def is_held(self, name: str) -> bool:
        """Is it not to be mirrored for the time being?"""
        return name in self._held

    def _check_free(self, name: str, connection: record.Connection) -> None:
        for other in record.all_of(self._core.catalog):
            if other.name != name and other.connection == connection and not other.by:
                raise RefusedError(
                    f"{connection} is the monitor of {other.name}, which is protected already",
                    hint=f"to end that: cdp protect {other.name} --remove",
                )

    async def _register(self, vm: str, disk: FoundDisk) -> None:
        full = names.full_name(disk.name, vm)
        if self._core.catalog.get(full) is None:
            await self._disks.add(disk.name, disk.size, vm=vm, base=None)
        else:
            shown = await self._disks.show(full)
            check_size(full, here=shown["size"], there=disk.size)

    async def remove(self, name: str) -> dict[str, Any]:
        """End the protection of a VM; its disks keep their history. NotFoundError."""
        names.check_name(name)
        async with self._changing(name) as before:
            if self._core.catalog.row("vms", record.row_id(name)) is None:
                raise NotFoundError(
                    f"{name} is not protected", hint="those that are: cdp status; to begin: cdp protect VM"
                )
            await self._core.thread(self._core.catalog.delete_row, "vms", record.row_id(name))
            left = (
                await self._let_go(before) if before is not None else "what it was mirrored by is not known"
            )
        self._core.log.emit("vm.unprotect", vm=name, left=left)
        return {"vm": name, "removed": True, "left": left}

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

    # -- showing ---------------------------------------------------------------------------------------------

    def show(self, name: str) -> dict[str, Any]:
        """One protected VM. NotFoundError."""
        running = self._running.get(name)
        if running is None:
            raise NotFoundError(f"{name} is not protected", hint="to begin: cdp protect VM --qmp PATH")
        vm = running.controller.vm
        return {
            "vm": vm.name,
            "qmp": vm.connection.path if isinstance(vm.connection, QmpSocket) else None,
            "libvirt": vm.connection.uri if isinstance(vm.connection, LibvirtDomain) else None,
            "domain": vm.connection.domain if isinstance(vm.connection, LibvirtDomain) else None,
            "by": vm.by or None,
            "method": vm.method,
            "wait": vm.wait,
            "agent": vm.guest_agent,
            "disks": [self._disk(state) for state in running.controller.states.values()],
        }

    def _disk(self, seen: DiskState) -> dict[str, Any]:
        entry = self._core.catalog.get(seen.wanted.name)
        return {
            "name": seen.wanted.name,
            "device": seen.wanted.device,
            "node": seen.node,
            "state": seen.state,
            "reason": seen.reason,
            "uri": "" if entry is None else self._core.disk_uris(entry)["uri"],
            "resync": seen.resync,
            "bitmap": seen.bitmap,
        }

    def list_vms(self) -> list[dict[str, Any]]:
        """Every protected VM, by name."""
        return [self.show(name) for name in sorted(self._running)]

    def disk(self, name: str) -> DiskState | None:
        """How far the mirror of a disk is; None if none is desired."""
        for running in self._running.values():
            if name in running.controller.states:
                return running.controller.states[name]
        return None
