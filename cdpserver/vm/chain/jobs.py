"""A job of QEMU from its start to its end: what it says on the way, completed or cancelled, and dismissed."""

from collections.abc import Mapping
from typing import Any

import trio

from cdpserver.errors import BrokenError, NoSpaceError
from cdpserver.progress import Progress, nobody
from cdpserver.vm.chain.plan import JOB_PREFIX
from cdpserver.vm.qmp import Monitor

LOOK_S = 0.5
"""How often a job is asked for: events hurry it, and they can be lost."""

CANCEL_S = 30.0
"""How long a job may take to end after it was cancelled."""


async def run_job(
    monitor: Monitor,
    job: str,
    command: str,
    arguments: Mapping[str, Any],
    *,
    complete: bool = False,
    progress: Progress = nobody,
) -> None:
    """Start a job, or join the one of that id, and wait until it has ended well; with `complete` it is told to end
    when it is ready.

    BrokenError or NoSpaceError for its failure. Cancelled, it cancels the job and waits for its end.
    """
    if await _find(monitor, job) is None:
        await monitor.execute(command, arguments)
    try:
        await _until_concluded(monitor, job, complete=complete, progress=progress)
    except trio.Cancelled:
        with trio.CancelScope(shield=True), trio.move_on_after(CANCEL_S):
            await monitor.execute("job-cancel", {"id": job})
            await _until_concluded(monitor, job)
            await monitor.execute("job-dismiss", {"id": job})
        raise
    ended = await _find(monitor, job)
    await monitor.execute("job-dismiss", {"id": job})
    if error := (ended or {}).get("error"):
        kind = NoSpaceError if "No space left" in error else BrokenError
        raise kind(f"QEMU's job failed: {error}", hint="look at the images: qemu-img check FILE")


async def dismiss_ended(monitor: Monitor) -> None:
    """Dismiss the jobs of ours that ended while nobody waited."""
    for job in await monitor.execute("query-jobs"):
        if job["id"].startswith(JOB_PREFIX) and job["status"] == "concluded":
            await monitor.execute("job-dismiss", {"id": job["id"]})


async def _until_concluded(
    monitor: Monitor, job: str, *, complete: bool = False, progress: Progress = nobody
) -> None:
    told = False
    while True:
        found = await _find(monitor, job)
        if found is None:
            raise BrokenError(f"QEMU has no job {job} any more", hint="somebody else has dismissed it")
        if found["status"] == "concluded":
            return
        progress(found["current-progress"] / max(found["total-progress"], 1))
        if complete and not told and found["status"] == "ready":
            await monitor.execute("job-complete", {"id": job})
            told = True
            continue
        with trio.move_on_after(LOOK_S):
            await _changed(monitor, job)


async def _changed(monitor: Monitor, job: str) -> None:
    """Wait until a job's state changes, or events were lost."""
    while (event := await monitor.next_event()) is not None:
        if event.name == "JOB_STATUS_CHANGE" and event.data.get("id") == job:
            return


async def _find(monitor: Monitor, job: str) -> dict[str, Any] | None:
    jobs: list[dict[str, Any]] = await monitor.execute("query-jobs")
    return next((found for found in jobs if found["id"] == job), None)
