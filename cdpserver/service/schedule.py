"""Bookmarks by the clock: `mark_every` and `freeze` of a VM's policy."""

from datetime import UTC, datetime
from typing import Any

import trio

from cdpserver.catalog.derived import Derived
from cdpserver.errors import CdpError
from cdpserver.names import is_attached, split_name
from cdpserver.retention import policies
from cdpserver.service.core import Core
from cdpserver.service.marks import Marks

SECOND_NS = 1_000_000_000

LOOK_S = 1.0

FREEZE = "yes"


class Schedule:
    """Marks VMs, and disks that are of none, when their policy says so."""

    def __init__(self, core: Core, marks: Marks) -> None:
        self._core = core
        self._marks = marks
        self._wanted = Derived(core.catalog, self._read)
        self._slots: dict[str, tuple[int, int]] = {}
        self._said = ""

    async def keep_marking(self) -> None:
        """Until cancelled. A time that passes while the service is down is passed over."""
        async with trio.open_nursery() as nursery:
            while True:
                for name, freeze in await self._due():
                    nursery.start_soon(self._mark, name, freeze)
                await trio.sleep(LOOK_S)

    async def _due(self) -> list[tuple[str, bool]]:
        """What is to be marked now, and whether its guest is to be frozen."""
        try:
            wanted = await self._core.thread(self._wanted.now)
        except CdpError as error:
            if str(error) != self._said:
                self._core.log.emit("point.schedule-failed", level="warning", reason=str(error))
            self._said = str(error)
            return []
        self._said = ""
        now_ns = self._core.clock.now_ns()
        before, self._slots = self._slots, {}
        due = []
        for name, (every_ns, freeze) in wanted.items():
            self._slots[name] = (every_ns, now_ns // every_ns)
            seen = before.get(name, self._slots[name])
            if seen[0] == every_ns and seen[1] < now_ns // every_ns:
                due.append((name, freeze))
        return due

    def _read(self) -> dict[str, tuple[int, bool]]:
        """(how often, whether frozen) by the name of a VM or disk. A policy that cannot be read is passed over."""
        core, found = self._core, {}
        rows = core.catalog.rows("policies")
        for entry in core.catalog.names().values():
            name = split_name(entry.name)[1] or entry.name
            if entry.state == "live" and name not in found and not is_attached(name):
                policy = policies.of_vm_or_disk(rows, core.config, entry)
                if policy.mark_every_ns is not None:
                    found[name] = (policy.mark_every_ns, policy.freeze == FREEZE)
        return found

    async def _mark(self, name: str, freeze: bool) -> None:
        at = datetime.fromtimestamp(self._core.clock.now_ns() // SECOND_NS, UTC)
        bookmark = f"auto-{at:%Y-%m-%dT%H.%M.%SZ}"
        try:
            made: dict[str, Any] = await self._marks.mark(
                name, bookmark, freeze=freeze and await self._is_vm(name), or_crash=True
            )
        except CdpError as error:
            self._core.log.emit("point.mark-failed", level="warning", disk=name, reason=str(error))
            return
        if made.get("reason"):
            self._core.log.emit(
                "point.not-frozen", level="warning", disk=name, bookmark=bookmark, reason=made["reason"]
            )

    async def _is_vm(self, name: str) -> bool:
        return await self._core.thread(self._core.catalog.get, name) is None
