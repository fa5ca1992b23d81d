"""The 64-byte record of the header log.

    0      2   3    4       8    16    24      32     40      60
    magic  ver kind length  seq  time  offset  place  digest  crc
                    (x512)

A record describes one extent of one request. Its CRC covers the whole header and is started with the identity
of its segment, so that a record that strayed in from another file is no record.
docs/format.md is the source; tests/test_format.py holds the two against each other.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from blake3 import blake3

from cdpserver.errors import CorruptError
from cdpserver.limits import BLOCK, SECTOR

MAGIC = 0xCD50
VERSION = 1
RECORD_SIZE = 64
DIGEST_SIZE = 20
NO_DIGEST = bytes(DIGEST_SIZE)

BODY = struct.Struct("<HBBIQQQQ20s")
CHECK = struct.Struct("<I")
SALT = struct.Struct("<16sQQ")

DTYPE = np.dtype(
    [
        ("magic", "<u2"),
        ("version", "u1"),
        ("kind", "u1"),
        ("length", "<u4"),
        ("seq", "<u8"),
        ("time", "<u8"),
        ("offset", "<u8"),
        ("place", "<u8"),
        ("digest", "V20"),
        ("crc", "<u4"),
    ]
)
"""The same layout for whole runs of records at once."""


class Kind(IntEnum):
    """What a record says of its extent."""

    DATA = 1
    ZERO = 2
    TRIM = 3
    SAME = 4
    CONTROL = 5
    DURABLE = 6


DATA, DURABLE = int(Kind.DATA), int(Kind.DURABLE)
"""For the writer: at each write a member of an enumeration takes longer to find than the record's bytes take to store."""

KNOWN_KINDS = frozenset(int(kind) for kind in Kind)

CHANGES = (Kind.DATA, Kind.ZERO, Kind.TRIM, Kind.SAME)
"""Kinds that change the content of the disk."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `length` and `offset` in bytes; for control records `length` is that of the payload."""

    kind: Kind
    seq: int
    time_ns: int
    offset: int
    length: int
    place: int
    digest: bytes

    @property
    def end(self) -> int:
        """End of the extent (data, zero, trim and same records)."""
        return self.offset + self.length


def salt(timeline: bytes, interval: int, segment: int) -> int:
    """The start value of every CRC in a segment."""
    return zlib.crc32(SALT.pack(timeline, interval, segment))


def payload_digest(payload: bytes | bytearray | memoryview) -> bytes:
    """First 20 bytes of the payload's blake3."""
    return blake3(payload).digest(length=DIGEST_SIZE)


def encode(record: Record, start: int) -> bytes:
    """The 64 bytes of `record` in the segment whose salt is `start`."""
    if record.kind is Kind.CONTROL:
        length, offset = 0, record.length
    else:
        length, offset = record.length // SECTOR, record.offset
    body = BODY.pack(
        MAGIC, VERSION, record.kind, length, record.seq, record.time_ns, offset, record.place, record.digest
    )
    return body + CHECK.pack(zlib.crc32(body, start))


def decode(raw: bytes | memoryview, start: int) -> Record:
    """The record in `raw` (64 bytes). CorruptError for anything else than a whole record of this segment."""
    if len(raw) != RECORD_SIZE:
        raise CorruptError(f"a record is {RECORD_SIZE} bytes, not {len(raw)}")
    magic, version, kind, length, seq, time_ns, offset, place, digest = BODY.unpack_from(raw)
    if magic != MAGIC or version != VERSION:
        raise CorruptError("no record here", hint="the log ends, or these bytes were damaged")
    if CHECK.unpack_from(raw, BODY.size)[0] != zlib.crc32(raw[: BODY.size], start):
        raise CorruptError(f"the record that claims seq {seq} fails its check")
    if kind not in KNOWN_KINDS:
        raise CorruptError(f"record {seq} is of the unknown kind {kind}")
    if kind == Kind.CONTROL:
        return Record(Kind.CONTROL, seq, time_ns, 0, offset, place, digest)
    record = Record(Kind(kind), seq, time_ns, offset, length * SECTOR, place, digest)
    if record.kind is Kind.DATA and place % BLOCK:
        raise CorruptError(f"the payload of record {seq} is not aligned")
    return record


def first_bad(raw: bytes | memoryview, start: int, first_seq: int) -> int:
    """How many records at the start of `raw` are whole and numbered on from `first_seq`."""
    count = len(raw) // RECORD_SIZE
    view = memoryview(raw)
    for number in range(count):
        at = number * RECORD_SIZE
        try:
            record = decode(view[at : at + RECORD_SIZE], start)
        except CorruptError:
            return number
        if record.seq != first_seq + number:
            return number
    return count
