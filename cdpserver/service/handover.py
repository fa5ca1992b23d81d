"""What belongs to a protected VM, before a recovery, during it, and when the VM is home.

    overwrite   hold: nobody mirrors the old VM ── home ──► its record names the new QEMU and the same disks ── undo ──► as before
    new                                         ── home ──► a VM of its own, whose disks are the forks       ── undo ──► none

The disks go on with the history that they have: a mirror compares what it finds with that, so the journal grows by what differs.
"""

from dataclasses import replace

from cdpserver.catalog import Row
from cdpserver.errors import RefusedError
from cdpserver.service.core import Core
from cdpserver.service.protection import Protection
from cdpserver.vm import record as protected
from cdpserver.vm.record import ProtectedDisk, ProtectedVm
from cdpserver.vm.recovery.record import Recovery


class HandOver:
    """Between recoveries and the protection of VMs."""

    def __init__(self, core: Core, protection: Protection) -> None:
        self._core = core
        self._protection = protection

    async def check_idle(self, one: Recovery) -> None:
        """RefusedError while somebody writes to a disk that is to be overwritten."""
        if not one.overwrites:
            return
        for disk in one.disks:
            replaced = one.protected_name(disk)
            if (await self._core.target_status(self._core.entry(replaced))).get("clients", 0):
                raise RefusedError(
                    f"{replaced} is being written: {one.overwrites} runs",
                    hint="shut it down first, or recover beside it: without --overwrite",
                )

    async def hold(self, one: Recovery) -> None:
        """Nobody mirrors the VM that is overwritten from here on."""
        if one.overwrites:
            await self._protection.hold(one.overwrites, f"{one.id} replaces its disks")

    async def let_go(self, one: Recovery) -> None:
        """The VM that was to be overwritten is mirrored as before."""
        if one.overwrites:
            await self._protection.let_go(one.overwrites)

    async def protect(self, one: Recovery) -> None:
        """The VM that is home is protected from here on; durable on return."""
        if not one.protect or one.protected:
            await self.let_go(one)
            return
        for disk in one.disks:
            if not one.overwrites:
                await self._core.targets.call(self._core.entry(disk.fork).id, "mirrored", disk=disk.fork)
        await self._protection.adopt(self._vm(one))
        await self._keep(replace(one, protected=True))
        self._core.log.emit("recovery.protected", recovery=one.id, vm=one.vm)

    def _vm(self, one: Recovery) -> ProtectedVm:
        disks = tuple(ProtectedDisk(one.protected_name(disk), disk.device) for disk in one.disks)
        connection = one.connection
        if one.before is None:
            return ProtectedVm(one.vm, connection, disks, self._core.clock.now_ns())
        return replace(self._before(one), connection=connection, disks=disks)

    @staticmethod
    def _before(one: Recovery) -> ProtectedVm:
        assert one.before is not None
        return protected.read(Row(protected.row_id(one.vm), protected.SCHEMA, one.before))

    async def take_back(self, one: Recovery, *, runs: bool) -> Recovery:
        """The VM is protected as it was before the recovery, and held if that is to overwrite it.

        RefusedError if it `runs` and its mirrors do not end: then all is as it was.
        """
        await self.hold(one)
        if not one.protected:
            return one
        before = None if one.before is None else self._before(one)
        try:
            await self._protection.replace(one.vm, before, runs=runs)
        except RefusedError:
            await self.let_go(one)
            raise
        return await self._keep(replace(one, protected=False))

    async def _keep(self, one: Recovery) -> Recovery:
        await self._core.thread(self._core.catalog.put_row, "recoveries", one.row())
        return one
