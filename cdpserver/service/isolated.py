"""An operator's own look at a point: its VM runs apart from everything until it is ended, and nothing of it stays.

It is shown among the recoveries, since that is what it rehearses: *running*, then *done* when the guest has ended it, *aborted*
when an operator has, *failed* when it could not be started or the service ended.
"""

from dataclasses import replace
from typing import Any

import trio

from cdpserver.names import format_time
from cdpserver.service.core import Core
from cdpserver.service.drills import Drills, read_template
from cdpserver.service.launching import Vm
from cdpserver.vm.trial import record
from cdpserver.vm.trial.record import Trial

STATES = {"running": "running", "ended": "done", "passed": "done", "failed": "failed"}


class Isolated:
    """The isolated VMs of a state directory."""

    def __init__(self, drills: Drills) -> None:
        self._core: Core = drills.trials.core
        self._trials = drills.trials
        self._drills = drills

    @staticmethod
    def has(which: str) -> bool:
        """Is this the id of one?"""
        return which.startswith("isolated-")

    async def start(
        self, point: str, vm_command: str | None, accel: str | None, *, force: bool
    ) -> dict[str, Any]:
        """Boot it; its monitor listens on return."""
        begun = trio.current_time()
        core = self._core
        chosen = await self._drills.accels.choose(accel)
        found = None if vm_command is None else await core.thread(read_template, vm_command)
        one = await self._trials.begin("isolated", point, force=force, command=vm_command or "")
        one = replace(one, spans={"export": round((trio.current_time() - begun) * 1000)})
        await core.thread(core.catalog.put_row, "trials", one.row())
        await self._trials.isolated(one, await core.thread(self._drills.command, found, one, chosen))
        return await self.show(one.id)

    async def show(self, id: str) -> dict[str, Any]:
        """One of them, as recoveries are shown. NotFoundError."""
        one = await self._core.thread(record.find, self._core.catalog, id)
        return await self._core.thread(self._shown, one)

    async def list_all(self) -> list[dict[str, Any]]:
        """All that are kept, oldest first."""
        found = await self._core.thread(record.all_of, self._core.catalog)
        return await self._core.thread(lambda: [self._shown(one) for one in found if one.kind == "isolated"])

    async def abort(self, id: str) -> dict[str, Any]:
        """End it; everything of it is gone on return."""
        await self._trials.stop(id)
        return await self.show(id)

    def _shown(self, one: Trial) -> dict[str, Any]:
        running = one.state == "running"
        uris = [self._trials.uri(disk) for disk in one.disks]
        places = Vm(self._core, one.id).places
        disks = [
            {
                "point": f"{disk.disk}@seq:{disk.seq}",
                "time": format_time(one.time_ns),
                "fork": disk.fork,
                "uri": uri,
            }
            for disk, uri in zip(one.disks, uris, strict=True)
        ]
        events = [(one.created_ns, "started"), *([(one.ended_ns, one.state)] if one.ended_ns else [])]
        return {
            "id": one.id,
            "name": one.id,
            "mode": "mirror",
            "vm": one.id,
            "overwrites": False,
            "protected": False,
            "what": one.what,
            "state": "aborted" if one.state == "ended" and one.reason else STATES[one.state],
            "phase": "isolated" if running else "discarded",
            "copied_bytes": 0,
            "total_bytes": 0,
            "rto_ms": one.spans.get("export", 0),
            "reason": one.reason,
            "created": format_time(one.created_ns),
            "qmp": str(places.qmp),
            "events": [{"time": format_time(time_ns), "event": what} for time_ns, what in events],
            "uri": uris[0],
            "disks": disks,
            "launched": {
                "running": running,
                "qmp": str(places.qmp),
                "agent": str(places.agent),
                "serial": str(places.serial),
            },
        }
