"""Our side of the mirrors, for the controllers of running VMs: what they may ask and say of a disk."""

from typing import Any

import trio

from cdpserver import timeline
from cdpserver.errors import CdpError
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.hung import Hung
from cdpserver.vm.disks import check_size
from cdpserver.vm.mirror import mirror_uri
from cdpserver.vm.target import Ago, At, SeenJob, TargetState

ASK_S = 5.0
"""A worker that restarts is back in a fraction of this."""


class OwnTarget:
    """The workers of this service (`vm.target.Target`). `nursery` is where first base points are written."""

    def __init__(
        self, core: Core, disks: Disks, base_points: BasePoints, hung: Hung, nursery: trio.Nursery
    ) -> None:
        self._core = core
        self._disks = disks
        self._base_points = base_points
        self._hung = hung
        self._nursery = nursery

    async def identity(self, disk: str) -> tuple[str, str]:
        """(uuid of its timeline, URI of the disk's own socket)."""
        core = self._core
        entry = core.entry(disk)
        found = await core.thread(timeline.load, core.state.timeline(entry.id))
        uris = core.disk_uris(entry)
        uuid = found.uuid.hex()
        return uuid, mirror_uri(uris.get("uri_unix") or uris["uri"], uuid)

    async def check_size(self, disk: str, size: int) -> None:
        """The disk grows with its source. RefusedError for one that has shrunk."""
        here = int((await self._disks.show(disk))["size"])
        check_size(disk, here=here, there=size)
        if size > here:
            await self._disks.resize(disk, size)

    async def state(self, disk: str) -> TargetState:
        """What the worker says. It opens the disk for that: a mirror that lost it may have nothing to write."""
        entry = self._core.entry(disk)
        return TargetState.read(await self._core.targets.call(entry.id, "look", disk=disk))

    async def holds(self, disk: str, place: str) -> bool:
        """Is a place that it was at in its history?"""
        entry = self._core.entry(disk)
        return bool(await self._core.targets.call(entry.id, "holds", disk=disk, place=place))

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: SeenJob | None = None) -> None:
        """Points are `crash` from here on. The first base point follows, which takes as long as the disk is large."""
        entry = self._core.entry(disk)
        observed = None if seen is None else seen.as_dict()
        said = {"session": session, "write_blocking": True, "bitmap": bitmap, "observed": observed}
        await self._core.targets.call(entry.id, "synced", disk=disk, **said)
        if not bitmap:
            self._nursery.start_soon(self._begin, disk)

    async def _begin(self, disk: str) -> None:
        try:
            await self._base_points.begin(disk)
        except CdpError as error:
            # It is cut again after the next `bp_every`.
            self._core.log.emit("basepoint.first-failed", level="warning", disk=disk, reason=str(error))

    async def lost(self, disk: str, session: int, reason: str, *, ago: Ago) -> None:
        """A gap begins, and points are `unordered` after it."""
        # By now, and not when the worker hears it: what is on its way for a while would move the gap.
        await self.lost_at(disk, session, reason, at=At.of(ago, now_ns=self._core.clock.now_ns()))

    async def lost_at(self, disk: str, session: int, reason: str, *, at: At) -> None:
        """The same with times of the server's clock."""
        entry = self._core.entry(disk)
        said = {"session": session, "reason": reason, "whole_ns": at.whole_ns, "freed_ns": at.freed_ns}
        await self._core.targets.call(entry.id, "lost", disk=disk, **said)

    def hung_s(self, disk: str) -> float:
        """For how long its worker has not answered."""
        entry = self._core.catalog.get(disk)
        return 0.0 if entry is None else self._hung.for_s(entry.id)

    def emit(self, event: str, **fields: Any) -> None:
        """An event of the service."""
        self._core.log.emit(event, **fields)
