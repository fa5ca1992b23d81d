"""An independent oracle: what a disk held after any change, and what a journal's files say. Nothing of the project is imported.

Two tellings of the same history, which the tests hold against each other and against the server:

    Model       what a client did: a list of changes with their seqs and times; content by painting them in order
    read_log    what is on disk: header logs read by docs/format.md alone, records in order, payload checked
"""

import struct
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import msgpack
from blake3 import blake3

BLOCK = 4096
SECTOR = 512
SECOND_NS = 1_000_000_000
DATA, ZERO, TRIM, SAME, CONTROL, DURABLE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a disk: after `seq`, `data` (zeros if None) stands at [offset, end)."""

    seq: int
    time_ns: int
    offset: int
    end: int
    data: bytes | None


@dataclass
class Model:
    """A disk's history. Changes of the first copy have seq 0; a fork begins with a parent's content."""

    size: int
    parent: "Model | None" = None
    parent_seq: int = 0
    changes: list[Change] = field(default_factory=list)
    instants: list[int] = field(default_factory=list)
    grown: list[tuple[int, int]] = field(default_factory=list)
    """(seq from which the disk had more bytes, how many it had before); `size` is how many it has now."""

    def grow(self, *, seq: int, size: int) -> None:
        """The disk has `size` bytes from `seq` on; 0 is the first copy, of which no instant is kept."""
        assert size > self.size
        if seq:
            self.grown.append((seq, self.size))
        self.size = size

    def size_at(self, seq: int) -> int:
        """Bytes of the disk just after `seq`."""
        return next((before for at, before in self.grown if at > seq), self.size)

    def write(self, *, seq: int, time_ns: int, offset: int, data: bytes) -> None:
        """The disk holds `data` at `offset` from `seq` on."""
        assert offset + len(data) <= self.size
        self._add(Change(seq, time_ns, offset, offset + len(data), data))

    def zero(self, *, seq: int, time_ns: int, offset: int, length: int) -> None:
        """The disk holds zeros there from `seq` on."""
        assert offset + length <= self.size
        self._add(Change(seq, time_ns, offset, offset + length, None))

    def _add(self, change: Change) -> None:
        assert not self.changes or self.changes[-1].seq <= change.seq
        self.changes.append(change)

    def remember(self, seq: int) -> None:
        """`seq` ended a request: the content then is known."""
        if not self.instants or self.instants[-1] != seq:
            self.instants.append(seq)

    @property
    def latest(self) -> int:
        """The newest instant known."""
        return self.instants[-1]

    def instant_at(self, time_ns: int) -> int:
        """Seq of the newest change at or before a time; 0 for none."""
        index = bisect_right(self.changes, time_ns, key=lambda change: change.time_ns)
        return self.changes[index - 1].seq if index else 0

    def read(self, seq: int, offset: int, length: int) -> bytes:
        """Content of [offset, offset + length) just after `seq`."""
        end = offset + length
        held = bytearray(length)
        if self.parent is not None:
            held[:] = self.parent.read(self.parent_seq, offset, length)
        for change in self.changes:
            if change.seq > seq:
                break
            low, high = max(change.offset, offset), min(change.end, end)
            if low >= high:
                continue
            if change.data is None:
                held[low - offset : high - offset] = bytes(high - low)
            else:
                held[low - offset : high - offset] = change.data[low - change.offset : high - change.offset]
        return bytes(held)

    def touched(self, limit: int = 1 << 62) -> list[tuple[int, int]]:
        """Ranges that any data was ever written to, whole blocks and their neighbours; all else always reads as zeros."""
        found = [] if self.parent is None else self.parent.touched(limit)
        found += [
            (max(0, (c.offset // BLOCK - 1) * BLOCK), min(self.size, (-(-c.end // BLOCK) + 1) * BLOCK))
            for c in self.changes
            if c.data is not None and c.seq <= limit
        ]
        return union(found)

    def is_zero(self, seq: int, start: int, end: int) -> bool:
        """Does all of [start, end) read as zeros?"""
        ranges = clip(self.touched(), start, end)
        return not any(self.read(seq, low, high - low).strip(b"\0") for low, high in ranges)


def equals_but(held: bytes, expected: bytes, doubt: list[tuple[int, bytes]]) -> bool:
    """Each sector is as expected, or as some of the refused requests left it."""
    for start in range(0, len(expected), 512):
        allowed = {expected[start : start + 512]}
        for at, data in doubt:
            low, high = max(at, start), min(at + len(data), start + 512)
            if low < high:
                part = data[low - at : high - at]
                allowed |= {a[: low - start] + part + a[high - start :] for a in allowed}
        if held[start : start + 512] not in allowed:
            return False
    return True


def union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint and ascending."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def clip(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts inside [start, end)."""
    cut = [(max(low, start), min(high, end)) for low, high in ranges]
    return [(low, high) for low, high in cut if low < high]


# --- the journal's files, by docs/format.md


class BadLogError(Exception):
    """A log that docs/format.md does not allow."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One record as it stands in a header log."""

    interval: int
    segment: int
    kind: int
    seq: int
    time_ns: int
    offset: int
    length: int
    place: int
    payload: bytes
    message: dict[str, Any]

    @property
    def changes(self) -> bool:
        """Does it change the disk?"""
        return self.kind in (DATA, ZERO, TRIM, SAME)


def read_header(log: bytes) -> dict[str, Any]:
    """The map of a header page."""
    magic, version, length = struct.unpack_from("<8sII", log)
    if magic != b"CDPSEG\r\n" or version != 1 or 64 + length + 4 > BLOCK:
        raise BadLogError("no header page")
    values = log[64 : 64 + length]
    (check,) = struct.unpack_from("<I", log, 64 + length)
    if check != zlib.crc32(values, zlib.crc32(log[:16])):
        raise BadLogError("header page fails its check")
    header: dict[str, Any] = msgpack.unpackb(values)
    return header


def read_segment(log_path: Path) -> tuple[dict[str, Any], list[LogRecord]]:
    """The header map and every published record of one segment; BadLogError for a record that is not whole."""
    log = log_path.read_bytes()
    data = log_path.with_suffix(".data").read_bytes()
    header = read_header(log)
    (count,) = struct.unpack_from("<Q", log, 16)
    salt = zlib.crc32(struct.pack("<16sQQ", header["timeline"], header["interval"], header["segment"]))
    records = []
    for number in range(count):
        raw = log[BLOCK + number * 64 : BLOCK + number * 64 + 64]
        record = _record(raw, data, salt, header)
        if record.seq != header["first_seq"] + number:
            raise BadLogError(f"{log_path.name}: record {number} has seq {record.seq}")
        records.append(record)
    return header, records


def _record(raw: bytes, data: bytes, salt: int, header: dict[str, Any]) -> LogRecord:
    if len(raw) != 64 or struct.unpack_from("<I", raw, 60)[0] != zlib.crc32(raw[:60], salt):
        raise BadLogError("a record fails its check")
    magic, version, kind, sectors, seq, time_ns, offset, place, digest = struct.unpack(
        "<HBBIQQQQ20s", raw[:60]
    )
    if magic != 0xCD50 or version != 1 or not DATA <= kind <= DURABLE:
        raise BadLogError("no record")
    length = offset if kind == CONTROL else sectors * SECTOR
    payload = data[place : place + length] if kind in (DATA, CONTROL) else b""
    if kind in (DATA, CONTROL) and (len(payload) != length or blake3(payload).digest()[:20] != digest):
        raise BadLogError(f"the payload of record {seq} has another digest")
    message = msgpack.unpackb(payload) if kind == CONTROL else {}
    at = 0 if kind == CONTROL else offset
    return LogRecord(
        header["interval"], header["segment"], kind, seq, time_ns, at, length, place, payload, message
    )


def segment_logs(timeline: Path) -> list[Path]:
    """Every header log of a timeline, oldest first."""
    return sorted((timeline / "intervals").glob("[0-9]*/[0-9]*.log"))


def read_log(timeline: Path) -> list[LogRecord]:
    """Every record of a timeline, oldest first. BadLogError unless seqs and times go up."""
    records = [record for path in segment_logs(timeline) for record in read_segment(path)[1]]
    for before, after in pairwise(records):
        if after.seq <= before.seq or after.time_ns < before.time_ns:
            raise BadLogError(f"record {after.seq} follows {before.seq}")
    return records


def replay(records: list[LogRecord], base: Model, upto: int) -> Model:
    """The disk as records up to `upto` tell it, on `base` (at its seq 0: the first copy, or a fork's parent)."""
    told = Model(base.size_at(0), base.parent, base.parent_seq, [c for c in base.changes if c.seq == 0])
    for r in records:
        if r.seq > upto:
            break
        if r.message.get("type") == "grow":
            told.grow(seq=r.seq, size=r.message["size"])
        if not r.changes:
            continue
        # An extent at an unaligned disk end is stored whole.
        end = min(r.offset + r.length, told.size)
        if r.kind == DATA:
            told.write(seq=r.seq, time_ns=r.time_ns, offset=r.offset, data=r.payload[: end - r.offset])
        elif r.kind == SAME:
            held = told.read(r.place, r.offset, end - r.offset)
            told.write(seq=r.seq, time_ns=r.time_ns, offset=r.offset, data=held)
        else:
            told.zero(seq=r.seq, time_ns=r.time_ns, offset=r.offset, length=end - r.offset)
    return told


@dataclass(frozen=True, slots=True)
class Second:
    """What a recovery point should say: everything that changed in one second of record time."""

    second: int
    last_seq: int
    last_time_ns: int
    records: int
    payload_bytes: int
    session: int
    grade: str


def seconds(records: list[LogRecord]) -> list[Second]:
    """The recovery points of a whole journal."""
    graded: list[tuple[LogRecord, int, str]] = []
    session, synced, fork = 0, False, False
    for r in records:
        kind = r.message.get("type")
        if kind == "begin":
            session, fork = r.message["session"], r.message["mode"] == "point"
        elif kind == "session":
            session, synced = r.message["session"], False
        elif kind == "synced":
            synced = r.message["write_blocking"]
        elif kind == "gap":
            synced = False
        if r.changes:
            graded.append((r, session, "crash" if fork or synced else "unordered"))
    found = []
    for second, group in groupby(graded, key=lambda item: item[0].time_ns // SECOND_NS):
        items = list(group)
        last, last_session, grade = items[-1]
        payload = sum(r.length for r, _, _ in items if r.kind == DATA)
        found.append(Second(second, last.seq, last.time_ns, len(items), payload, last_session, grade))
    return found
