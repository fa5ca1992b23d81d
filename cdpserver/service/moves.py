"""VMs that are to move to another QEMU: who waits for them there, the service itself or an agent on another host.

Where a VM is to move to is in its row (`record.ProtectedVm.next`) until it runs there. Up to then whoever looks after it goes on
as before; so a move that fails, or is given up, changes nothing.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from cdpserver.service.core import Core
from cdpserver.vm.arrival import Arrival
from cdpserver.vm.connect import connect
from cdpserver.vm.record import ProtectedVm, as_shown

AGAIN_S = 5.0
"""Pause before somebody goes on waiting who met what he does not know."""


@dataclass
class Coming:
    """One VM, and who waits for it: `arrival` if that is the service itself."""

    vm: ProtectedVm
    arrival: Arrival | None
    told: str
    """What the agent that waits for it says."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def reason(self) -> str:
        """What is waited for."""
        return self.told if self.arrival is None else self.arrival.reason


class Moves:
    """All of the service. `arrived` hands a VM over to where it runs now."""

    def __init__(
        self, core: Core, nursery: trio.Nursery, arrived: Callable[[ProtectedVm], Awaitable[object]]
    ) -> None:
        self._core = core
        self._nursery = nursery
        self._arrived = arrived
        self._coming: dict[str, Coming] = {}

    def begin(self, vm: ProtectedVm) -> None:
        """Wait for the VM `vm` where it says."""

        async def hand_over() -> None:
            await self._arrived(vm)

        if vm.by:
            self._coming[vm.name] = Coming(vm, None, f"the agent {vm.by} was not heard yet")
            self._coming[vm.name].ended.set()
            return
        coming = Coming(vm, Arrival(vm, connect, hand_over), "")
        self._coming[vm.name] = coming
        self._nursery.start_soon(self._wait, coming)

    async def _wait(self, coming: Coming) -> None:
        assert coming.arrival is not None
        try:
            with coming.scope:
                while True:
                    try:
                        await coming.arrival.run()
                        return
                    except Exception as error:  # noqa: BLE001 - one VM's rim: the others and the service go on
                        reason = repr(error)[:2000]
                        self._core.log.emit("vm.failed", level="error", vm=coming.vm.name, reason=reason)
                    await trio.sleep(AGAIN_S)
        finally:
            coming.ended.set()

    async def stop(self, name: str) -> None:
        """Wait for it no more; on return nobody of ours holds its new monitor."""
        coming = self._coming.pop(name, None)
        if coming is not None:
            coming.scope.cancel()
            await coming.ended.wait()

    def arrived(self, name: str) -> None:
        """It is there: who waited for it ends by itself."""
        self._coming.pop(name, None)

    def of(self, agent: str) -> list[ProtectedVm]:
        """The VMs that an agent is to wait for."""
        return [coming.vm for coming in self._coming.values() if coming.vm.by == agent]

    def told(self, agent: str, name: str, reason: str) -> None:
        """What an agent says of a VM that it waits for."""
        coming = self._coming.get(name)
        if coming is not None and coming.vm.by == agent:
            coming.told = reason

    def show(self, name: str) -> dict[str, Any] | None:
        """Where a VM is to move to; None if it is not."""
        coming = self._coming.get(name)
        return None if coming is None else as_shown(coming.vm) | {"reason": coming.reason}
