"""After the target was killed and is back: journals that it had open are opened again, so that their tails become durable.

A kill loses nothing acknowledged, but only an open journal is committed twice a second; a client that does not come back would
leave its last records to the kernel's own writeback, and `lag_ns` unknown.
"""

from collections.abc import Sequence

import trio

from cdpserver.catalog import Entry
from cdpserver.errors import CdpError
from cdpserver.journal.log import Journal
from cdpserver.journal.segment import OPEN
from cdpserver.service.children import Child
from cdpserver.service.core import Core
from cdpserver.target.placement import worker_of

LOOK_S = 0.5


async def watch(core: Core, targets: Sequence[Child]) -> None:
    """Do it at each start of a worker; for ever."""
    seen = [0] * len(targets)
    while True:
        for number, target in enumerate(targets):
            if target.starts != seen[number]:
                seen[number] = target.starts
                await settle(core, number, len(targets))
        await trio.sleep(LOOK_S)


async def settle(core: Core, worker: int, workers: int) -> None:
    """Make every journal of a worker durable that was left open. What fails is an event: the disk's clients will meet it too."""
    for entry in (await core.thread(core.catalog.names)).values():
        if entry.state != "live" or worker_of(entry.id, workers) != worker:
            continue
        if not await core.thread(_left_open, core, entry):
            continue
        try:
            await core.targets.call(entry.id, "commit", disk=entry.name)
        except CdpError as error:
            core.log.emit("target.tail-not-durable", level="warning", disk=entry.name, reason=str(error))


def _left_open(core: Core, entry: Entry) -> bool:
    try:
        journal = Journal(core.state.timeline(entry.id))
        try:
            return not journal.empty and journal.newest()[1].state == OPEN
        finally:
            journal.close()
    except (CdpError, OSError):
        return False
