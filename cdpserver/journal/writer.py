"""The writer of a timeline's journal: the only process and the only object that appends records.

    write -> payload into the data file -> header into the log -> tail word -> acknowledged
    commit (twice a second, FLUSH, FUA) -> fdatasync data, fdatasync log -> durable record

Invariants: nothing is acknowledged before its record is in the page cache (so a kill loses nothing); seq and time are
given together under `_lock`; an I/O error but a full file system, and want of memory, poison the writer until it is reopened.
Durability: `commit` returns when everything acknowledged before the call is durable.
Threads: any; `_lock` is held for one record at a time, `_commit_lock` for one commit; fdatasync runs under `_commit_lock` alone.
"""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cdpserver import durable, limits, memory
from cdpserver.errors import BrokenError, CdpError, CorruptError, NoSpaceError, RefusedError
from cdpserver.journal import control, recovery
from cdpserver.journal.around import whole_blocks
from cdpserver.journal.hashing import LARGE, beside
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import DATA, DURABLE, NO_DIGEST, Kind, payload_digest
from cdpserver.journal.resync import Reads, Resync
from cdpserver.journal.segment import CLOSED, OPEN, ROLLED, TAIL_WORD, Header, SegmentWriter
from cdpserver.limits import BLOCK, SECTOR


class JournalWriter:
    """Appends to one timeline. Open it with the timeline's writer lock held."""

    def __init__(
        self, directory: Path, *, uuid: bytes, size: int, clock_ns: Callable[[], int], boot_id: str
    ) -> None:
        self.directory = directory
        self.uuid = uuid
        self.size = size
        self.boot_id = boot_id
        self.state = control.State()
        self.last_seq = self.last_time_ns = 0
        self.change_seq = self.durable_seq = self.payload_bytes = 0
        self.recovered: dict[str, Any] | None = None
        self.slow_s = 0.0
        self.reads: Reads | None = None
        self._clock_ns = clock_ns
        self._oldest_ns = clock_ns()
        self._lock = threading.RLock()
        self._commit_lock = threading.Lock()
        self._retired: list[SegmentWriter] = []
        self._fresh_dirs: list[Path] = []
        self._broken: str = ""
        self._jump = (-1, 0)
        self._resync: Resync | None = None
        self._ends_interval = False
        self._segment = self._take_over()
        self.size = self.state.size or size
        self._track_resync()

    # -- opening ---------------------------------------------------------------------------------------------

    def _take_over(self) -> SegmentWriter:
        journal = Journal(self.directory)
        try:
            found = recovery.survey(journal, self.boot_id)
            place, count = found.valid[-1] if found.valid else recovery.newest_sealed(journal)
            self._adopt(journal, place, count, found.durable_seq)
            header = journal.reader(*place).header
            if found.damaged:
                raise CorruptError(
                    f"{self.directory.name}: record {self.last_seq + 1} is damaged, though {found.durable_seq} was durable",
                    hint="nothing was cut: points before it can be read, and cdp check says what is lost",
                )
            if found.unclean:
                return self._after_unclean_boot(journal, found, place)
            if not found.valid:
                return self._durable(self._follow(place))
            for (interval, number), kept in found.valid[:-1]:
                older = journal.reader(interval, number).header
                self._retire(SegmentWriter(interval_path(self.directory, interval), older, count=kept))
        finally:
            journal.close()
        segment = SegmentWriter(interval_path(self.directory, place[0]), header, count=count)
        if header.boot_id != self.boot_id or segment.full:
            fresh = self._follow(place)
            if header.boot_id == self.boot_id:
                self._retire(segment)
            else:
                # Another boot closed it cleanly, so it is durable. Left unsealed it would look as if it had not.
                self._durable(fresh)
                segment.seal()
            return fresh
        segment.clear_after_tail()
        segment.set_state(OPEN)
        return segment

    def _follow(self, place: tuple[int, int]) -> SegmentWriter:
        """A new segment after the newest one, in an interval of its own if that one ends with a cut."""
        ends, self._ends_interval = self._ends_interval, False
        return self._new_segment(place, self.last_seq + 1, new_interval=ends)

    def _durable(self, segment: SegmentWriter) -> SegmentWriter:
        """A boot's first segment is durable before anything in it is acknowledged: a later boot sees that it was there."""
        segment.sync()
        for path in dict.fromkeys(self._fresh_dirs):
            durable.fsync_dir(path)
        self._fresh_dirs = []
        return segment

    def _retire(self, segment: SegmentWriter) -> None:
        """The segment is followed by another one; the next commit seals it."""
        segment.set_state(ROLLED)
        self._retired.append(segment)

    def _adopt(self, journal: Journal, place: tuple[int, int], count: int, durable_seq: int) -> None:
        self.last_seq, self.last_time_ns, self.state = recovery.last_state(journal, place, count)
        self._ends_interval = recovery.ends_with_cut(journal, place, count)
        self.change_seq = self.last_seq
        self.durable_seq = min(durable_seq, self.last_seq)

    def _after_unclean_boot(
        self, journal: Journal, found: recovery.Survey, place: tuple[int, int]
    ) -> SegmentWriter:
        lost_after, lost_time = self.last_seq, self.last_time_ns
        cut, missing = recovery.cut_after(journal, found)
        self.recovered = {"durable_seq": found.durable_seq, "kept_seq": lost_after, "cut_records": cut}
        if missing:
            self.recovered["empty_or_missing"] = missing
        first_seq = max(found.durable_seq, lost_after) + limits.SEQ_JUMP
        segment = self._segment = self._new_segment(place, first_seq, new_interval=self._ends_interval)
        self._ends_interval = False
        self._jump = (lost_after, segment.header.first_seq)
        self.last_seq = segment.header.first_seq - 1
        if not self.state.fork:
            reason = "unclean host boot"
            self._put_control(control.gap(from_seq=lost_after, from_time_ns=lost_time, reason=reason))
        self.change_seq = self.last_seq
        self._durable(segment)
        # Sealed last: until the gap is on record, the unsealed segments are what tells of it.
        for (interval, number), kept in found.valid:
            header = journal.reader(interval, number).header
            older = SegmentWriter(interval_path(self.directory, interval), header, count=kept)
            older.sync()
            older.words[TAIL_WORD] = kept
            older.seal()
        return segment

    def _new_segment(self, after: tuple[int, int], first_seq: int, *, new_interval: bool) -> SegmentWriter:
        interval, number = (after[0] + 1, 1) if new_interval else (after[0], after[1] + 1)
        now = max(self._clock_ns(), self.last_time_ns)
        path = interval_path(self.directory, interval)
        number = recovery.free_number(path, number)
        header = Header(self.uuid, interval, number, first_seq, now, self.boot_id, self.state)
        if new_interval:
            path.mkdir(exist_ok=True)
            self._fresh_dirs.append(path.parent)
        segment = SegmentWriter.create(path, header)
        self._fresh_dirs.append(path)
        return segment

    # -- writing ---------------------------------------------------------------------------------------------

    def write(self, payload: memoryview, offset: int) -> None:
        """Journal one write; on return it survives a kill of any process.

        Raises NoSpaceError (nothing written, the writer goes on) or BrokenError (poisoned).
        """
        length, resync = len(payload), self._resync  # *synced*, said by another thread, ends it at any moment
        if self.slow_s:
            time.sleep(self.slow_s)
        if (offset | length) % BLOCK and not self._ends_disk(offset, length):
            self._write_around(payload, offset)
        elif resync is not None and resync.wants(offset, length):
            self._write_resync(resync, payload, offset)
        else:
            digest = payload_digest(payload) if length < LARGE else None
            with self._lock:
                self._put_data(payload, offset, digest)

    def zero(self, offset: int, length: int, kind: Kind = Kind.ZERO) -> None:
        """Journal a zero or trim: one record without payload (and small writes at unaligned edges)."""
        first = -(-offset // BLOCK) * BLOCK
        end = offset + length
        last = end if end == self.size else end // BLOCK * BLOCK
        if first >= last:
            self._write_around(memoryview(bytes(length)), offset)
            return
        if offset < first:
            self._write_around(memoryview(bytes(first - offset)), offset)
        while first < last:
            step = min(last - first, limits.MAX_EXTENT)
            with self._lock:
                self._reserve(0)
                self._publish(kind, step // SECTOR, first, 0, NO_DIGEST)
            first += step
        if last < end:
            self._write_around(memoryview(bytes(end - last)), last)

    def _ends_disk(self, offset: int, length: int) -> bool:
        return offset % BLOCK == 0 and offset + length == self.size

    def _write_around(self, payload: memoryview, offset: int) -> None:
        assert self.reads is not None
        # Reading and writing under the one lock: a neighbour's write to the same block can't fall between.
        with self._lock:
            first, whole = whole_blocks(self.reads, payload, offset, self.size)
            self._put_data(memoryview(whole), first, payload_digest(whole))

    def _put_data(self, payload: memoryview, offset: int, digest: bytes | None) -> None:
        length = len(payload)
        if self._broken or self._ends_interval or not self._segment.takes(length):
            self._reserve(length)
        append = self._segment.append_payload
        try:
            if digest is None:
                place, digest = beside(payload, append)
            else:
                place = append(payload)
            self._publish(DATA, length // SECTOR, offset, place, digest)
        except (OSError, *memory.NONE) as error:
            raise self._failed(error) from error
        self.payload_bytes += length

    def _reserve(self, length: int, *, fresh: bool = False) -> None:
        """Room for one more record and its payload, `fresh` as the first of its segment. Under `_lock`."""
        if self._broken:
            raise BrokenError(self._broken, hint="the service reopens the writer")
        segment = self._segment
        try:
            if self._ends_interval:
                self._roll(new_interval=True)
            elif segment.full or (fresh and segment.count) or not segment.fits(length):
                self._roll(new_interval=segment.header.segment >= limits.INTERVAL_SEGMENTS)
            else:
                segment.reserve()
        except (OSError, *memory.NONE) as error:
            raise self._failed(error) from error

    def _roll(self, *, new_interval: bool) -> None:
        old = self._segment
        place = (old.header.interval, old.header.segment)
        self._segment = self._new_segment(place, self.last_seq + 1, new_interval=new_interval)
        self._ends_interval = False
        # Readers look for a following segment only where its state tells them to.
        self._retire(old)

    def _publish(self, kind: int, sectors: int, offset: int, place: int, digest: bytes) -> None:
        now = self._clock_ns()
        if now < self.last_time_ns:
            now = self.last_time_ns
        seq = self.last_seq + 1
        self._segment.put(kind, sectors, seq, now, offset, place, digest)
        self.last_seq = seq
        self.last_time_ns = now
        if kind != DURABLE:
            if self.change_seq <= self.durable_seq:
                self._oldest_ns = now
            self.change_seq = seq

    def _put_control(self, message: dict[str, Any]) -> tuple[int, int]:
        """Journal a control record and fold it into the state; (seq, time). Under `_lock`."""
        payload = control.encode(message)
        self._reserve(len(payload))
        try:
            place = self._segment.append_payload(payload)
            self._publish(Kind.CONTROL, 0, len(payload), place, payload_digest(payload))
            self.state = control.fold(self.state, message, seq=self.last_seq, time_ns=self.last_time_ns)
        except (OSError, *memory.NONE) as error:
            raise self._failed(error) from error
        return self.last_seq, self.last_time_ns

    def _failed(self, error: Exception) -> CdpError | MemoryError:
        if not isinstance(error, OSError) or error.errno == errno.ENOMEM:
            self._broken = "no memory"  # and what is half done, a record, a segment, nobody here knows
            return MemoryError(self._broken)
        if error.errno in durable.NO_SPACE:
            return NoSpaceError(
                "the store's file system is full", hint="free space; nothing acknowledged is lost"
            )
        self._broken = f"writing to {self.directory.name} failed: {error.strerror or error}"
        return BrokenError(self._broken, hint="look at the store's disk; the service reopens the writer")

    @property
    def interval(self) -> int:
        """The interval that records go to now."""
        return self._segment.header.interval

    def records_after(self, seq: int) -> int:
        """Records after `seq`; those that an unclean boot jumped over are none."""
        with self._lock:
            jumped = self._jump[1] - self._jump[0] - 1 if seq <= self._jump[0] else 0
            return max(0, self.last_seq - seq - jumped)

    @property
    def broken(self) -> str:
        """Why the writer is poisoned, or nothing."""
        return self._broken

    # -- resync ----------------------------------------------------------------------------------------------

    def _track_resync(self) -> None:
        """Begin to compare, or stop, as the state says."""
        under_way = self.state.resync_ref >= 0 and not self.state.synced and not self.state.fork
        self._resync = Resync(self.size) if under_way else None

    def _write_resync(self, resync: Resync, payload: memoryview, offset: int) -> None:
        assert self.reads is not None
        ref = self.state.resync_ref
        if ref < 0:
            with self._lock:
                self._put_data(payload, offset, payload_digest(payload))
            return
        runs = self.reads.changed_from(ref, offset, payload)
        for start, end, ref in runs:
            part = payload[start:end]
            if ref < 0:
                digest = payload_digest(part)
                with self._lock:
                    self._put_data(part, offset + start, digest)
            else:
                with self._lock:
                    self._reserve(0)
                    self._publish(Kind.SAME, (end - start) // SECTOR, offset + start, ref, NO_DIGEST)
        resync.compared(offset, len(payload), found_same=any(ref >= 0 for _, _, ref in runs))

    # -- control records -------------------------------------------------------------------------------------

    def begin_session(self, reason: str) -> int:
        """A new session: points are unordered until it is synced. Returns its number."""
        with self._lock:
            number = self.state.session + 1
            self._put_control(control.session(number, reason))
            self._track_resync()
        return number

    def synced(self, message: dict[str, Any]) -> tuple[int, int]:
        """The mirror of a session is complete, says *synced*. RefusedError for a session that is over."""
        number = message["session"]
        with self._lock:
            if number != self.state.session:
                raise RefusedError(
                    f"session {number} is over; the current one is {self.state.session}",
                    hint="its connection was lost or another one wrote; resync, then say synced for that session",
                )
            result = self._put_control(message)
            self._track_resync()
        self.commit()
        return result

    def mark(self, message: dict[str, Any], *, interval: int | None = None) -> tuple[int, int]:
        """A bookmark, durable on return: (seq, time) of its record. RefusedError unless that is in `interval`."""
        with self._lock:
            self._reserve(0)
            if interval not in (None, self.interval):
                raise RefusedError("a base point was cut meanwhile", hint="set the bookmark again")
            result = self._put_control(message)
        self.commit()
        return result

    def cut(self) -> tuple[int, int, int]:
        """End the interval with a base point's cut, durable on return: (number, seq, time)."""
        with self._lock:
            number = self.state.cuts
            seq, time_ns = self._put_control(control.cut(number))
            # A cut is the last record of its interval, also if opening the next one fails now, or after a kill.
            self._ends_interval = True
            self._reserve(0)
        self.commit()
        return number, seq, time_ns

    def grow(self, size: int) -> tuple[int, int]:
        """From here the disk has `size` bytes, more than before; durable on return: (seq, time)."""
        with self._lock:
            assert size > self.size
            # First of its segment: whoever looks for a size looks at one header page and one record.
            self._reserve(0, fresh=True)
            result = self._put_control(control.grow(size))
            self.size = size
            if self._resync is not None:
                self._resync = self._resync.grown(size)
        self.commit()
        return result

    # -- durability ------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Is there anything acknowledged that is not durable? Takes no lock; what comes meanwhile is seen by the next look."""
        return self.change_seq > self.durable_seq

    def lag_ns(self) -> int:
        """Age of the oldest acknowledged record that is not durable yet; 0 when all are."""
        with self._lock:
            return max(0, self._clock_ns() - self._oldest_ns) if self.change_seq > self.durable_seq else 0

    def commit(self) -> None:
        """Make everything acknowledged before the call durable. Waiters share one commit."""
        wanted = self.change_seq
        with self._commit_lock:
            if self.durable_seq >= wanted:
                return
            if self._broken:
                raise BrokenError(self._broken)
            try:
                with self._lock:
                    upto, started, current = self.change_seq, self._clock_ns(), self._segment
                    retired, self._retired = self._retired, []
                    fresh, self._fresh_dirs = self._fresh_dirs, []
                self._sync(current, retired, fresh)
            except memory.NONE as error:
                raise self._failed(error) from error
            with self._lock:
                self.durable_seq = upto
                self._oldest_ns = started
                self._reserve(0)
                self._publish(Kind.DURABLE, 0, 0, upto, NO_DIGEST)

    def _sync(self, current: SegmentWriter, retired: list[SegmentWriter], fresh: list[Path]) -> None:
        try:
            for segment in retired:
                segment.sync()
            current.sync()
            for path in dict.fromkeys(fresh):
                durable.fsync_dir(path)
            for segment in retired:
                segment.seal()
        except (OSError, CdpError) as error:
            # Whatever failed, the kernel may have dropped the pages: nothing may be taken for durable any more.
            self._broken = f"making {self.directory.name} durable failed: {error}"
            raise BrokenError(self._broken, hint="look at the store's disk") from error

    def close(self) -> None:
        """Make everything durable and close cleanly: a later boot finds nothing missing."""
        with self._commit_lock, self._lock:
            try:
                if not self._broken:
                    # Also what a commit's own record left behind when it went into a new segment.
                    retired, self._retired = self._retired, []
                    self._sync(self._segment, retired, self._fresh_dirs)
                    self._segment.set_state(CLOSED)
                    self._segment.sync()
                    self.durable_seq = self.change_seq
            finally:
                self._broken = self._broken or "the writer is closed"
                self._segment.close()
