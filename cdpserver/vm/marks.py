"""A mark in QEMU of what the target of a mirror held: kept by the process that the mirror's dirty places are of.

A mirror job sends what the target is missing, as QEMU knows it. A target that comes back as an older copy of itself is missing
more, and a controller that has just begun has not seen it before. So what it held is kept in QEMU: in a `secret` object, which is
no secret here, but a string by name.
"""

import trio

from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Monitor, QmpRefusedError

EVERY_S = 2.0
"""Between two marks: an older copy of the target is known if it is older by this."""


class Mark:
    """That of one mirror. Its methods raise what the monitor does."""

    def __init__(self, monitor: Monitor, mirror: Mirror) -> None:
        self._monitor = monitor
        self._id = f"{mirror.name}-held"
        self._kept = ""
        self._due_at = 0.0

    async def read(self) -> str:
        """The place that the target held; nothing if none was marked."""
        path = {"path": f"/objects/{self._id}", "property": "data"}
        try:
            return str(await self._monitor.execute("qom-get", path))
        except QmpRefusedError:
            return ""

    async def keep(self, place: str) -> None:
        """The target holds this place now; said at most every EVERY_S."""
        now = trio.current_time()
        if place == self._kept or now < self._due_at:
            return
        await self.remove()
        await self._monitor.execute("object-add", {"qom-type": "secret", "id": self._id, "data": place})
        self._kept, self._due_at = place, now + EVERY_S

    async def remove(self) -> None:
        """No mark any more."""
        self._kept = ""
        if await self.read():
            await self._monitor.execute("object-del", {"id": self._id})
