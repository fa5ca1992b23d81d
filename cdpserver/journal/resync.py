"""A resync: a mirror writes the whole disk again, and what it changes is all that the journal should grow by.

Each block is compared the first time it is written in a session, with what the disk held before the session and with what it
holds now; where one of them is equal, a *same* record names the seq to look at instead of a payload.
"""

import mmap
from collections.abc import Iterator
from typing import Protocol

from cdpserver.limits import BLOCK


class Reads(Protocol):
    """How the writer sees content: what `view.live` gives it, without the journal knowing about views."""

    def verified(self, offset: int, length: int) -> bytes:
        """What the disk holds now. CorruptError where that is not what was written."""

    def changed_from(self, ref: int, offset: int, payload: memoryview) -> list[tuple[int, int, int]]:
        """Compare a payload with the content at seq `ref`.

        Runs [start, end) of the payload with the seq R to refer to, or -1 where the content differs.
        """


SMALL = 64 << 10
"""A mirror copies at least this much at a time (QEMU's granularity); what is smaller and scattered is a guest's write."""

PATIENCE = 64
"""Small, scattered writes that may differ in a row before only every 64th of them is compared."""


class Resync:
    """Which writes of a resync to compare: each block once, and guests' own small writes hardly ever.

    Which blocks were compared takes a bit for each 4 KiB: 32 MiB for a TiB, as touched.
    """

    def __init__(self, size: int) -> None:
        self._words = memoryview(mmap.mmap(-1, -(-size // (16 * BLOCK)) * 2)).cast("H")
        self._next = 0
        self._misses = 0

    def grown(self, size: int) -> "Resync":
        """The same for a disk that has grown to `size` bytes."""
        made = Resync(size)
        made._words[: len(self._words)] = self._words
        made._next, made._misses = self._next, self._misses
        return made

    def wants(self, offset: int, length: int) -> bool:
        """Should this write be compared? Not comparing costs journal space, never truth."""
        sequential = offset == self._next
        self._next = offset + length
        if length < SMALL and not sequential and self._misses >= PATIENCE:
            self._misses += 1
            if self._misses % PATIENCE:
                return False
        return not self.holds(offset, length)

    def compared(self, offset: int, length: int, *, found_same: bool) -> None:
        """A write was compared."""
        self._misses = 0 if found_same else self._misses + 1
        self.add(offset, length)

    def holds(self, offset: int, length: int) -> bool:
        """Were all blocks of the extent compared?"""
        return all(self._words[word] & mask == mask for word, mask in _words_of(offset, length))

    def add(self, offset: int, length: int) -> None:
        """The extent's blocks are compared now."""
        for word, mask in _words_of(offset, length):
            self._words[word] |= mask


def _words_of(offset: int, length: int) -> Iterator[tuple[int, int]]:
    first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
    while first < end:
        stop = min(end, (first | 15) + 1)
        yield first >> 4, (1 << stop - first) - 1 << (first & 15)
        first = stop
