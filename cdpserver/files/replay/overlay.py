"""A file system with some of its blocks replaced, in memory: what replay leaves, without a byte written.

base      | 0 | 1 | 2 | 3 | 4 | ...
blocks          |   B   |
read      | 0 | 1 | B | 3 | 4 | ...
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping

import google_crc32c

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.files.source import Reader

MASK32 = 0xFFFFFFFF


class NotReplayedError(RefusedError):
    """A journal that only a kernel replays; the file system is read as it stands."""

    usual_hint = "a kernel replays it: mount a fork of the point (cdp fork add)"


class Replaced(Reader):
    """`base`, but each block of `unit` bytes whose number is a key of `blocks` reads as that one does."""

    def __init__(self, base: Reader, *, unit: int, blocks: Mapping[int, bytes | bytearray]) -> None:
        self.size = base.size
        self._base = base
        self._unit = unit
        self._blocks = blocks
        self._numbers = sorted(blocks)

    def read(self, offset: int, length: int) -> bytes:
        """As `Reader.read`; beside the base's read it costs what is replaced there."""
        length = max(0, min(length, self.size - offset))
        data = self._base.read(offset, length)
        found = self._between(offset, offset + length)
        if not found:
            return data
        patched = bytearray(data)
        for number in found:
            start = number * self._unit - offset
            begin, end = max(start, 0), min(start + self._unit, length)
            patched[begin:end] = self._blocks[number][begin - start : end - start]
        return bytes(patched)

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Those of the base; what is replaced is on the disk nowhere as it reads."""
        end = min(end, self.size)
        for number in self._between(offset, end):
            start = number * self._unit
            if offset < start:
                yield from self._base.places(offset, start)
            offset = start + self._unit
        if offset < end:
            yield from self._base.places(offset, end)

    def _between(self, offset: int, end: int) -> list[int]:
        """The replaced blocks that [offset, end) touches, in order."""
        if end <= offset:
            return []
        low = bisect_left(self._numbers, offset // self._unit)
        return self._numbers[low : bisect_left(self._numbers, -(-end // self._unit), low)]


class Pages:
    """Pages of `base` that are changed byte by byte: read when first touched, kept until they replace the base's.

    `limit` is in bytes; NotReplayedError past it.
    """

    SIZE = 4096

    def __init__(self, base: Reader, *, limit: int) -> None:
        self.base = base
        self.limit = limit
        self.pages: dict[int, bytearray] = {}

    def read(self, offset: int, length: int) -> bytes:
        """What stands there now."""
        pieces = []
        for number, begin, end in self._parts(offset, length):
            page = self.pages.get(number)
            if page is None:
                pieces.append(exactly(self.base, number * self.SIZE + begin, end - begin))
            else:
                pieces.append(bytes(page[begin:end]))
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Changes what stands there."""
        done = 0
        for number, begin, end in self._parts(offset, len(data)):
            self._page(number)[begin:end] = data[done : done + end - begin]
            done += end - begin

    def _page(self, number: int) -> bytearray:
        page = self.pages.get(number)
        if page is None:
            if (len(self.pages) + 1) * self.SIZE > self.limit:
                raise NotReplayedError(f"its changes take more than {self.limit >> 20} MiB")
            start = number * self.SIZE
            page = bytearray(exactly(self.base, start, min(self.SIZE, self.base.size - start)))
            self.pages[number] = page
        return page

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(page, begin in it, end in it) of an extent; CorruptError if it lies outside."""
        if offset < 0 or offset + length > self.base.size:
            raise CorruptError(f"it changes byte {offset + length} of {self.base.size}")
        parts = []
        end = offset + length
        while offset < end:
            number, begin = divmod(offset, self.SIZE)
            until = min(self.SIZE, begin + end - offset)
            parts.append((number, begin, until))
            offset += until - begin
        return parts


def exactly(reader: Reader, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`; CorruptError where the file system names a place that it does not have."""
    if offset < 0 or length < 0 or offset + length > reader.size:
        raise CorruptError(f"it names byte {offset + length} of {reader.size}")
    data = reader.read(offset, length)
    if len(data) != length:
        raise CorruptError(f"{len(data)} of {length} bytes can be read at {offset}")
    return data


def crc32c(seed: int, data: bytes | bytearray) -> int:
    """CRC32C as the kernel's `crc32c()`: neither the seed nor the result is inverted."""
    return int(~google_crc32c.extend(~seed & MASK32, bytes(data)) & MASK32)
