"""Thins one interval: writes it anew with the records that its instants need, and swaps the two directories.

    intervals/000007/            segments 1..3, index          -> removed
    intervals/.thin-000007/      segments 4.., index, instants -> 000007

Durability: the new directory is whole and durable before the two change places by one renameat2(2), so whoever dies leaves one or
the other under the name. Segment numbers go on counting: no path ever means two contents, so a reader that has opened either
interval never mixes them. What a killed pass leaves has a name of its own, and the next one removes it (`tidy`).
Locks: `intervals_alone` for who thins; for the moment of the swap `chain.lock`, the leases and the index besides.
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cdpserver import durable
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.index.build import add_run, close_index
from cdpserver.index.indexer import index_lock
from cdpserver.index.store import CLOSED_NAME, IndexFile
from cdpserver.journal.control import State
from cdpserver.journal.instants import Instants
from cdpserver.journal.links import Chain
from cdpserver.journal.log import Journal, Run, fold_controls, interval_path
from cdpserver.journal.record import RECORD_SIZE, Kind, payload_digest
from cdpserver.journal.recovery import payload_whole
from cdpserver.journal.segment import PAGE, Header, SegmentReader, SegmentWriter
from cdpserver.limits import BLOCK, INDEX_BATCH, MAX_CONTROL_BYTES, SECTOR, SEGMENT_BYTES
from cdpserver.retention.survivors import choose, survivors
from cdpserver.retention.thinning import Thinning
from cdpserver.timeline import INTERVALS

PREFIX = ".thin-"
BUILDING = "open-thin.mdb"

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""renameat2(2)."""

_libc = ctypes.CDLL(None, use_errno=True)

SPARE = 64 << 20
"""Room that is left to everybody else: thinning gives room back, but needs some first."""


Needed: TypeAlias = Callable[[], AbstractContextManager[frozenset[int]]]


def tidy(timeline: Path) -> None:
    """Remove what a killed pass left. Under `intervals_alone`."""
    for left in (timeline / INTERVALS).glob(f"{PREFIX}*"):
        durable.remove_tree(left)


def used(directory: Path) -> int:
    """The room that an interval takes."""
    with os.scandir(directory) as files:
        return sum(file.stat().st_blocks * SECTOR for file in files)


def estimate(timeline: Path, thinning: Thinning) -> int:
    """About how many bytes come back: payload and headers as counted, the index in proportion. CorruptError, RefusedError."""
    journal = Journal(timeline)
    try:
        instants = _choose(journal, thinning)
        records = payload = 0
        for parts in survivors(journal, thinning.number, instants):
            sizes = (parts["end"] - parts["start"])[parts["kind"] == Kind.DATA]
            payload += int((-(-sizes // BLOCK) * BLOCK).sum())
            records += len(parts)
        numbers = journal.segments(thinning.number)
        held = max(1, sum(journal.reader(thinning.number, number).count for number in numbers))
    finally:
        journal.close()
    index = (interval_path(timeline, thinning.number) / CLOSED_NAME).stat().st_blocks * SECTOR
    return max(0, thinning.bytes - payload - PAGE - records * RECORD_SIZE - index * records // held)


def thin(timeline: Path, thinning: Thinning, needed: Needed) -> int:
    """Thin an interval, under `intervals_alone`; the bytes that come back. Durable on return.

    `needed` is entered for the swap: it locks, and says which seqs of the interval somebody needs by now.
    RefusedError if it needs others than were kept, or if the file system has no room or cannot swap; CorruptError for damage in
    the interval. It is as before then.
    """
    path = interval_path(timeline, thinning.number)
    new = path.with_name(f"{PREFIX}{path.name}")
    before, inode = used(path), path.stat().st_ino
    _check_room(timeline, before)
    try:
        with durable.io_errors("thin", path):
            _write(timeline, thinning, new)
        with needed() as seqs:
            _swap(timeline, path, new, inode, seqs, thinning.reason)
    finally:
        # What was thinned is there now, or what was not finished.
        durable.remove_tree(new)
    return max(0, before - used(path))


def _check_room(timeline: Path, needed: int) -> None:
    found = os.statvfs(timeline)
    if found.f_bavail * found.f_frsize < needed + SPARE:
        raise RefusedError(
            f"thinning an interval of {timeline.name} needs up to {needed} bytes, and there is no room for that",
            hint="free space on the store's file system, or let history be dropped: cdp policy set --size-cap",
        )


def _choose(journal: Journal, thinning: Thinning) -> Instants:
    return choose(journal, thinning.number, thinning.every_ns, exact=thinning.exact, held=thinning.held)


def _write(timeline: Path, thinning: Thinning, new: Path) -> None:
    """The new directory: segments, instants, index; everything in it durable."""
    journal = Journal(timeline)
    try:
        durable.make_dir(new, 0o755)
        instants = _choose(journal, thinning)
        with contextlib.closing(_Writer(journal, thinning, new)) as writer:
            for parts in survivors(journal, thinning.number, instants):
                writer.take(parts)
            writer.seal()
        header = journal.first_reader(thinning.number).header
        instants.write(new, timeline=header.timeline, interval=thinning.number)
    finally:
        journal.close()
    _index(new, thinning.number)
    durable.fsync_dir(new)


class _Writer:
    """Copies parts of records into segments of the new directory, each payload verified."""

    def __init__(self, journal: Journal, thinning: Thinning, new: Path) -> None:
        self._journal = journal
        self._interval = thinning.number
        self._every_ns = thinning.every_ns
        self._new = new
        self._number = journal.segments(thinning.number)[-1]
        first = journal.first_reader(thinning.number).header
        self._segment = self._open(first.first_seq, first.first_time_ns, first.carry)
        self._seq = 0
        self._payload: tuple[tuple[int, int], bytes] = ((0, 0), b"")

    def _open(self, first_seq: int, time_ns: int, carry: State) -> SegmentWriter:
        self._number += 1
        first = self._journal.first_reader(self._interval).header
        header = Header(
            first.timeline,
            self._interval,
            self._number,
            first_seq,
            time_ns,
            first.boot_id,
            carry,
            self._every_ns,
        )
        return SegmentWriter.create(self._new, header)

    def take(self, parts: npt.NDArray[np.void]) -> None:
        """Parts by ascending seq."""
        for part in parts:
            reader = self._journal.reader(self._interval, int(part["segment"]))
            number = int(part["number"])
            record = reader.records(number, number + 1)[0]
            seq, time_ns = int(record["seq"]), int(record["time"])
            length = int(part["end"]) - int(part["start"])
            full = self._segment.full or self._segment.place + length > SEGMENT_BYTES
            # A disk grows with the first record of a segment: its size is looked up there.
            grows = int(record["kind"]) == Kind.CONTROL and reader.control(record)["type"] == "grow"
            if (full or grows) and self._segment.count and seq != self._seq:
                self._roll(seq, time_ns)
            self._seq = seq
            self._segment.reserve()
            self._put(reader, number, record, int(part["start"]), length)

    def _put(self, reader: SegmentReader, number: int, record: np.void, start: int, length: int) -> None:
        kind, seq, time_ns = int(record["kind"]), int(record["seq"]), int(record["time"])
        offset, place, digest = int(record["offset"]), int(record["place"]), record["digest"].tobytes()
        if kind == Kind.CONTROL:
            payload = self._verified(reader, number, record, offset)
            self._segment.put(kind, 0, seq, time_ns, offset, self._segment.append_payload(payload), digest)
            return
        if kind == Kind.DATA:
            payload = self._verified(reader, number, record, int(record["length"]) * SECTOR)
            piece = payload[start - offset : start - offset + length]
            digest = digest if len(piece) == len(payload) else payload_digest(piece)
            place, offset = self._segment.append_payload(piece), start
        self._segment.put(kind, length // SECTOR, seq, time_ns, offset, place, digest)

    def _verified(self, reader: SegmentReader, number: int, record: np.void, length: int) -> bytes:
        """The payload of a record. CorruptError if it is damaged: nothing that is wrong gets a new digest."""
        key = (reader.segment, number)
        if self._payload[0] != key:
            seq = int(record["seq"])
            if int(record["kind"]) == Kind.CONTROL and length > MAX_CONTROL_BYTES:
                raise CorruptError(f"control record {seq} claims {length} bytes")
            if not payload_whole(reader, record):
                raise CorruptError(
                    f"the payload of record {seq} does not match its digest",
                    hint="cdp check says what it touches",
                )
            self._payload = (key, reader.payload(int(record["place"]), length))
        return self._payload[1]

    def _roll(self, seq: int, time_ns: int) -> None:
        old, count = self._segment.header, self._segment.count
        self.seal()
        with contextlib.closing(SegmentReader(self._new, old.segment)) as reader:
            state = fold_controls(reader, old.carry, 0, count)
        self._segment = self._open(seq, time_ns, state)

    def seal(self) -> None:
        """The segment is durable and sealed."""
        self._segment.sync()
        self._segment.seal()

    def close(self) -> None:
        """Close the files of a segment that was not sealed."""
        self._segment.close()


def _index(new: Path, interval: int) -> None:
    building = new / BUILDING
    index = IndexFile(building, writable=True)
    try:
        for number in _segments(new):
            with contextlib.closing(SegmentReader(new, number)) as reader:
                for first in range(0, reader.count, INDEX_BATCH):
                    end = min(first + INDEX_BATCH, reader.count)
                    add_run(index, Run(reader, interval, reader.records(first, end)))
        close_index(new, index)
    finally:
        index.env.close()
        for path in new.glob(f"{BUILDING}*"):
            path.unlink()


def _swap(timeline: Path, path: Path, new: Path, inode: int, needed: frozenset[int], reason: str) -> None:
    with index_lock(timeline) as mine:
        if not mine or path.stat().st_ino != inode or not (path / CLOSED_NAME).exists():
            raise RefusedError(
                f"the index of {timeline.name} is being written", hint="the next pass thins the interval"
            )
        with contextlib.closing(SegmentReader(new, _segments(new)[0])) as reader:
            instants, uuid = reader.instants, reader.header.timeline
        assert instants is not None
        if any(seq not in instants for seq in needed):
            raise RefusedError(
                f"interval {int(path.name)} of {timeline.name} is needed at an instant that came to be held meanwhile",
                hint="the next pass thins it around that",
            )
        with durable.io_errors("thin", path):
            with Chain.open(timeline, uuid) as links:
                links.thin(int(path.name), new, reason=reason)
            durable.fsync_dir(new)
            exchange(new, path)
        durable.fsync_dir(path.parent)


def _segments(directory: Path) -> list[int]:
    """Numbers of the segments in an interval's directory that has no name of its own yet."""
    return sorted(int(path.stem) for path in directory.glob("*.log"))


def exchange(left: Path, right: Path) -> None:
    """Two names change places, atomically. RefusedError if the file system cannot; OSError."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0:
        return
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):
        raise RefusedError(
            f"the file system of {right.parent} cannot swap two directories, so history is not thinned",
            hint="keep the state directory on ext4, XFS, Btrfs or tmpfs; or say keep_rp without steps",
        )
    raise OSError(error, os.strerror(error), str(right))
