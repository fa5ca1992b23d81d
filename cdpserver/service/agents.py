"""What agents ask: controllers of VMs that run beside QEMU on other hosts.

What is desired is in the catalog here, as for VMs of this host; an agent asks for its VMs, looks after their mirrors, and says
what it sees. It may die at any time: the mirrors go on, and the next one takes them over.
"""

from typing import Any

from cdpserver.errors import ForbiddenError
from cdpserver.events import Level
from cdpserver.names import check_name
from cdpserver.service.core import Core
from cdpserver.service.protection import Protection
from cdpserver.service.remote import Remote
from cdpserver.service.targets import OwnTarget
from cdpserver.vm import record
from cdpserver.vm.disks import FoundDisk
from cdpserver.vm.mirror import mirror_uri
from cdpserver.vm.record import Connection

EVENTS = frozenset(
    {"disk.degraded", "disk.guest-freed", "disk.protected", "disk.resynced", "disk.unprotected", "vm.failed"}
)
"""What an agent may put on record here."""


FIELDS = frozenset({"disk", "journalled_bytes", "method", "pause_ns", "reason", "sent_bytes", "vm", "why"})
"""What such an event can say."""


class Agents:
    """What the API's routes of agents do."""

    def __init__(self, core: Core, protection: Protection) -> None:
        self._core = core
        self._protection = protection

    @property
    def target(self) -> OwnTarget:
        """Our side of every mirror."""
        return self._protection.target

    def wanted(self, agent: str) -> list[dict[str, Any]]:
        """The VMs that an agent is to protect, as rows of the catalog have them; `coming` are those that it is to wait for."""
        check_name(agent)
        running = [one.controller.vm for one in self._protection.running() if one.controller.vm.by == agent]
        found = [(vm, False) for vm in running] + [(vm, True) for vm in self._protection.moves.of(agent)]
        return [
            record.fields_of(vm) | {"coming": coming}
            for vm, coming in found
            if not self._protection.is_held(vm.name)
        ]

    async def arrived(self, agent: str, name: str) -> dict[str, Any]:
        """A VM that an agent waited for runs there; it is that agent's on return."""
        check_name(agent)
        await self._protection.arrived_there(name, agent)
        return {"vm": name}

    async def protect(
        self, agent: str, name: str, connection: Connection, *, disks: list[dict[str, Any]], **how: bool
    ) -> dict[str, Any]:
        """Let an agent protect a VM, whose disks were found on its host: `name`, `device` and `size` of each."""
        check_name(agent)
        found = [FoundDisk(check_name(disk["name"]), disk["device"], "", disk["size"]) for disk in disks]
        return await self._protection.protect_there(name, agent, connection, found, **how)

    def report(
        self,
        agent: str,
        vms: list[dict[str, Any]],
        events: list[dict[str, Any]],
        coming: list[dict[str, str]],
    ) -> dict[str, Any]:
        """Take what an agent sees; the answer says how many VMs of it were its own."""
        check_name(agent)
        for waited in coming:
            self._protection.moves.told(agent, waited["vm"], waited["reason"])
        mine = {vm["vm"]: vm["disks"] for vm in vms}
        taken = 0
        for one in self._protection.running():
            remote = one.controller
            if isinstance(remote, Remote) and remote.vm.by == agent and remote.vm.name in mine:
                remote.report(mine[remote.vm.name])
                taken += 1
        for event in events:
            if event["event"] not in EVENTS:
                continue
            fields = {key: value for key, value in event["fields"].items() if key in FIELDS}
            level: Level = "info"
            for known in ("warning", "error"):
                if event["fields"].get("level") == known:
                    level = known
            self._core.log.emit(event["event"], level=level, agent=agent, **fields)
        return {"taken": taken}

    def check_own(self, agent: str | None, disk: str) -> None:
        """ForbiddenError for a disk of a VM that another than this agent protects; None may ask for any."""
        if agent is None:
            return
        vms = [one.controller.vm for one in self._protection.running()] + self._protection.moves.of(agent)
        if not any(vm.by == agent and any(one.name == disk for one in vm.disks) for vm in vms):
            raise ForbiddenError(
                f"{disk} is of no VM that the agent {agent} protects"[:300], hint="cdp status shows who does"
            )

    # -- a mirror's other side -------------------------------------------------------------------------------

    async def mirror(self, disk: str) -> dict[str, Any]:
        """Who a disk is, where its mirror writes to, and what its worker says."""
        time_ns = (
            self._core.clock.now_ns()
        )  # before the answer: an agent takes the moment at which it has it for a later one
        uuid, _ = await self._protection.target.identity(disk)
        entry = self._core.entry(disk)
        uris = self._core.disk_uris(entry, await self._core.thread(self._core.secret, entry))
        return {
            "uuid": uuid,
            "uris": {kind: mirror_uri(uri, uuid) for kind, uri in uris.items()},
            "said": (await self._protection.target.state(disk)).as_dict(),
            "time_ns": time_ns,
        }
