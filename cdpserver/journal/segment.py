"""A segment's two files: the header log with its header page and tail word, and the data file.

    log   | header page 4096 | window 256 KiB | window ... |     records of 64 bytes, tail word in the page
    data  | payload, each record's aligned to 4096 |

Invariants: a record is whole before the tail word counts it, and the tail word is published by one aligned
8-byte store, so another process never reads half a record. A window is allocated before it is mapped: a store
into a sparse mapping on a full file system would be SIGBUS.
Durability: `sync` makes everything published durable; creating a segment is durable after `sync` and an fsync of
its directory, which the writer does in the same commit.
"""

import mmap
import os
import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from cdpserver import durable, limits, messages
from cdpserver.errors import CorruptError
from cdpserver.journal import control
from cdpserver.journal.instants import Instants
from cdpserver.journal.record import BODY, CHECK, DTYPE, MAGIC, RECORD_SIZE, VERSION, salt
from cdpserver.limits import BLOCK, MAX_CONTROL_BYTES, SECTOR, SEGMENT_RECORDS, WINDOW_BYTES

SEGMENT_MAGIC = b"CDPSEG\r\n"
SEGMENT_VERSION = 1
THINNED_VERSION = 2
"""A segment of a thinned interval: seqs have holes, and parts of one record share its seq."""

PAGE = 4096
FIXED = struct.Struct("<8sIIQQ32s")
TAIL_WORD = 2
STATE_WORD = 3
"""Indexes of the two words when the page is seen as 64-bit words."""

OPEN, CLOSED, SEALED, ROLLED = 0, 1, 2, 3
"""Open; closed cleanly (all durable); sealed; followed by another segment, but not sealed yet."""

WINDOW_RECORDS = WINDOW_BYTES // RECORD_SIZE


@dataclass(frozen=True, slots=True)
class Header:
    """What the header page says of a segment, for good. `every_ns`: how far apart its instants are, if it was thinned; else 0."""

    timeline: bytes
    interval: int
    segment: int
    first_seq: int
    first_time_ns: int
    boot_id: str
    carry: control.State
    every_ns: int = 0

    @property
    def thinned(self) -> bool:
        """Records are missing: `instants` beside it says what can be given."""
        return self.every_ns > 0

    @property
    def salt(self) -> int:
        """Start value of the CRCs of this segment's records."""
        return salt(self.timeline, self.interval, self.segment)


def log_path(interval: Path, segment: int) -> Path:
    """The header log of a segment in an interval's directory."""
    return interval / f"{segment:08d}.log"


def data_path(interval: Path, segment: int) -> Path:
    """The data file of a segment in an interval's directory."""
    return interval / f"{segment:08d}.data"


def encode_page(header: Header) -> bytes:
    """The 4096-byte header page of an open, empty segment."""
    fields = {
        "timeline": header.timeline,
        "interval": header.interval,
        "segment": header.segment,
        "first_seq": header.first_seq,
        "first_time_ns": header.first_time_ns,
        "boot_id": header.boot_id,
        "previous": bytes(32),
        "carry": control.pack(header.carry),
    }
    if header.thinned:
        fields["every_ns"] = header.every_ns
    values: bytes = msgpack.packb(fields)
    version = THINNED_VERSION if header.thinned else SEGMENT_VERSION
    fixed = FIXED.pack(SEGMENT_MAGIC, version, len(values), 0, OPEN, bytes(32))
    check = CHECK.pack(zlib.crc32(values, zlib.crc32(fixed[:16])))
    return (fixed + values + check).ljust(PAGE, b"\0")


PAGE_FIELDS: dict[str, type] = {
    "timeline": bytes,
    "interval": int,
    "segment": int,
    "first_seq": int,
    "first_time_ns": int,
    "boot_id": str,
    "carry": dict,
}


def decode_page(page: bytes, name: str) -> Header:
    """The header in a page; CorruptError names the segment."""
    if len(page) < PAGE:
        raise CorruptError(f"{name}: the header page is cut short")
    magic, version, length, _, _, _ = FIXED.unpack_from(page)
    if magic != SEGMENT_MAGIC:
        raise CorruptError(f"{name} is not a segment")
    if version not in (SEGMENT_VERSION, THINNED_VERSION):
        raise CorruptError(
            f"{name} is of version {version}", hint="a newer cdpserver wrote it; upgrade this one"
        )
    end = FIXED.size + length
    if end + CHECK.size > PAGE:
        raise CorruptError(f"{name}: the header page's length is impossible")
    values = page[FIXED.size : end]
    if CHECK.unpack_from(page, end)[0] != zlib.crc32(values, zlib.crc32(page[:16])):
        raise CorruptError(f"{name}: the header page fails its check")
    fields = messages.unpack(values, f"{name}: the header page's map")
    thinned: dict[str, type] = {"every_ns": int} if version == THINNED_VERSION else {}
    for field, wanted in (PAGE_FIELDS | thinned).items():
        value = fields.get(field)
        if type(value) is not wanted or (isinstance(value, int) and value < 0):
            raise CorruptError(f"{name}: the header page has no {field} that can be read")
    return Header(
        timeline=fields["timeline"],
        interval=fields["interval"],
        segment=fields["segment"],
        first_seq=fields["first_seq"],
        first_time_ns=fields["first_time_ns"],
        boot_id=fields["boot_id"],
        carry=control.unpack(fields["carry"]),
        every_ns=fields["every_ns"] if thinned else 0,
    )


def in_order(seqs: npt.NDArray[np.uint64], header: Header, first: int) -> npt.NDArray[np.bool_]:
    """Which seqs are those of records number `first` and on of a segment: counted up by one; in a thinned one they never fall."""
    if not header.thinned:
        numbered = np.arange(len(seqs), dtype=np.uint64) + np.uint64(header.first_seq + first)
    else:
        before = np.concatenate((np.array([header.first_seq], dtype=np.uint64), seqs[:-1]))[: len(seqs)]
        numbered = np.maximum(before, seqs)
    good: npt.NDArray[np.bool_] = seqs == numbered
    return good


def peek(log: Path) -> bytes:
    """The tail and state words of a header log, by its path: they change with every record. Leaves nothing open."""
    fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, 2 * 8, TAIL_WORD * 8)
    finally:
        os.close(fd)


class SegmentWriter:
    """The one writer of a segment. Not thread-safe: the timeline's lock is around every call but `sync`."""

    def __init__(self, directory: Path, header: Header, *, count: int) -> None:
        """Map an existing log and go on after record number `count`."""
        self.header = header
        self.directory = directory
        self.salt = header.salt
        self.count = count
        self.window_start, self._window_end = -1, 0
        self.window: mmap.mmap | None = None
        self.log_fd = self.data_fd = -1
        try:
            self.log_fd = os.open(log_path(directory, header.segment), os.O_RDWR | os.O_CLOEXEC)
            self.data_fd = os.open(data_path(directory, header.segment), os.O_RDWR | os.O_CLOEXEC)
            self.page = mmap.mmap(self.log_fd, PAGE)
            self.words = memoryview(self.page).cast("Q")
            self.place = -(-os.fstat(self.data_fd).st_size // BLOCK) * BLOCK
            self._map_window(count // WINDOW_RECORDS if count < SEGMENT_RECORDS else None)
        except BaseException:
            durable.close_open(self.log_fd, self.data_fd)
            raise

    @classmethod
    def create(cls, directory: Path, header: Header) -> "SegmentWriter":
        """Make both files of a new segment; the log appears whole (by rename)."""
        temporary = directory / f".tmp-{header.segment:08d}.log"
        data = os.open(data_path(directory, header.segment), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.close(data)
        log = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(log, 0, PAGE + WINDOW_BYTES)
            os.pwrite(log, encode_page(header), 0)
        finally:
            os.close(log)
        os.rename(temporary, log_path(directory, header.segment))
        return cls(directory, header, count=0)

    def _map_window(self, number: int | None) -> None:
        if number is None:
            return
        start = PAGE + number * WINDOW_BYTES
        os.posix_fallocate(self.log_fd, start, WINDOW_BYTES)
        window = mmap.mmap(self.log_fd, WINDOW_BYTES, offset=start)
        if self.window is not None:
            self.window.close()
        self.window = window
        self.window_start = number * WINDOW_RECORDS
        self._window_end = min(self.window_start + WINDOW_RECORDS, SEGMENT_RECORDS)

    def clear_after_tail(self) -> None:
        """Zero what a killed writer left after the last published record of the mapped window."""
        assert self.window is not None
        at = (self.count - self.window_start) * RECORD_SIZE
        self.window[at:] = bytes(WINDOW_BYTES - at)

    @property
    def full(self) -> bool:
        """No further record fits."""
        return self.count >= SEGMENT_RECORDS

    def fits(self, length: int) -> bool:
        """Is there room for a payload of `length`? An empty data file takes any."""
        return not self.place or self.place + length <= limits.SEGMENT_BYTES

    def takes(self, length: int) -> bool:
        """Is there room for one more record with that payload, with nothing to be done before?"""
        return self.count < self._window_end and self.fits(length)

    def reserve(self) -> None:
        """Make sure that one more record fits into the mapped window; raises OSError on a full file system."""
        if self.count - self.window_start == WINDOW_RECORDS:
            self._map_window(self.count // WINDOW_RECORDS)

    def put(
        self, kind: int, sectors: int, seq: int, time_ns: int, offset: int, place: int, digest: bytes
    ) -> None:
        """Write one record and publish it. The caller has called `reserve` since the last record."""
        body = BODY.pack(MAGIC, VERSION, kind, sectors, seq, time_ns, offset, place, digest)
        at = (self.count - self.window_start) * RECORD_SIZE
        self.window[at : at + RECORD_SIZE] = body + CHECK.pack(zlib.crc32(body, self.salt))  # type: ignore[index]
        self.count += 1
        self.words[TAIL_WORD] = self.count

    def append_payload(self, payload: bytes | memoryview) -> int:
        """Append a payload to the data file; returns its place. Raises OSError; nothing is then referred to."""
        place, length = self.place, len(payload)
        if length % BLOCK and length % SECTOR == 0:
            # The end of an unaligned disk. Once the disk has grown, the rest of this block is read too, and what a write
            # that failed left there must not show.
            payload = bytes(payload) + bytes(-length % BLOCK)
            length = len(payload)
        written = os.pwrite(self.data_fd, payload, place)
        while written < length:
            # A short write: the rest again, so that a full file system shows itself as ENOSPC.
            written += os.pwrite(self.data_fd, memoryview(payload)[written:], place + written)
        self.place = place + (length + BLOCK - 1) // BLOCK * BLOCK
        return place

    def sync(self) -> None:
        """Make everything published so far durable: payload first, then headers."""
        os.fdatasync(self.data_fd)
        os.fdatasync(self.log_fd)

    def set_state(self, state: int) -> None:
        """OPEN, CLOSED, SEALED or ROLLED; durable with the next `sync`."""
        self.words[STATE_WORD] = state

    def seal(self) -> None:
        """Cut the log to its length and close. Everything in it is durable already."""
        self.set_state(SEALED)
        self.close()
        with open(log_path(self.directory, self.header.segment), "r+b") as log:
            log.truncate(PAGE + self.count * RECORD_SIZE)
            os.fdatasync(log.fileno())

    def close(self) -> None:
        """Unmap and close, once; nothing is made durable here."""
        self.words.release()
        self.page.close()
        if self.window is not None:
            self.window.close()
        durable.close_open(self.log_fd, self.data_fd)
        self.log_fd = self.data_fd = -1


class SegmentReader:
    """A segment as other processes see it: a header, the published records, their payload.

    Its files are closed by `close`, or when nobody has it any more.
    """

    _log_fd = -1
    _data_fd = -1

    def __init__(self, directory: Path, segment: int) -> None:
        self.path = log_path(directory, segment)
        self.directory = directory
        self.segment = segment
        self._log_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.header = decode_page(os.pread(self._log_fd, PAGE, 0), str(self.path))
            if self.header.segment != segment:
                raise CorruptError(f"{self.path} says that it is segment {self.header.segment}")
            self._page = mmap.mmap(self._log_fd, PAGE, prot=mmap.PROT_READ)
        except BaseException:
            self._close_files()
            raise
        self._words = memoryview(self._page).cast("Q")
        self._instants: Instants | None = None

    @property
    def instants(self) -> Instants | None:
        """What a thinned interval can still give; None if this is a whole one. CorruptError."""
        if self._instants is None and self.header.thinned:
            header = self.header
            self._instants = Instants.load(self.directory, timeline=header.timeline, interval=header.interval)
        return self._instants

    @property
    def count(self) -> int:
        """Records published, limited by what the file can hold."""
        held = max(0, os.fstat(self._log_fd).st_size - PAGE) // RECORD_SIZE
        return min(self._words[TAIL_WORD], held)

    @property
    def claimed(self) -> int:
        """Records published, as the tail word says."""
        return self._words[TAIL_WORD]

    @property
    def state(self) -> int:
        """OPEN, CLOSED, SEALED or ROLLED."""
        return self._words[STATE_WORD]

    @property
    def rolled(self) -> bool:
        """The writer has gone on to another segment."""
        return self._words[STATE_WORD] >= SEALED

    @property
    def first_seq(self) -> int:
        """Seq of the first record (also when there is none yet)."""
        return self.header.first_seq

    @property
    def last_seq(self) -> int:
        """Seq of the last published record; first_seq - 1 without any."""
        count = self.count
        return self.seq_of(count - 1) if count else self.header.first_seq - 1

    def seq_of(self, number: int) -> int:
        """Seq of record `number`."""
        if not self.header.thinned:
            return self.header.first_seq + number
        return int.from_bytes(os.pread(self._log_fd, 8, PAGE + number * RECORD_SIZE + 8), "little")

    def count_to(self, seq: int) -> int:
        """How many published records have a seq at or below `seq`."""
        if not self.header.thinned:
            return max(0, min(self.count, seq - self.header.first_seq + 1))
        return bisect_right(range(self.count), seq, key=self.seq_of)

    def page(self) -> bytes:
        """The header page as it is."""
        return os.pread(self._log_fd, PAGE, 0)

    def raw(self, first: int, end: int) -> bytes:
        """The bytes of records number [first, end)."""
        return os.pread(self._log_fd, (end - first) * RECORD_SIZE, PAGE + first * RECORD_SIZE)

    def records(self, first: int, end: int) -> npt.NDArray[np.void]:
        """Records number [first, end) as a structured array; every header is checked.

        Raises CorruptError for the first one that fails.
        """
        raw = self.raw(first, end)
        bad = self.first_bad(raw, first)
        if bad < end - first:
            raise CorruptError(
                f"{self.path}: record {self.header.first_seq + first + bad} is damaged",
                hint="cdp check says what it touches",
            )
        return np.frombuffer(raw, DTYPE)

    def first_bad(self, raw: bytes, first: int) -> int:
        """How many records at the start of `raw` are whole and in order; `raw` starts with number `first`."""
        start, crc32 = self.header.salt, zlib.crc32
        array = np.frombuffer(raw, DTYPE, count=len(raw) // RECORD_SIZE)
        good = (array["magic"] == MAGIC) & (array["version"] == VERSION)
        good &= in_order(array["seq"], self.header, first)
        limit = len(array) if bool(good.all()) else int(np.argmin(good))
        body = BODY.size
        for number, check in enumerate(array["crc"][:limit].tolist()):
            at = number * RECORD_SIZE
            if crc32(raw[at : at + body], start) != check:
                return number
        return limit

    def data_fd(self) -> int:
        """The data file, opened on first use."""
        if self._data_fd < 0:
            path = data_path(self.directory, self.segment)
            try:
                self._data_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not self.directory.is_dir():
                    raise  # the timeline is being removed
                raise CorruptError(f"{path} is missing", hint="cdp check says what it touches") from None
        return self._data_fd

    def payload(self, place: int, length: int) -> bytes:
        """`length` bytes of payload; shorter only when the data file ends."""
        return os.pread(self.data_fd(), length, place)

    def control(self, record: np.void) -> dict[str, Any]:
        """The message of a control record."""
        length = int(record["offset"])
        if length > MAX_CONTROL_BYTES:
            raise CorruptError(f"{self.path}: control record {int(record['seq'])} claims {length} bytes")
        return control.decode(self.payload(int(record["place"]), length))

    def time_of(self, number: int) -> int:
        """Time of record `number`."""
        return int.from_bytes(os.pread(self._log_fd, 8, PAGE + number * RECORD_SIZE + 16), "little")

    def close(self) -> None:
        """Unmap, and close both files."""
        self._words.release()
        self._page.close()
        self._close_files()

    def _close_files(self) -> None:
        durable.close_open(self._log_fd, self._data_fd)
        self._log_fd = self._data_fd = -1

    def __del__(self) -> None:
        """The mapping goes by itself."""
        self._close_files()
