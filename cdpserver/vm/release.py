"""The end of a protection in QEMU: nothing of ours is left there."""

from collections.abc import Iterable

import trio

from cdpserver.vm.bitmaps import Bitmaps
from cdpserver.vm.changes import Changes
from cdpserver.vm.marks import Mark
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Monitor


async def release(monitor: Monitor, uuids: Iterable[str]) -> None:
    """End the mirrors of the disks with these uuids, and take their bitmaps away. Raises what the monitor does."""
    for uuid in uuids:
        mirror = Mirror(monitor, uuid)
        await Changes(monitor, mirror, trio.Lock()).clean()
        await mirror.end()
        await Mark(monitor, mirror).remove()
        await Bitmaps(monitor, mirror).remove_all()
