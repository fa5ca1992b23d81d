"""QEMU's block jobs by the names that we gave them: looked at, waited for, dismissed."""

from dataclasses import dataclass
from typing import Any

import trio

from cdpserver.errors import BrokenError
from cdpserver.vm.qmp import Monitor, QmpRefusedError

LOOK_S = 0.02
"""Between two looks at a job that is about to end."""

OVER = ("concluded", "aborting", "null")

UNKNOWN = "QEMU knows nothing of the copy any more: it was started anew, or somebody ended it"

NOWHERE = "cdp-nowhere"
"""A node that no QEMU has."""


class MoveFailedError(BrokenError):
    """The copy ended with an error; the VM goes on where it was."""

    usual_hint = "look at the reason, then: cdp recover retry"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is."""

    copied: int
    total: int
    ready: bool


async def find(monitor: Monitor, id: str) -> dict[str, Any] | None:
    """What QEMU says of a job; None if it has none of this id."""
    jobs: list[dict[str, Any]] = await monitor.execute("query-jobs")
    return next((job for job in jobs if job["id"] == id), None)


async def find_block_job(monitor: Monitor, id: str) -> dict[str, Any] | None:
    """The same as a block job, with its I/O status."""
    jobs: list[dict[str, Any]] = await monitor.execute("query-block-jobs")
    return next((job for job in jobs if job["device"] == id), None)


async def is_pending(monitor: Monitor, id: str) -> bool:
    """Wait until a job that was told to complete has done all but change the graph; False if it has ended."""
    while (found := await find(monitor, id)) is not None and found["status"] not in OVER:
        if found["status"] == "pending":
            return True
        await trio.sleep(LOOK_S)
    return False


async def end_of(monitor: Monitor, id: str) -> str:
    """Wait for the end of a job and dismiss it; its error, or an empty text."""
    while True:
        found = await find(monitor, id)
        if found is None:
            return ""
        if found["status"] == "concluded":
            break
        await trio.sleep(LOOK_S)
    await monitor.execute("job-dismiss", {"id": id})
    return str(found.get("error", ""))


async def ended(monitor: Monitor, id: str, what: str) -> None:
    """Wait for the end of a job and dismiss it. MoveFailedError with its error."""
    if reason := await end_of(monitor, id):
        raise MoveFailedError(f"QEMU could not copy {what}: {reason}")


async def cancel(monitor: Monitor, id: str) -> None:
    """End a job, if there is one, and dismiss it; whatever it wrote stays."""
    if (found := await find(monitor, id)) is not None:
        if found["status"] not in ("concluded", "null"):
            await monitor.execute("job-cancel", {"id": id})
        await end_of(monitor, id)


async def flush(monitor: Monitor, node: str) -> None:
    """What was written to a node is on stable storage, and a QCOW2 file whole as it is. MoveFailedError.

    QEMU has no command for it that a qemu-storage-daemon knows too; but it flushes a node before it looks for the overlay of a
    snapshot, and there is none here. No job may be on the node.
    """
    try:
        await monitor.execute("blockdev-snapshot", {"node": node, "overlay": NOWHERE})
    except QmpRefusedError as error:
        if NOWHERE in error.desc:
            return
        raise MoveFailedError(f"QEMU could not flush {node}: {error.desc}") from None
    raise AssertionError("a snapshot without an overlay")
