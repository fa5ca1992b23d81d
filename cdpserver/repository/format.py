"""The bytes of a repository: packs, and what stands in them. Pure; docs/format.md is the source.

    pack       head (32)  entry, payload, entry, payload, ...   rows   tail (32)
    entry (52) magic kind codec raw stored reserved id check
               2     1    1     4   4      4        32 4

The rows at the end repeat the entries with their places, so that an index is rebuilt without reading payload; where they are
damaged the entries say the same. A chunk's id is the (keyed) blake3 of its content, whatever is done to store it.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from cdpserver.errors import CorruptError

PACK_MAGIC = b"cdppack1"
TAIL_MAGIC = b"cdptail1"
ENTRY_MAGIC = 0xCE50

HEAD = struct.Struct("<8s16s8x")
"""Magic, the repository's id."""

ENTRY = struct.Struct("<HBBIII32s")
CHECK = struct.Struct("<I")
ENTRY_SIZE = ENTRY.size + CHECK.size

ROW = struct.Struct("<32sQIIBB2x")
"""Id, place of the payload in the pack, stored bytes, raw bytes, kind, codec."""

TAIL = struct.Struct("<8sQII")
"""Magic, place of the rows, their number, their CRC. A CRC of these follows, then four zero bytes."""

TAIL_SIZE = TAIL.size + CHECK.size + 4

ID_SIZE = 32
ZERO_ID: Final = bytes(ID_SIZE)
"""A chunk that is all zeros; it is stored nowhere."""

MAX_CHUNK = 64 << 20
MIN_CHUNK = 64 << 10
PAGE_IDS = 4096
"""Ids in a page of a disk's list; a page is a chunk itself."""

COMPRESSED, ENCRYPTED = 1, 2
"""Bits of an entry's codec."""


class Kind(IntEnum):
    """What a stored chunk is."""

    DATA = 1
    PAGE = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk in a pack: its payload is at [place, place + stored)."""

    id: bytes
    place: int
    stored: int
    raw: int
    kind: Kind
    codec: int


def pack_head(repo_id: bytes) -> bytes:
    """What a pack begins with."""
    return HEAD.pack(PACK_MAGIC, repo_id)


def pack_entry(entry: Entry) -> bytes:
    """What stands before a payload."""
    body = ENTRY.pack(ENTRY_MAGIC, entry.kind, entry.codec, entry.raw, entry.stored, 0, entry.id)
    return body + CHECK.pack(zlib.crc32(body))


def pack_end(entries: list[Entry], place: int) -> bytes:
    """Rows and tail of a pack whose payloads end at `place`."""
    rows = b"".join(ROW.pack(e.id, e.place, e.stored, e.raw, e.kind, e.codec) for e in entries)
    tail = TAIL.pack(TAIL_MAGIC, place, len(entries), zlib.crc32(rows))
    return rows + tail + CHECK.pack(zlib.crc32(tail)) + bytes(4)


def parse_tail(data: bytes, length: int) -> tuple[int, int, int]:
    """(place, number, CRC) of the rows, from the last TAIL_SIZE bytes of a pack of `length` bytes."""
    magic, place, count, crc = TAIL.unpack_from(data)
    if magic != TAIL_MAGIC or CHECK.unpack_from(data, TAIL.size)[0] != zlib.crc32(data[: TAIL.size]):
        raise CorruptError("the end of the pack is damaged")
    if place + count * ROW.size + TAIL_SIZE != length or place < HEAD.size:
        raise CorruptError("the pack has not the length that it says")
    return place, count, crc


def parse_rows(data: bytes, place: int, crc: int) -> list[Entry]:
    """The entries that the rows say; `place` is where they begin."""
    if zlib.crc32(data) != crc:
        raise CorruptError("the rows of the pack are damaged")
    entries = []
    for id_, at, stored, raw, kind, codec in ROW.iter_unpack(data):
        entries.append(_checked(Entry(id_, at, stored, raw, _kind(kind), codec), place))
    return entries


def scan(data: bytes, repo_id: bytes) -> Iterator[Entry]:
    """The entries of a whole pack as they stand before their payloads, up to where they end. CorruptError for a foreign head."""
    if data[: HEAD.size] != pack_head(repo_id):
        raise CorruptError("it is no pack of this repository")
    at = HEAD.size
    while at + ENTRY_SIZE <= len(data):
        body = data[at : at + ENTRY.size]
        if CHECK.unpack_from(data, at + ENTRY.size)[0] != zlib.crc32(body):
            return
        magic, kind, codec, raw, stored, _, id_ = ENTRY.unpack(body)
        if magic != ENTRY_MAGIC or at + ENTRY_SIZE + stored > len(data):
            return
        entry = _checked(Entry(id_, at + ENTRY_SIZE, stored, raw, _kind(kind), codec), len(data))
        yield entry
        at = entry.place + stored


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError:
        raise CorruptError(f"an entry of unknown kind {number}") from None


def _checked(entry: Entry, end: int) -> Entry:
    most = MAX_CHUNK if entry.kind == Kind.DATA else PAGE_IDS * ID_SIZE
    if (
        not 0 < entry.raw <= most
        or entry.codec & ~(COMPRESSED | ENCRYPTED)
        or not 0 < entry.stored <= entry.raw + 64
        or entry.place < HEAD.size + ENTRY_SIZE
        or entry.place + entry.stored > end
    ):
        raise CorruptError("an entry that cannot be")
    return entry


def page_count(size: int, chunk_size: int) -> int:
    """Pages of the list of a disk of `size` bytes."""
    return -(-chunk_count(size, chunk_size) // PAGE_IDS)


def chunk_count(size: int, chunk_size: int) -> int:
    """Chunks of a disk of `size` bytes; the last one may be short."""
    return -(-size // chunk_size)
