"""What an operator says of the protected VMs.

What is desired is in the catalog before anything is done in QEMU, and stays until it is taken back, so that a restart of ours, of
QEMU or of the host ends in the same.
"""

import contextlib
from dataclasses import replace
from typing import Any

from cdpserver import names
from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.service.controllers import Controllers
from cdpserver.vm import arrival, record
from cdpserver.vm.connect import check_connection, check_here, connect
from cdpserver.vm.controller import DiskState
from cdpserver.vm.disks import FoundDisk, check_size, choose
from cdpserver.vm.launch.machine import Machine
from cdpserver.vm.machines import read_machine
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.record import ProtectedDisk, ProtectedVm
from cdpserver.vm.release import end_mirrors


class Protection(Controllers):
    """All protected VMs of the service."""

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
        async with self._locked(name) as before:
            self._check_free(name, connection)
            moving = before is not None and before.place != (connection, "")
            async with (
                contextlib.nullcontext() if moving else self._standing(name),
                connect(connection) as monitor,
            ):
                found = choose(
                    await monitor.execute("query-block"),
                    await monitor.execute("query-named-block-nodes"),
                    devices,
                )
                vm = self._wanted(name, connection, found, before, wait=wait, drive_mirror=drive_mirror)
                if agent is not None or before is not None:
                    vm = replace(vm, guest_agent=agent or (before.guest_agent if before else None))
                vm = replace(vm, machine=await read_machine(monitor))
                waits = await arrival.run_state(monitor) in arrival.AWAY
                if before is not None and moving and waits:
                    _check_same(before, vm)
                for disk in found:
                    await self._register(name, disk)
                if not moving:
                    await self._change(before, vm, monitor)
            if before is not None and moving:
                await self._move(before, vm, waits=waits)
        self._core.log.emit("vm.protect", vm=name, disks=[disk.name for disk in vm.disks])
        return self.show(name)

    async def _change(self, before: ProtectedVm | None, vm: ProtectedVm, monitor: Monitor) -> None:
        """It is protected as `vm` says where it is; what is mirrored in another way, or no more, ends."""
        if before is None or not vm.mirrored_like(before):
            # How long a write waits is fixed when QEMU opens the target: what runs would be taken over with that.
            await end_mirrors(monitor, [(await self.target.identity(disk.name))[0] for disk in vm.disks])
        await self._put(vm)
        kept = {disk.name for disk in vm.disks}
        dropped = [disk.name for disk in before.disks if disk.name not in kept] if before else []
        if dropped:
            await self._end_mirrors(monitor, dropped)

    async def protect_there(
        self,
        name: str,
        agent: str,
        connection: record.Connection,
        found: list[FoundDisk],
        *,
        wait: bool,
        drive_mirror: bool,
        waits: bool,
    ) -> dict[str, Any]:
        """Let an agent protect a VM from now on; `found` are its disks, as they were found there. Durable on return.

        `waits`: the VM is still to move into that QEMU.
        """
        names.check_name(name)
        check_connection(connection)
        if not found:
            raise UsageError("no disk is named", hint="protect it on its own host: cdp protect VM --by NAME")
        async with self._locked(name) as before:
            vm = self._wanted(name, connection, found, before, wait=wait, drive_mirror=drive_mirror, by=agent)
            moving = before is not None and before.place != vm.place
            if before is not None and not moving and not vm.mirrored_like(before):
                # Its mirrors may run while no agent does, and the next one would take them over as they are.
                raise RefusedError(
                    f"{name} is mirrored in another way by the agent {agent}",
                    hint=f"end that first, while the agent runs: cdp protect {name} --remove",
                )
            if before is not None and moving and waits:
                _check_same(before, vm)
            for disk in found:
                await self._register(name, disk)
            if before is not None and moving:
                await self._move(before, vm, waits=waits)
            else:
                async with self._standing(name):
                    await self._put(vm)
        self._core.log.emit("vm.protect", vm=name, disks=[disk.name for disk in vm.disks], agent=agent)
        return self.show(name)

    def _wanted(
        self,
        name: str,
        connection: record.Connection,
        found: list[FoundDisk],
        before: ProtectedVm | None,
        *,
        wait: bool,
        drive_mirror: bool,
        by: str = "",
    ) -> ProtectedVm:
        return ProtectedVm(
            name,
            connection,
            tuple(ProtectedDisk(names.full_name(disk.name, name), disk.device) for disk in found),
            before.created_ns if before is not None else self._core.clock.now_ns(),
            "drive-mirror" if drive_mirror else "blockdev-mirror",
            wait,
            by=by,
        )

    def _check_free(self, name: str, connection: record.Connection) -> None:
        for other in record.all_of(self._core.catalog):
            places = [vm.place for vm in (other, other.next) if vm is not None]
            if other.name != name and (connection, "") in places:
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

    # -- showing ---------------------------------------------------------------------------------------------

    def show(self, name: str) -> dict[str, Any]:
        """One protected VM. NotFoundError."""
        running = self._running.get(name)
        if running is None:
            raise NotFoundError(f"{name} is not protected", hint="to begin: cdp protect VM --qmp PATH")
        vm = running.controller.vm
        return {
            "vm": vm.name,
            **record.as_shown(vm),
            "moves_to": self.moves.show(vm.name),
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

    def machine(self, name: str) -> Machine | None:
        """What machine a VM is, or was when it was seen last; None of one that is not protected, or does not tell."""
        running = self._running.get(name)
        return None if running is None else running.controller.machine

    def disk(self, name: str) -> DiskState | None:
        """How far the mirror of a disk is; None if none is desired."""
        for running in self._running.values():
            if name in running.controller.states:
                return running.controller.states[name]
        return None


def _check_same(before: ProtectedVm, vm: ProtectedVm) -> None:
    """RefusedError if a VM that is on its way is not to have all of its disks there: their protection would end with the move."""
    lacking = {disk.name for disk in before.disks} - {disk.name for disk in vm.disks}
    if lacking:
        raise RefusedError(
            f"the new QEMU of {vm.name} has not {', '.join(sorted(lacking))}",
            hint="give its disks the ids that they have where it runs, or choose the same ones: --disk",
        )
