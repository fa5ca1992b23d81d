"""One client of a disk: its requests, counted, on the first copy or the journal, whichever there is.

Threads: all requests of a connection come from one; the switch from first copy to journal takes `lock` meanwhile.
"""

import threading
from time import perf_counter_ns
from typing import Protocol

from cdpserver.errors import NoSpaceError, RemovedError, UsageError
from cdpserver.journal.control import FIRST_WRITE
from cdpserver.journal.firstcopy import FirstCopy
from cdpserver.journal.record import Kind
from cdpserver.journal.writer import JournalWriter
from cdpserver.target.counts import NOT_TIMED, Counts
from cdpserver.target.reads import LiveReads
from cdpserver.timeline import Timeline


class Disk(Protocol):
    """What a connection needs of the disk that it is to (`target.disk.TargetDisk`)."""

    timeline: Timeline
    size: int
    full: str
    gone: bool
    first_copy: FirstCopy | None
    journal: JournalWriter | None
    reads: LiveReads | None

    def begin_session(self, reason: str) -> None:
        """Points are unordered from here on, until *synced*."""

    def flush(self) -> None:
        """Everything acknowledged before, over all connections, is durable on return."""

    def sync(self) -> None:
        """As `flush`, for FUA."""

    def refused(self) -> None:
        """A client has heard of an error, and goes on without what it wrote."""

    def disconnect(self, connection: "Connection") -> None:
        """A client is gone."""


class Connection:
    """One client of one disk. All requests of a connection come from one thread at a time."""

    __slots__ = ("_disk", "born_ns", "counts", "lock", "replaced", "size", "thread_state", "waits", "wrote")

    def __init__(self, disk: Disk, born_ns: int | None = None) -> None:
        self._disk = disk
        self.born_ns = born_ns
        """When a mirror connected, of which a disk has one at a time; None for any other client."""
        self.replaced = False
        """A later mirror is there: what still comes over this connection is of the past, and would overwrite what is newer."""
        self.size = disk.size
        """Bytes of the disk when the client connected: it is told once. A disk that grows shows it to the next one."""
        self.lock = threading.Lock()
        self.counts = Counts()
        self.wrote = False
        self.waits = False
        """Its guest is to wait for room, rather than hear that there is none."""
        self.thread_state = 0
        """What the plugin must give back when the connection ends."""

    @property
    def name(self) -> str:
        """The disk's name when it was opened."""
        return self._disk.timeline.full_name

    def _check(self, offset: int, length: int, *, writing: bool = False) -> None:
        disk = self._disk
        if writing and disk.full:
            raise NoSpaceError(
                disk.full, hint="raise its size_cap, or let it shorten history: cdp policy set"
            )
        if disk.gone:
            raise RemovedError(f"{disk.timeline.full_name} is closed")
        if writing and self.replaced:
            raise RemovedError(f"{disk.timeline.full_name} has another mirror now", hint="connect again")
        if offset < 0 or length < 0 or offset + length > disk.size:
            raise UsageError(
                f"[{offset}, {offset + length}) is beyond the disk's {disk.size} bytes",
                hint="stay below its size: cdp disk list",
            )

    def _first_write(self) -> None:
        # In this order: a session that could not begin, for want of space, begins with the next write.
        self._disk.begin_session(FIRST_WRITE)
        self.wrote = True

    def _refused(self, error: BaseException, *, writing: bool) -> None:
        """What the client asked for failed. A mirror marks that place, and its guest goes on without: what is written here from
        then on is not all that the guest wrote. So with a mirror's read, of which it makes a write of whole blocks.
        """
        hears = not (self.waits and isinstance(error, NoSpaceError))
        if hears and not self.replaced and (writing or self.wrote):
            self._disk.refused()

    def write(self, payload: memoryview, offset: int, *, fua: int = 0) -> None:
        """On return the write survives a kill of any process; with `fua` a power loss."""
        length = len(payload)
        if not length:
            return
        try:
            with self.lock:
                disk = self._disk
                if disk.gone or disk.full or self.replaced or offset + length > disk.size:
                    self._check(offset, length, writing=True)
                if not self.wrote:
                    self._first_write()
                counts = self.counts
                number = counts.writes
                counts.writes = number + 1
                counts.data_bytes += length
                started = 0 if number & NOT_TIMED else perf_counter_ns()
                journal = disk.journal
                if journal is not None:
                    journal.write(payload, offset)
                else:
                    disk.first_copy.write(payload, offset)  # type: ignore[union-attr]
                if started:
                    counts.timed += 1
                    counts.timed_ns += perf_counter_ns() - started
            if fua:
                disk.sync()
        except BaseException as error:
            self._refused(error, writing=True)
            raise

    def zero(self, offset: int, length: int, *, trim: bool = False, fua: int = 0) -> None:
        """Make a range read as zeros: one record, whatever its length. `fua` as for `write`."""
        if length == 0:
            return
        try:
            with self.lock:
                self._check(offset, length, writing=True)
                if not self.wrote:
                    self._first_write()
                disk = self._disk
                if disk.journal is not None:
                    disk.journal.zero(offset, length, Kind.TRIM if trim else Kind.ZERO)
                else:
                    assert disk.first_copy is not None
                    disk.first_copy.zero(offset, length)
                counts = self.counts
                if trim:
                    counts.trims += 1
                    counts.trim_bytes += length
                else:
                    counts.zeros += 1
                    counts.zero_bytes += length
            if fua:
                disk.sync()
        except BaseException as error:
            self._refused(error, writing=True)
            raise

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """What was written last."""
        try:
            with self.lock:
                self._check(offset, len(buffer))
                disk = self._disk
                if disk.reads is not None:
                    disk.reads.read_into(buffer, offset)
                else:
                    assert disk.first_copy is not None
                    disk.first_copy.read_into(buffer, offset)
                self.counts.reads += 1
                self.counts.read_bytes += len(buffer)
        except BaseException as error:
            self._refused(error, writing=False)
            raise

    def status(self, offset: int, length: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """(start, end, zero) runs from `offset` on."""
        with self.lock:
            self._check(offset, length)
            disk = self._disk
            if disk.reads is not None:
                return disk.reads.status(offset, offset + length, one=one)
            assert disk.first_copy is not None
            return disk.first_copy.status(offset, offset + length)

    def flush(self) -> None:
        """Everything acknowledged before, over all connections, is durable on return."""
        if self._disk.gone:
            raise RemovedError(f"{self._disk.timeline.full_name} is closed")
        self._disk.flush()
        self.counts.flushes += 1

    def close(self) -> None:
        """The client is gone."""
        self._disk.disconnect(self)
