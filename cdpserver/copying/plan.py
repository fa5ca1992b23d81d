"""What a copy reads and writes, in which order, and up to where it is whole; pure.

    extents of data    |####|  |##|                |###########...####|
    chunks             |----------|                |----|-------|-----|
    their parts        |####|  |##|                the same

Extents with small gaps between them are read at once and written one by one, so that a fresh file gets no zeros. Where zeros
must be written anyhow, the gaps are written with them.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CHUNK = 1 << 20
"""Bytes of a read: large enough that Python is not seen, small enough that buffers stay in the processor's cache."""

GAP = 32 << 10
"""A shorter gap is cheaper to read than to ask around."""

ZERO_CHUNK = 32 << 20
"""Longest request for zeros: QEMU takes no longer one."""


class Extents:
    """Data of a disk as ascending, disjoint [start, end); 16 bytes each."""

    def __init__(self, size: int, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self.size = size
        self._starts = array("Q")
        self._ends = array("Q")
        for start, end in pairs:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Append an extent behind the others; what adjoins or overlaps the last one is joined to it."""
        end = min(end, self.size)
        if self._ends and start <= self._ends[-1]:
            self._ends[-1] = max(end, self._ends[-1])
        elif start < end:
            self._starts.append(start)
            self._ends.append(end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self._ends) - sum(self._starts)

    def union(self, other: "Extents") -> "Extents":
        """What is in one or the other, within this one's size."""
        return Extents(self.size, sorted([*self, *other]))


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step: read [start, end) and write `parts` of it, or write zeros if there are none."""

    start: int
    end: int
    parts: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """Data in it."""
        return sum(end - start for start, end in self.parts)


def chunks(extents: Extents, *, zeros: bool, start: int = 0) -> Iterator[Chunk]:
    """The steps for what lies at `start` or behind it, ascending; `zeros`: also for what is between the extents."""
    at = start
    parts: list[tuple[int, int]] = []
    for first, high in extents:
        low = max(first, start)
        while low < high:
            if parts and (low - parts[-1][1] > GAP or low >= _boundary(parts[0][0])):
                yield _chunk(parts, whole=zeros)
                at, parts = parts[-1][1], []
            if zeros and not parts:
                yield from zeros_of(at, low)
            stop = min(high, _boundary(low))
            parts.append((low, stop))
            low = stop
    if parts:
        yield _chunk(parts, whole=zeros)
        at = parts[-1][1]
    if zeros:
        yield from zeros_of(at, extents.size)


def _boundary(at: int) -> int:
    """Where the chunk that `at` lies in ends at the latest."""
    return at - at % CHUNK + CHUNK


def _chunk(parts: list[tuple[int, int]], *, whole: bool) -> Chunk:
    start, end = parts[0][0], parts[-1][1]
    return Chunk(start, end, ((start, end),) if whole else tuple(parts))


def zeros_of(start: int, end: int) -> Iterator[Chunk]:
    """The steps that write zeros to [start, end)."""
    for at in range(start, end, ZERO_CHUNK):
        yield Chunk(at, min(end, at + ZERO_CHUNK), ())


class Watermark:
    """Up to where every chunk is done, when they end in any order."""

    def __init__(self, start: int) -> None:
        self.at = start
        self._open: list[int] = []
        self._next = start

    def begin(self, chunk: Chunk) -> None:
        """Chunks begin in ascending order."""
        self._open.append(chunk.start)
        self._next = chunk.end

    def end(self, chunk: Chunk) -> None:
        """One is done."""
        del self._open[bisect_left(self._open, chunk.start)]
        self.at = self._open[0] if self._open else self._next


def sample(steps: Sequence[Chunk], *, last: int, spread: int) -> list[Chunk]:
    """The last `last` of the chunks, and `spread` of those before them."""
    before = steps[:-last]
    stride = max(1, len(before) // spread)
    return [*before[::stride], *steps[-last:]]
