"""The end of mirrors in QEMU: of a protection, of which nothing is left there then, or to begin anew in another way."""

from collections.abc import Iterable

import trio

from cdpserver.errors import RefusedError
from cdpserver.vm.bitmaps import Bitmaps
from cdpserver.vm.changes import Changes
from cdpserver.vm.marks import Mark
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Monitor


async def release(monitor: Monitor, uuids: Iterable[str]) -> None:
    """End the mirrors of the disks with these uuids, and take their bitmaps away. Raises what the monitor does."""
    for uuid in uuids:
        mirror = await _end(monitor, uuid, force=False)
        await Mark(monitor, mirror).remove()
        await Bitmaps(monitor, mirror).remove_all()


async def end_mirrors(monitor: Monitor, uuids: Iterable[str]) -> None:
    """End mirrors that are to begin anew in another way; their bitmaps stay, so that only what changes meanwhile is sent then.

    RefusedError if that takes too long, and what the monitor raises.
    """
    for uuid in uuids:
        await _end(monitor, uuid, force=True)


async def _end(monitor: Monitor, uuid: str, *, force: bool) -> Mirror:
    mirror = Mirror(monitor, uuid)
    await Changes(monitor, mirror, trio.Lock()).clean()
    try:
        await mirror.end(force=force)
    except RefusedError:
        # A write of the guest waits for a target that hangs, or has no room. An operator's word ends that, too.
        if not await mirror.free_guest():
            raise
        await mirror.end(force=True)
    return mirror
