"""Filling one disk of a running VM, which writes at home from the start, from the point that it stands on.

    guest ──► DISK.qcow2 at home ──backing──► raw ──► nbd: the point, read-only
                    ▲                                  │
                    └────────── block-stream ──────────┘

Two passes. QEMU 7.2 ends `block-stream` by taking the backing file out of the header without flushing what it copied: a QEMU
that is killed then leaves zeros. So the first pass, which copies, is cancelled when it has everything, the file is flushed, and
a second one, which finds nothing to copy, changes the header. That one goes by itself: as long as such a job is kept its
filter is a node without a child, and QEMU 7.2 dies (SIGSEGV in bdrv_refresh_filename) of the next query for nodes, which is for
another disk.
"""

from cdpserver.vm.qmp import Monitor
from cdpserver.vm.recovery import jobs
from cdpserver.vm.recovery.jobs import MoveFailedError, Progress
from cdpserver.vm.recovery.move import Move
from cdpserver.vm.recovery.record import RecoveredDisk

MAX_RESUMES = 200
"""Looks in a row at which the copy stood because the point could not be read; then the recovery has failed."""


class StreamMove(Move):
    """One disk in one QEMU."""

    def __init__(self, monitor: Monitor, id: str, number: int, disk: RecoveredDisk, fork_uri: str) -> None:
        super().__init__(monitor, id, number, disk, fork_uri)
        self._end = f"{self._job}-end"
        self._resumes = 0

    @property
    def _point(self) -> str:
        return f"{self.disk.disk}@seq:{self.disk.seq}"

    @property
    def expected(self) -> str:
        """What the VM is to run on, in words: the file that is filled."""
        return self.disk.target

    async def is_there(self) -> bool:
        """Does the VM run on the file at home?"""
        return self._at_home(await self._graph()) is not None

    async def is_home(self) -> bool:
        """The same, and it needs the point no more."""
        return await super().is_home() and not (await self._graph()).used_on_export(self._point)

    async def is_under_way(self) -> bool:
        """Is there a job of either pass?"""
        return bool([job for job in (self._job, self._end) if await jobs.find(self._monitor, job)])

    async def begin_home(self) -> None:
        """Begin to copy what is not there yet."""
        if not await self.is_home():
            await self._stream(self._job, auto=False)

    async def _stream(self, job: str, *, auto: bool) -> None:
        arguments = {
            "job-id": job,
            "device": await self.home_node(),
            "on-error": "stop",
            "auto-finalize": auto,
            "auto-dismiss": auto,
        }
        await self._monitor.execute("block-stream", arguments)

    async def progress(self) -> Progress:
        """How far it is; goes from the first pass to the second. MoveFailedError if it cannot go on."""
        if await jobs.find(self._monitor, self._end):
            return await self._look(self._end)
        if await jobs.find(self._monitor, self._job):
            return await self._look(self._job)
        if not await self.is_home():
            raise MoveFailedError(jobs.UNKNOWN)
        return Progress(self.disk.size, self.disk.size, ready=True)

    async def _look(self, id: str) -> Progress:
        found = await jobs.find(self._monitor, id)
        if found is None:  # the second pass has just ended
            return Progress(self.disk.size, self.disk.size, ready=False)
        copied, total = int(found["current-progress"]), int(found["total-progress"])
        match found["status"]:
            case "pending":
                await self._second_pass()
            case "concluded" | "aborting" | "null":
                await jobs.ended(self._monitor, id, self.disk.disk)
                raise MoveFailedError("the copy was ended by somebody else")
            case "paused":
                await self._resume(id)
            case _:
                self._resumes = 0
        return Progress(copied, total, ready=False)

    async def _second_pass(self) -> None:
        await jobs.cancel(self._monitor, self._job)
        await self.settle()
        await self._stream(self._end, auto=True)

    async def _resume(self, id: str) -> None:
        """A copy that stands goes on, unless what it met will not pass by itself."""
        shown = await jobs.find_block_job(self._monitor, id)
        if shown is None:
            return
        if shown["io-status"] == "nospace":
            raise MoveFailedError(f"QEMU could not copy {self.disk.disk}: No space left on device")
        self._resumes += 1
        if self._resumes > MAX_RESUMES:
            raise MoveFailedError(f"QEMU could not copy {self.disk.disk}: {self._point} cannot be read")
        await self._monitor.execute("block-job-resume", {"device": id})

    async def hold(self) -> None:
        """Nothing: the VM is at home."""

    async def pivot(self) -> None:
        """Nothing: the file at home is whole."""

    async def let_go(self) -> None:
        """Close the connection to the point."""
        await self._close(self._point)

    async def clear(self, *, keep_home: bool = False) -> None:
        """End the copy; what is at home stays, and stands on the point as before."""
        if keep_home:
            await super().clear(keep_home=True)
            return
        for job in (self._job, self._end):
            await jobs.cancel(self._monitor, job)
