"""A VM on its way into another QEMU: whoever looks after it there waits for it, while its mirrors go on where it runs.

    inmigrate ──► runs here ──► hand over ──► mirrors begin
        └── held ──► paused ──► hand over ──► mirrors begin ──► the guest goes on

QEMU starts no mirror on disks of a VM that is on its way in ("Block node is read-only"), and lets the guest run once it is there.
What it writes before its mirrors have begun is a gap. A guest that is rather to wait is held: `stop` said while it is on its way
lets it arrive paused. A node tells whoever comes next that it is we who hold it.
"""

import math
from collections.abc import Awaitable, Callable

import trio

from cdpserver.errors import CdpError
from cdpserver.vm.connect import Connect
from cdpserver.vm.disks import OURS
from cdpserver.vm.qmp import Monitor, QmpRefusedError
from cdpserver.vm.record import ProtectedVm, QmpSocket

LOOK_S = 0.05
"""Between two looks whether it is there: as long as that, a guest may write what is missing."""

LIBVIRT_LOOK_S = 0.25
"""The same where each question goes through libvirtd."""

HELD_S = 1.5
"""A guest that has arrived is held no longer: then it goes on, with a gap."""

RETRY_S = 1.0
"""Between two attempts to reach a QEMU, or to tell the service."""

LET_GO_S = 5.0

HELD_NODE = f"{OURS}arriving"

AWAY = {
    "inmigrate": "the VM is on its way into this QEMU: its disks are mirrored from where it runs, if they were",
    "postmigrate": "the VM has moved to another QEMU: say which with cdp protect VM --qmp PATH",
}
"""QEMU's run states in which its guest, if it has one, runs in another."""


class Arrival:
    """Waits for one VM. `hand_over` tells the service that it is there; it may raise CdpError."""

    def __init__(self, vm: ProtectedVm, connect: Connect, hand_over: Callable[[], Awaitable[None]]) -> None:
        self.vm = vm
        self._connect = connect
        self.reason = "its new QEMU was not seen yet"
        self._hand_over = hand_over
        # libvirt lets its guests go on by itself.
        self._holds = vm.wait and isinstance(vm.connection, QmpSocket)
        self._look_s = LOOK_S if isinstance(vm.connection, QmpSocket) else LIBVIRT_LOOK_S

    async def run(self) -> None:
        """Until the VM runs there, and the service knows. Cancelled, it leaves a guest that goes on by itself."""
        while True:
            try:
                async with self._connect(self.vm.connection) as monitor:
                    await self._wait(monitor)
                    return
            except CdpError as error:
                self.reason = str(error)
            await trio.sleep(RETRY_S)

    async def _wait(self, monitor: Monitor) -> None:
        try:
            if self._holds and await run_state(monitor) == "inmigrate" and not await is_held(monitor):
                await _hold(monitor)
            while (state := await run_state(monitor)) in (*AWAY, "prelaunch"):
                self.reason = AWAY.get(state, "its new QEMU waits to be begun")
                await trio.sleep(self._look_s)
            self.reason = "it is there, and the service is told"
            with trio.move_on_after(HELD_S if await is_held(monitor) else math.inf):
                await self._hand_over()
                return
            await let_go(monitor)
        except BaseException:
            with trio.move_on_after(LET_GO_S) as scope:
                scope.shield = True
                await let_go(monitor)
            raise
        await self._hand_over()


async def run_state(monitor: Monitor) -> str:
    """QEMU's run state; nothing of a qemu-storage-daemon, which has none."""
    try:
        return str((await monitor.execute("query-status"))["status"])
    except QmpRefusedError:
        return ""


async def is_held(monitor: Monitor) -> bool:
    """Does a guest stand that was to arrive held?"""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return any(node["node-name"] == HELD_NODE for node in nodes)


async def _hold(monitor: Monitor) -> None:
    await monitor.execute("blockdev-add", {"driver": "null-co", "node-name": HELD_NODE, "size": 512})
    await monitor.execute("stop")


async def let_go(monitor: Monitor) -> None:
    """A guest that was held goes on, at once or as soon as it is there; nothing if none was."""
    if await is_held(monitor):
        if await run_state(monitor) in ("paused", "inmigrate"):
            await monitor.execute("cont")
        await monitor.execute("blockdev-del", {"node-name": HELD_NODE})
