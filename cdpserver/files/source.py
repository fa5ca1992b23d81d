"""Bytes by offset: the reader of a disk, volumes as parts of it, and the file-like object that parsers want.

    disk (asked of the caller) -> Cached -> Part, Join, Stripes (partition, logical volume) -> Stream -> parser

`places` tells where a volume's bytes are on the disk, so that the content of files need not come through a parser.
Threads: none.
"""

import io
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cdpserver.errors import CorruptError

CACHE_BLOCK = 64 << 10
"""What is read at once: metadata lies together, and a request costs more than its bytes."""

CACHE_BLOCKS = 512
"""32 MiB: the inode tables and directories of a listing."""

LARGEST_READ = 4 << 20
"""Of one request to the caller."""


class Reader(ABC):
    """`size` bytes, and any of them."""

    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Exactly [offset, offset + length), clipped at `size`."""

    @abstractmethod
    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, place on the disk) of [offset, end), in order; what it doesn't hold in these very bytes is left out."""


class Cached(Reader):
    """The disk, with the blocks read last kept."""

    def __init__(self, reader: Reader) -> None:
        self.size = reader.size
        self._reader = reader
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Large reads pass by the cache: they are content."""
        length = _clip(offset, length, self.size)
        if length >= 4 * CACHE_BLOCK:
            end = offset + length
            return b"".join(
                self._reader.read(at, min(LARGEST_READ, end - at)) for at in range(offset, end, LARGEST_READ)
            )
        first, last = offset // CACHE_BLOCK, (offset + length - 1) // CACHE_BLOCK
        skip = offset - first * CACHE_BLOCK
        if first == last:
            return self._block(first)[skip : skip + length]
        return b"".join(map(self._block, range(first, last + 1)))[skip : skip + length]

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            start = number * CACHE_BLOCK
            block = self._reader.read(start, min(CACHE_BLOCK, self.size - start))
            if len(self._blocks) >= CACHE_BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[number] = block
        else:
            self._blocks.move_to_end(number)
        return block

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The disk is where it is."""
        yield offset, end, offset


class Mapped(Reader):
    """A volume whose bytes are those of other readers."""

    @abstractmethod
    def split(self, offset: int, end: int) -> Iterator[tuple[int, int, Reader, int]]:
        """(start, end, reader, place in it) of [offset, end), in order, without gaps; within `size`."""

    def read(self, offset: int, length: int) -> bytes:
        """Piece by piece."""
        end = offset + _clip(offset, length, self.size)
        return b"".join(
            reader.read(place, stop - start) for start, stop, reader, place in self.split(offset, end)
        )

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Piece by piece."""
        for start, stop, reader, below in self.split(offset, min(end, self.size)):
            for low, high, place in reader.places(below, below + stop - start):
                yield start + low - below, start + high - below, place


class Part(Mapped):
    """`size` bytes of another reader: a partition."""

    def __init__(self, below: Reader, start: int, size: int) -> None:
        self.size = max(min(size, below.size - start), 0)
        self._below, self._start = below, start

    def split(self, offset: int, end: int) -> Iterator[tuple[int, int, Reader, int]]:
        """One piece."""
        if end > offset:
            yield offset, end, self._below, self._start + offset


class Stripes(Mapped):
    """Chunks of `chunk` bytes that lie on several readers in turn."""

    def __init__(self, below: Sequence[Reader], chunk: int) -> None:
        self.size = sum(reader.size for reader in below)
        self._below, self._chunk = below, chunk

    def split(self, offset: int, end: int) -> Iterator[tuple[int, int, Reader, int]]:
        """Chunk by chunk."""
        while offset < end:
            number, within = divmod(offset, self._chunk)
            stop = min(end, offset - within + self._chunk)
            row, column = divmod(number, len(self._below))
            yield offset, stop, self._below[column], row * self._chunk + within
            offset = stop


class Join(Mapped):
    """Readers one after the other: the segments of a logical volume."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._starts = [0]
        for reader in readers:
            self._starts.append(self._starts[-1] + reader.size)
        self.size = self._starts.pop()

    def split(self, offset: int, end: int) -> Iterator[tuple[int, int, Reader, int]]:
        """Segment by segment."""
        number = max(bisect_right(self._starts, offset) - 1, 0)
        while offset < end:
            reader, start = self._readers[number], self._starts[number]
            stop = min(end, start + reader.size)
            if stop > offset:
                yield offset, stop, reader, offset - start
            offset = max(stop, offset)
            number += 1


class Stream(io.RawIOBase):
    """A reader as parsers want it: seek, tell, read."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.size = reader.size
        self._at = 0

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Anywhere from 0 on; behind the end there is nothing to read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise CorruptError("the file system refers to a place before its beginning")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def read(self, length: int | None = -1) -> bytes:
        """Short only at the end."""
        left = max(self.size - self._at, 0)
        wanted = left if length is None or length < 0 else min(length, left)
        found = self.reader.read(self._at, wanted) if wanted else b""
        self._at += len(found)
        return found


def _clip(offset: int, length: int, size: int) -> int:
    return max(min(length, size - offset), 0)
