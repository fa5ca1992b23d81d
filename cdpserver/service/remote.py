"""A VM that an agent on another host protects: what that says of it. It looks like a controller of ours from outside."""

import time
from typing import Any

import trio

from cdpserver.vm.controller import DiskState
from cdpserver.vm.copies import Copy
from cdpserver.vm.record import ProtectedVm

SILENT_S = 10.0
"""An agent reports every second; what it said longer ago than this is said no more."""

LOOK_S = 1.0


class Remote:
    """One VM of an agent."""

    def __init__(self, vm: ProtectedVm) -> None:
        self.vm = vm
        self.states = {disk.name: DiskState(disk) for disk in vm.disks}
        self.machine = vm.machine
        self._heard_at = trio.current_time()

    async def run(self) -> None:
        """Until cancelled: notice that the agent is silent."""
        while True:
            silent_s = trio.current_time() - self._heard_at
            if silent_s > SILENT_S:
                for seen in self.states.values():
                    if seen.state == "synced":
                        seen.behind_since_ns = time.monotonic_ns() - int(silent_s * 1e9)
                    seen.state = "waiting"
                    seen.reason = f"the agent {self.vm.by} has not reported for {silent_s:.0f} s"
            await trio.sleep(LOOK_S)

    def report(self, disks: list[dict[str, Any]]) -> None:
        """What the agent says now; disks that are not of this VM are passed over."""
        self._heard_at = trio.current_time()
        for said in disks:
            seen = self.states.get(said["name"])
            if seen is None:
                continue
            seen.state, seen.reason = said["state"], said["reason"]
            seen.node, seen.bitmap = said["node"], said["bitmap"]
            behind_ns = said["behind_ns"]
            seen.behind_since_ns = None if behind_ns is None else time.monotonic_ns() - behind_ns
            seen.copy = None if said["resync"] is None else Copy.read(said["resync"])
