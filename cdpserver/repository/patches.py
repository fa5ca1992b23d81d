"""Places of a disk that are the chunk of an earlier backup but for some blocks. Pure; docs/format.md is the source.

    a place     |  its chunk, as some backup read it whole  |
    its blocks      | b |         | b | b |                      a bit each: these are not the chunk's
    the patch   ... | b | b | b | ...                            another chunk: the blocks of this place, and of its neighbours

    a table     head (8)  patches (36 each)  places (8 and the bits each)

Invariants: a patch is never patched. What changes next in such a place is stored together with what was patched before, over
the same chunk. So a place needs two chunks at most, each whole, named by its content and verified by itself; and no backup needs
another one.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from cdpserver.errors import CorruptError
from cdpserver.limits import BLOCK
from cdpserver.repository.format import MAX_CHUNK, PAGE_IDS

PART = 3
"""A place is patched while no more than a third of it would be; docs/backup.md says why."""

PLACES = 64
"""Neighbours that may share a patch: as many chunks fewer for changes that are scattered."""

PATCH_BYTES = 256 << 10
"""A patch is no longer, or than what one place may have of it."""

HEAD = struct.Struct("<II")
"""Number of patches, number of places."""

PATCH = struct.Struct("<32sI")
"""Id, blocks."""

PLACE = struct.Struct("<HHI")
"""Number of the place in its page, of its patch in the table, of its first block in that patch. The bits follow."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Of one place: `blocks` has a bit for each block that is not its chunk's. These are in the chunk `id`, which has `length`
    bytes, one after the other from block `first` on.
    """

    id: bytes
    length: int
    first: int
    blocks: int

    def find(self, low: int, high: int) -> int | None:
        """Where in the patch the bytes [low, high) of the place are; None if some are not in it."""
        block = low // BLOCK
        asked = bits(block, -(-high // BLOCK))
        if self.blocks & asked != asked:
            return None
        before = (self.blocks & bits(0, block)).bit_count()
        return (self.first + before) * BLOCK + low % BLOCK

    def over(self, content: bytes | memoryview, patch: bytes) -> bytearray:
        """The place: `content` of its chunk, and `patch` where that is not the place's."""
        place = bytearray(content)
        at = self.first * BLOCK
        for low, high in runs_of_bits(self.blocks):
            length = (high - low) * BLOCK
            place[low * BLOCK : high * BLOCK] = patch[at : at + length]
            at += length
        return place


def bits(low: int, high: int) -> int:
    """Bits [low, high)."""
    return ((1 << (high - low)) - 1) << low


def runs_of_bits(value: int) -> Iterator[tuple[int, int]]:
    """[low, high) runs of bits that are set, ascending."""
    at = 0
    while value:
        skip = (value & -value).bit_length() - 1
        value >>= skip
        run = (value ^ (value + 1)).bit_length() - 1
        value >>= run
        yield at + skip, at + skip + run
        at += skip + run


def most_bytes(step: int) -> int:
    """Of a patch, where chunks have `step` bytes."""
    return max(PATCH_BYTES, step // PART // BLOCK * BLOCK)


def is_patched(blocks: int, length: int, step: int) -> bool:
    """Is a place of `length` bytes stored as a patch, if these blocks are not its chunk's? A short last one is not."""
    return length == step and blocks.bit_count() * PART <= step // BLOCK


def touched(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """(place, bits of its blocks) that ascending, disjoint ranges touch."""
    number, found = -1, 0
    for start, end in ranges:
        at = start
        while at < end:
            place = at // step
            if place != number:
                if found:
                    yield number, found
                number, found = place, 0
            first = place * step
            found |= bits((at - first) // BLOCK, -(-min(end - first, step) // BLOCK))
            at = first + step
    if found:
        yield number, found


def gathered(places: Iterable[tuple[int, int]], step: int) -> Iterator[list[tuple[int, int]]]:
    """(place, bits) of ascending places, those together that share a patch."""
    most = most_bytes(step) // BLOCK
    for _, neighbours in groupby(places, lambda place: place[0] // PLACES):
        group: list[tuple[int, int]] = []
        blocks = 0
        for number, found in neighbours:
            if group and blocks + found.bit_count() > most:
                yield group
                group, blocks = [], 0
            group.append((number, found))
            blocks += found.bit_count()
        yield group


def pack_table(places: Mapping[int, Patch], step: int) -> bytes:
    """The patched places of a page, by their numbers in it; there is one at least."""
    assert places
    width = step // BLOCK // 8
    numbers: dict[tuple[bytes, int], int] = {}
    rows = []
    for place, patch in sorted(places.items()):
        number = numbers.setdefault((patch.id, patch.length), len(numbers))
        rows.append(PLACE.pack(place, number, patch.first) + patch.blocks.to_bytes(width, "little"))
    patches = [PATCH.pack(id_, length // BLOCK) for id_, length in numbers]
    return b"".join([HEAD.pack(len(patches), len(rows)), *patches, *rows])


def parse_table(data: bytes, step: int, size: int) -> dict[int, Patch]:
    """What `pack_table` made, of a page with `size` bytes of the disk. CorruptError for what cannot be one."""
    width = step // BLOCK // 8
    if len(data) < HEAD.size:
        raise CorruptError("a table of patches that is none")
    patches, places = HEAD.unpack_from(data)
    at = HEAD.size + patches * PATCH.size
    if (
        not 0 < patches <= places <= PAGE_IDS
        or len(data) != at + places * (PLACE.size + width)
    ):  # fmt: skip
        raise CorruptError("a table of patches has not the length that it says")
    known = list(PATCH.iter_unpack(memoryview(data)[HEAD.size : at]))
    found: dict[int, Patch] = {}
    last = -1
    for row in range(at, len(data), PLACE.size + width):
        place, number, first = PLACE.unpack_from(data, row)
        blocks = int.from_bytes(data[row + PLACE.size : row + PLACE.size + width], "little")
        if number >= patches or place <= last:
            raise CorruptError("a table of patches that cannot be")
        id_, count = known[number]
        if (
            (place + 1) * step > size
            or not blocks
            or first + blocks.bit_count() > count
            or count > MAX_CHUNK // BLOCK
        ):
            raise CorruptError("a table of patches names blocks that cannot be")
        found[place] = Patch(id_, count * BLOCK, first, blocks)
        last = place
    return found
